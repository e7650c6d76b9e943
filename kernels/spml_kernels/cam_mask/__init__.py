"""Images masked by normalised class activation maps (IGNORE)."""
