"""`spml-fast review PAGE`: serves a page of `suggest --page` on this machine, and writes what is decided at once."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line, next_lines
from spml_fast.core.io import printable
from spml_fast.core.outputs import DECISION_COLUMNS, OutputFile

DECISIONS = "decisions.csv"
DESCRIPTION = """Serve a page of `suggest --page` to a browser on this machine. Every decision is written to
decisions.csv beside the page at once, and earlier decisions in it are resumed; `relabel` reads the file.
Pages that are one file do without this command: they keep decisions in the browser until they are exported.

Only this machine is answered, at 127.0.0.1, and only at the address that is printed. From another one:
ssh -L PORT:127.0.0.1:PORT MACHINE, with --port PORT."""
EXAMPLES = [
    ("review/", "a folder of `suggest --page review/`"),
    ("review/ --port 8765 --open", "at a port of your choice, and opened in a browser"),
    ("review.html --out mine.csv", "a page of one file, decisions elsewhere"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("review", "PAGE [OPTIONS]", DESCRIPTION, EXAMPLES)
    parser.add_argument("page", type=Path, metavar="PAGE", help="what `suggest --page` wrote: a folder, or a file")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where decisions are written; default {DECISIONS} beside the page"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port of 127.0.0.1; default any free one")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until the keyboard interrupts."""
    args = parse(argv)
    common.check_one_process("review")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port is {args.port}; it must be 0 (any free one) to 65535")
    from spml_fast.analysis.review.decisions import DecisionTable
    from spml_fast.analysis.review.server import ReviewPage, ReviewServer
    from spml_fast.core import lock

    common.print_any_text()
    page = ReviewPage(args.page)
    out: Path = args.out if args.out is not None else page.folder / DECISIONS
    output = OutputFile(out, "csv", ",".join(DECISION_COLUMNS), "--out", args.overwrite)
    output.check()
    try:
        lock.acquire(out.with_name(f".{out.name}.lock"), printable(str(out)))
    except OSError as error:
        raise common.write_failed(out, error) from error
    table = DecisionTable(output, page.data)
    try:
        server = ReviewServer(page, table, args.port)
    except OSError as error:
        raise UserError(
            f"port {args.port} of 127.0.0.1 cannot be used: {error.strerror}; give another --port"
        ) from error
    print(server.address, flush=True)
    print(f"{len(table.entries)} of {page.rows} decided in {printable(str(out))}; Ctrl-C ends", flush=True)
    if args.open:
        webbrowser.open(server.address)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(ending(page.manifest, out, len(table.entries), page.rows))
    return 0


def ending(manifest: str, out: Path, decided: int, rows: int) -> str:
    """What is said at the end, with the next command.

    Args:
        manifest: of the data set.
        out: the table of decisions.
        decided: suggestions that were decided.
        rows: suggestions of the page.
    """
    lines = [f"\n{decided} of {rows} decided in {printable(str(out))}"]
    if decided:
        words = ("--manifest", manifest, "--decisions", out, "--out", f"{manifest}-2")
        lines.append(next_lines([command_line("relabel", *words)]))
    return "\n".join(lines)
