"""The Large Loss schemes: entries with the largest loss among the unknown."""
