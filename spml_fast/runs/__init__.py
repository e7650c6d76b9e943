"""Run directories: their files, how they are written, read and opened."""
