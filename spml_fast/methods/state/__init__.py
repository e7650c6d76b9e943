"""State that methods keep over a run."""
