"""The quick start of one version against that of another, as a newcomer runs it, the two in turn.

    python benchmarks/bench_quick_start.py [--version HEAD] [--against 61ba7a5] [--rounds 3] [--results DIR]
    python benchmarks/bench_quick_start.py --precision bf16      the newer one in bf16, the other as it is

Each run is `deepspeed launch/train.py` in a checkout of that version without any data: it builds the digit scenes,
trains 12 epochs and evaluates. Versions must run on the packages that are installed. Seconds are of the whole command;
medians over the rounds, and the test mAP of each version, which a faster one must not lose. Goals: 1.15 times as fast
as the first version that is compared, 1.4 times where bf16 pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.child_usage import usage_of
from benchmarks.kernel_report import ROOT, merge_csv
from benchmarks.machine import machine
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output

GOALS = {"fp32": 1.15, "bf16": 1.4}
# A row of the table is replaced by a new one with the same of these.
KEY = ("version", "against", "precision", "cpu", "cores")


def git(*words: str) -> str:
    """What git prints, without the end of the line. `UserError` where it fails."""
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise UserError(f"git {' '.join(words)} failed: {reason.strip()}") from error
    return done.stdout.strip()


@contextmanager
def checkout(version: str, folder: Path) -> Iterator[Path]:
    """A version's files in a folder of their own."""
    git("worktree", "add", "--quiet", "--detach", str(folder), version)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def run(tree: Path, options: Sequence[str]) -> tuple[float, float]:
    """Seconds of a version's quick start, and its test mAP without BoostLU.

    Args:
        tree: the checkout.
        options: of the command.

    Raises:
        RuntimeError: the command failed.
    """
    out, path = tree / "run", os.pathsep.join(map(str, (tree, tree / "kernels")))
    command = ["deepspeed", "launch/train.py", "--run.dir", str(out), *options]
    usage = usage_of(["env", "-C", str(tree), f"PYTHONPATH={path}", *command])
    return usage.seconds, _score(out / "results.json")


def _score(results: Path) -> float:
    """Test mAP in per cent, as every version has written it."""
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return float(content["alpha"]["1"]["map"])


def parse() -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", default="HEAD", help="what is measured, as git names it")
    parser.add_argument("--against", default="61ba7a5", help="what it is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=list(GOALS), default="fp32", help="of --version; the other one has fp32")
    parser.add_argument("--epochs", type=int, help="fewer than the recipe's: a look, not a measurement")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the table quick_start.csv")
    add_json_option(parser)
    options = parser.parse_args()
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be 1 or more")
    if options.epochs is not None and options.results is not None:
        raise UserError("--epochs is for a look; leave it out, or --results")
    return options


def main() -> int:
    """Run both in turn, and print what they took."""
    options = parse()
    out_file = json_output(options, "bench_quick_start")
    names = {git("rev-parse", "--short", name): name for name in (options.version, options.against)}
    if len(names) != 2:
        raise UserError(f"--version {options.version} and --against {options.against} are the same commit")
    newer, older = names
    facts = machine(torch.device("cpu")) | {"date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    more = [] if options.epochs is None else ["--train.epochs", str(options.epochs)]
    words = {newer: [*more, "--train.precision", options.precision], older: more}
    taken: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            for name in (older, newer):
                with checkout(name, Path(scratch) / name) as tree:
                    seconds, score = run(tree, words[name])
                taken[name].append(seconds)
                scores[name].append(score)
                print(f"{name} {seconds:8.1f} s, test mAP {score:.2f}", flush=True)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ratios = [a / b for a, b in zip(taken[older], taken[newer], strict=True)]
    row = {"version": newer, "against": older, "precision": options.precision, "rounds": options.rounds}
    row |= {"seconds": median[newer], "seconds_against": median[older], "ratio": median[older] / median[newer]}
    row |= {"lowest": min(ratios), "highest": max(ratios)}
    row |= {"map": statistics.median(scores[newer]), "map_against": statistics.median(scores[older])}
    print(f"{row['ratio']:.2f} times as fast (rounds {row['lowest']:.2f} to {row['highest']:.2f})")
    if options.results is not None:
        merge_csv(options.results / "quick_start.csv", [row | facts], key=KEY)
    if out_file is not None:
        out_file.write_json({"machine": facts, "rows": [row], "seconds": taken, "map": scores})
    return 0


if __name__ == "__main__":
    run_command(main)
