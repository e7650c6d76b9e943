"""A page on which people decide about suggested labels, with pictures and maps."""
