"""Everything that a run must survive, tried at random and in full; tests/ has the short form."""
