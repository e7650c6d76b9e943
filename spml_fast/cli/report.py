"""`spml-fast report RUN [RUN ...] --out FILE.html`: one HTML page about one run, or comparing several."""

from __future__ import annotations

import argparse
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import OutputFile, writer_name

DESCRIPTION = """Test figures, curves over epochs, classes, what differs between the configurations, and what looks
unhealthy. Runs that differ in their seed alone are shown as one, with mean and deviation. The page needs nothing beside
itself."""
EXAMPLES = [
    ("RUN --out report.html", "one run, finished or not"),
    ("runs/a runs/b --out report.html", "two runs compared"),
    ("runs/ignore-s* runs/an-s* --out report.html", "two settings, several seeds each"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("report", "RUN [RUN ...] --out FILE.html", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, finished or not")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.html", help="the page; an older page is replaced"
    )
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Make the page."""
    args = parse(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must be named .html")
    out = OutputFile(args.out, "html", writer_name("report"), "--out", args.overwrite)
    out.check()
    from spml_fast.analysis.report.page import make_page
    from spml_fast.core.io import write_text

    page = make_page(args.runs)
    out.check()
    try:
        write_text(args.out, page, errors="backslashreplace")
    except OSError as error:
        raise common.write_failed(args.out, error) from error
    print(f"{printable(str(args.out))}: {len(args.runs)} run(s), {len(page) / 1e6:.1f} MB")
    return 0
