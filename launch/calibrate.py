"""`python launch/calibrate.py ...` is `spml-fast calibrate ...`, from a checkout: spml_fast/cli/calibrate.py."""

try:
    from spml_fast.cli.calibrate import main
    from spml_fast.core.errors import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

if __name__ == "__main__":
    run_command(main)
