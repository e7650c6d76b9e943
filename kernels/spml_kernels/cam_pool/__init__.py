"""Spatial means of class activation maps and of their positive parts (CAM, BoostLU)."""
