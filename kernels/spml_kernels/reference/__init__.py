"""Plain PyTorch forms of every op, readable against the formulas, for any floating dtype up to fp64."""
