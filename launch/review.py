"""`python launch/review.py ...` is `spml-fast review ...` from a checkout; see spml_fast/cli/review.py."""

try:
    from spml_fast.cli.review import main
    from spml_fast.core.errors import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

if __name__ == "__main__":
    run_command(main)
