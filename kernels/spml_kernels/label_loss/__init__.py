"""Sums of pointwise losses over label codes."""
