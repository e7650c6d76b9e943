"""The papers' settings, published numbers, and the command that compares them."""
