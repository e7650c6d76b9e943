"""`spml-fast relabel --manifest DIR --decisions decisions.csv --out DIR2`: a new version of a data set's labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line
from spml_fast.core.text import without_controls
from spml_fast.core.urls import location
from spml_fast.runs.layout import RunLayout

DESCRIPTION = """Apply decisions about suggested labels to a Manifest and write a new version of it; the old one stays
as it is, and images are not copied. Decisions are the table that `suggest --csv` writes, with a column `decision`:
accept, reject (the label is the opposite of the suggestion) or skip."""
EXAMPLES = [
    ("--manifest data/a --decisions decisions.csv --out data/b", "what somebody has decided"),
    ("--manifest data/a --decisions decisions.csv --out data/b --split val", "about another split"),
    ("--manifest data/a --decisions found.csv --accept-above 0.99 --out data/b", "what the model is sure of"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    usage = "--manifest DIR --decisions FILE --out DIR2 [OPTIONS]"
    parser = common.command_parser("relabel", usage, DESCRIPTION, EXAMPLES)
    parser.add_argument("--manifest", type=location, required=True, metavar="DIR", help="the data set's Manifest")
    parser.add_argument("--decisions", type=Path, required=True, metavar="FILE", help="the table (CSV, JSONL, Parquet)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR2", help="new Manifest; never replaces anything")
    parser.add_argument(
        "--accept-above",
        type=float,
        metavar="P",
        help="accept rows without a decision that the model is at least so sure of (0.5 to 1)",
    )
    parser.add_argument("--split", help="of rows that name none; default train, or the data set's only split")
    parser.add_argument("--image-root", type=location, help="image folder, when it is not where it was at preparation")
    return common.parse(parser, argv)


def training_words(folder: str, version: int, runs: list[str]) -> list[str]:
    """What follows `train` to train on the new version: as the run that made all suggestions, where it is still there.

    Args:
        folder: the new Manifest.
        version: its number.
        runs: that made the suggestions; an empty name where the table has none.
    """
    data = ["--data.dir", folder]
    if len(runs) != 1 or not runs[0] or not RunLayout(Path(runs[0])).config.is_file():
        return data
    run = RunLayout(Path(runs[0]))
    return ["--config", str(run.config), *data, "--run.dir", f"{runs[0].rstrip('/')}-{version}"]


def main(argv: list[str] | None = None) -> int:
    """Read, apply, write, say what changed."""
    args = parse(argv)
    common.check_one_process("relabel")
    if args.accept_above is not None and not 0.5 <= args.accept_above <= 1:
        raise UserError(f"--accept-above is {args.accept_above:g}; it must lie between 0.5 and 1")
    from spml_fast.data.manifest import Manifest
    from spml_fast.prepare.decisions import read_decisions
    from spml_fast.prepare.relabel import relabel, summary

    common.print_any_text()
    manifest = Manifest(args.manifest, args.image_root)
    split = args.split or ("train" if "train" in manifest.splits else next(iter(manifest.splits), "train"))
    decisions = read_decisions(args.decisions, manifest.classes, split, args.accept_above)
    if not decisions.made:
        raise UserError(
            f"{args.decisions} decides nothing ({decisions.rows} rows); fill in its column decision with accept or "
            "reject, or give --accept-above P"
        )
    made, changes = relabel(manifest, decisions, args.decisions, args.out)
    again = command_line("train", *training_words(str(made.folder), made.meta["version"], list(decisions.runs)))
    print(without_controls(summary(manifest, made, decisions, changes, again)))
    return 0
