"""The quick start of one version against that of another, as a newcomer runs it, the two in turn.

    python benchmarks/bench_quick_start.py [--version HEAD] [--against 61ba7a5] [--rounds 3] [--results DIR]
    python benchmarks/bench_quick_start.py --precision fp32 bf16      the newer one in each, the other in fp32

Each run is `deepspeed launch/train.py` in a checkout of that version without any data: it builds the digit scenes,
trains 12 epochs and evaluates. Versions must run on the packages that are installed. The precision is always given,
since versions choose differently by themselves. Seconds are of the whole command; medians over the rounds, and the test
mAP of each version, which a faster one must not lose. Goals: 1.15 times as fast as the first version that is compared,
1.4 times where bf16 pays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.child_usage import usage_of
from benchmarks.kernel_report import merge_csv
from benchmarks.machine import machine
from benchmarks.versions import add_versions, checkout, import_path, resolve
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output

GOALS = {"fp32": 1.15, "bf16": 1.4}
# A row of the table is replaced by a new one with the same of these.
KEY = ("version", "against", "precision", "cpu", "cores")


def run(tree: Path, options: Sequence[str]) -> tuple[float, float]:
    """Seconds of a version's quick start, and its test mAP without BoostLU.

    Args:
        tree: the checkout.
        options: of the command.

    Raises:
        RuntimeError: the command failed.
    """
    out = tree / "run"
    command = ["deepspeed", "launch/train.py", "--run.dir", str(out), *options]
    usage = usage_of(["env", "-C", str(tree), f"PYTHONPATH={import_path(tree)}", *command])
    return usage.seconds, _score(out / "results.json")


def _score(results: Path) -> float:
    """Test mAP in per cent, as every version has written it."""
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return float(content["alpha"]["1"]["map"])


def compare(
    newer: tuple[str, str],
    older: tuple[str, str],
    taken: Mapping[tuple[str, str], Sequence[float]],
    scores: Mapping[tuple[str, str], Sequence[float]],
) -> dict[str, Any]:
    """The row of two versions, which is printed too.

    Args:
        newer: version and precision.
        older: what it is compared with.
        taken: seconds of their rounds.
        scores: their test mAP.
    """
    median = {each: statistics.median(taken[each]) for each in (newer, older)}
    ratios = [a / b for a, b in zip(taken[older], taken[newer], strict=True)]
    row = {"version": newer[0], "against": older[0], "precision": newer[1], "rounds": len(ratios)}
    row |= {"seconds": median[newer], "seconds_against": median[older], "ratio": median[older] / median[newer]}
    row |= {"lowest": min(ratios), "highest": max(ratios)}
    row |= {"map": statistics.median(scores[newer]), "map_against": statistics.median(scores[older])}
    print(f"{newer[1]}: {row['ratio']:.2f} times as fast (rounds {row['lowest']:.2f} to {row['highest']:.2f})")
    return row


def parse() -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add_versions(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precision", nargs="+", choices=list(GOALS), default=["fp32"], help="of --version; the other one has fp32"
    )
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
    newer, older = resolve(options.version, options.against)
    facts = machine(torch.device("cpu")) | {"date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    more = [] if options.epochs is None else ["--train.epochs", str(options.epochs)]
    runs = [(older, "fp32"), *((newer, precision) for precision in dict.fromkeys(options.precision))]
    taken: dict[tuple[str, str], list[float]] = {each: [] for each in runs}
    scores: dict[tuple[str, str], list[float]] = {each: [] for each in runs}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            for name, precision in runs:
                with checkout(name, Path(scratch) / name) as tree:
                    seconds, score = run(tree, [*more, "--train.precision", precision])
                taken[name, precision].append(seconds)
                scores[name, precision].append(score)
                print(f"{name} {precision} {seconds:8.1f} s, test mAP {score:.2f}", flush=True)
    rows = [compare(each, runs[0], taken, scores) for each in runs[1:]]
    if options.results is not None:
        merge_csv(options.results / "quick_start.csv", [row | facts for row in rows], key=KEY)
    if out_file is not None:
        rounds = [
            {"version": name, "precision": precision, "seconds": taken[name, precision], "map": scores[name, precision]}
            for name, precision in runs
        ]
        out_file.write_json({"machine": facts, "rows": rows, "rounds": rounds})
    return 0


if __name__ == "__main__":
    run_command(main)
