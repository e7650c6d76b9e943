"""`python launch/reproduce.py ...` is `spml-fast reproduce ...` from a checkout; see spml_fast/cli/reproduce.py."""

try:
    from spml_fast.cli.reproduce import main
    from spml_fast.core.errors import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

if __name__ == "__main__":
    run_command(main)
