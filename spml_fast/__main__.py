"""`python -m spml_fast COMMAND ...`."""

from spml_fast.cli.main import entry

if __name__ == "__main__":
    entry()
