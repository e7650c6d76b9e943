"""`python launch/completion.py ...` is `spml-fast completion ...` from a checkout; see spml_fast/cli/completion.py."""

try:
    from spml_fast.cli.completion import main
    from spml_fast.core.errors import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

if __name__ == "__main__":
    run_command(main)
