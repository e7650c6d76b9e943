"""One HTML page about one run, or comparing several: `python launch/report.py RUN [RUN ...] --out FILE.html`.

Test figures, curves over epochs, classes, what differs between the configurations, and what looks unhealthy. Runs that
differ in their seed alone are shown as one, with mean and deviation. The page needs nothing beside itself.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

try:
    from spml_fast.core.errors import UserError, run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, finished or not")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.html", help="the page; an older one is replaced"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the page."""
    args = parse(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must be named .html")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a directory; give the name of a file")
    from spml_fast.analysis.report.page import make_page

    page = make_page(args.runs)
    partial = args.out.with_name(args.out.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, args.out)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise UserError(f"{args.out} cannot be written: {error.strerror}") from error
    print(f"{args.out}: {len(args.runs)} run(s), {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
