"""IGNORE's rejection and loss."""
