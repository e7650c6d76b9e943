"""What stands behind `spml_fast.load`, `spml_fast.train` and `spml_fast.open_run`."""
