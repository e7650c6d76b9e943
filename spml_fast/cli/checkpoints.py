"""`spml-fast checkpoints RUN`: what a run can resume from, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError

DESCRIPTION = """The checkpoints of a run, newest first. All their files are read and compared with the checksums that
were saved: whole, damaged (and which file), or unfinished. The exit status is 1 when something is damaged. --repair
first writes damaged best weights again from their checkpoint; the data set is not needed."""
EXAMPLES = [
    ("RUN", "what a run can resume from"),
    ("runs/mine && echo fine", "in a script: before a copy is made, say"),
    ("RUN --repair", "write damaged best weights again"),
]
HEADER = ("checkpoint", "phase", "epoch", "update", "size", "", "state")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("checkpoints", "RUN", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="write damaged best weights again from their checkpoint",
    )
    return common.parse(parser, argv)


def rows(run: Path) -> tuple[list[tuple[str, ...]], bool]:
    """The table below `HEADER`, and whether something in it is damaged.

    Raises:
        UserError: the folder has no checkpoints.
    """
    from spml_fast.runs.layout import RunLayout
    from spml_fast.training.best_weights import damaged_best
    from spml_fast.training.checkpoint import list_checkpoints
    from spml_fast.training.saving import checkpoint_state

    folder = RunLayout(run).checkpoints.folder
    listed = list_checkpoints(folder)
    if not listed:
        raise UserError(f"{run} has no checkpoints; give a run directory")
    best = next((one.checkpoint.best.tag for one in listed if one.checkpoint and one.checkpoint.best), None)
    lines: list[tuple[str, ...]] = []
    damaged = False
    for one in listed:
        state, checkpoint = checkpoint_state(one)
        damaged |= state.startswith("damaged")
        size = sum(path.stat().st_size for path in (folder / one.tag).rglob("*") if path.is_file())
        place = ("?", "?", "?")
        if checkpoint is not None:
            position = checkpoint.position
            place = (position.phase, str(position.epoch), str(position.update or ""))
        lines.append((one.tag, *place, f"{size / 1e6:,.1f} MB", "best" if one.tag == best else "", state))
    weights = RunLayout(run).weights
    wrong = damaged_best(RunLayout(run), listed)
    if wrong is not None or weights.exists():
        size = weights.stat().st_size if weights.exists() else 0
        state = "whole" if wrong is None else f"damaged: {wrong}"
        lines.append((weights.name, "", "", "", f"{size / 1e6:,.1f} MB", "best", state))
    return lines, damaged or wrong is not None


def main(argv: list[str] | None = None) -> int:
    """List; returns the exit status."""
    args = parse(argv)
    if args.repair:
        from spml_fast.runs.layout import RunLayout
        from spml_fast.training.best_weights import repair

        common.say(repair(RunLayout(args.run)))
    lines, damaged = rows(args.run)
    table = [HEADER, *lines]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if damaged else 0
