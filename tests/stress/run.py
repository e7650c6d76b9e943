"""Kills and faults, with a table of what was tried and what survived: `python -m tests.stress.run [--kills 50]`.

Half an hour on two cores with 50 kills. Runs that did not survive are kept in --folder.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from spml_fast.prepare.datasets.digits import prepare_digits
from tests.stress.faults import inject
from tests.stress.kills import SETTINGS, Killer, Trial

SIZES = {"train": 192, "val": 60, "test": 90}


def kill_rows(trials: Sequence[Trial]) -> list[tuple[str, int, int, int]]:
    """Name of a setting, runs, signals that came before they had ended, and runs that did not survive."""
    rows = []
    for setting in SETTINGS:
        own = [t for t in trials if t.setting is setting]
        rows.append((setting.name, len(own), sum(t.hits for t in own), sum(bool(t.fault) for t in own)))
    return [row for row in rows if row[1]]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.run", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill, the settings in turn")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments; chosen and printed where it is not given"
    )
    parser.add_argument("--only", choices=["kills", "faults"], help="one half")
    parser.add_argument("--settings", nargs="+", metavar="WORDS", help="kill only runs with these in their names")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Returns how many did not survive."""
    options = parse(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seed = options.seed if options.seed is not None else int(time.time()) % 100_000
    folder = options.folder or Path(tempfile.mkdtemp(prefix="stress-"))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "timm"))
    print(f"seed {seed}, Python {platform.python_version()}, {libraries}; runs in {folder}", flush=True)
    lost = 0
    if options.only != "faults" and options.kills:
        data = folder / "data"
        prepare_digits(data, sizes=SIZES)
        trials = []
        chosen = tuple(s for s in SETTINGS if not options.settings or any(w in s.name for w in options.settings))
        for trial in Killer(folder, data, seed).trials(options.kills, chosen):
            trials.append(trial)
            kills = ", ".join(f"{k.number} after {k.seconds:.1f} s" for k in trial.kills)
            print(f"{trial.setting.name}: {kills}; {trial.starts} starts; {trial.fault or 'survived'}", flush=True)
        rows = [(name, runs, kills, runs - failed, failed) for name, runs, kills, failed in kill_rows(trials)]
        print("\n" + table(("killed and resumed", "runs", "signals", "survived", "failed"), rows) + "\n", flush=True)
        lost += sum(bool(t.fault) for t in trials)
    if options.only != "kills":
        outcomes = []
        for outcome in inject():
            outcomes.append((outcome.kind, outcome.tried, outcome.tried - len(outcome.failed), len(outcome.failed)))
            print(f"{outcome.kind}: {outcome.tried} tried, failed: {', '.join(outcome.failed) or 'none'}", flush=True)
            lost += len(outcome.failed)
        print("\n" + table(("fault", "tried", "survived", "failed"), outcomes), flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(min(main(), 1))
