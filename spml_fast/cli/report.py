"""`spml-fast report RUN [RUN ...] --out FILE.html`: one HTML page about one run, or comparing several."""

from __future__ import annotations

import argparse
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import OutputFile, writer_name

DESCRIPTION = """Test figures, curves over epochs, a table of all classes with precision-recall curves, the hardest
mistakes with their maps, what the method rejected, calibration, confused classes, where the time went, and what looks
unhealthy. Runs that differ in their seed alone are shown as one, with mean, deviation and a dot for each. The page is
one file that needs no network."""
EXAMPLES = [
    ("RUN --out report.html", "one run, finished or not"),
    ("runs/a runs/b --out report.html", "two runs compared"),
    ("runs/ignore-s* runs/an-s* --out report.html", "two settings, several seeds each"),
]
# What a run notes of each kind.
MOST_IMAGES = 32


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("report", "RUN [RUN ...] --out FILE.html", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, finished or not")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.html", help="the page; an older page is replaced"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=12,
        metavar="N",
        help="images of each kind of mistake, of each setting, where the data set is there (default: %(default)s); 0 "
        "makes the page without loading any weights",
    )
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Make the page."""
    args = parse(argv)
    if not 0 <= args.images <= MOST_IMAGES:
        raise UserError(f"--images is {args.images}; it must lie between 0 and {MOST_IMAGES}")
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must be named .html")
    out = OutputFile(args.out, "html", writer_name("report"), "--out", args.overwrite)
    out.check()
    from spml_fast.analysis.report.page import make_page
    from spml_fast.core.io import write_text
    from spml_fast.core.text import counted

    device = common.default_device() if args.images else None
    page = make_page(args.runs, args.images, device, common.say)
    out.check()
    try:
        write_text(args.out, page, errors="backslashreplace")
    except OSError as error:
        raise common.write_failed(args.out, error) from error
    print(f"{printable(str(args.out))}: {counted(len(args.runs), 'run')}, {len(page) / 1e6:.1f} MB")
    return 0
