"""Rows of sparse labels as a dense block of codes."""
