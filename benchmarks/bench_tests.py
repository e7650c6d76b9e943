"""The slowest tests of one version against the same tests of another, the two in turn.

    python benchmarks/bench_tests.py [--version HEAD] [--against 61ba7a5] [--count 10] [--rounds 3] [--results DIR]
    python benchmarks/bench_tests.py --report REPORT.xml      the older suite was run: `pytest --junitxml REPORT.xml`

The older version's whole suite says which of its tests are the slowest. They, and the tests of the same names in the
newer version, wherever they are there, then run alone, one after another and in turn by version. Seconds are of a test
with its fixtures; medians over the rounds. What the newer version has no test of that name for is named and left out
of the sums. Goal: half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_report import merge_csv
from benchmarks.machine import machine
from benchmarks.versions import add_versions, checkout, import_path, resolve
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output

GOAL = 2.0
ALL = "all"
# Rows of the table are replaced by new ones with the same of these.
KEY = ("version", "against", "test", "cpu", "cores")


def pytest_in(tree: Path, *words: str | Path, may_fail: bool = False) -> str:
    """What pytest prints of a checkout.

    Args:
        tree: the checkout.
        words: options and tests.
        may_fail: whether tests may.

    Raises:
        RuntimeError: a test failed and may not, none was found, or pytest itself failed.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": import_path(tree)}
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode not in ((0, 1) if may_fail else (0,)):
        raise RuntimeError(f"pytest failed in {tree}:\n{done.stdout[-3000:]}")
    return done.stdout


def seconds_of(report: Path, tree: Path) -> dict[str, float]:
    """Seconds of every test that passed, by its id.

    Args:
        report: a file that `pytest --junitxml` wrote.
        tree: the checkout that it is of.
    """
    found = {}
    for case in ET.parse(report).iter("testcase"):
        if not {child.tag for child in case} & {"failure", "error", "skipped"}:
            found[_id(case.attrib["classname"].split("."), case.attrib["name"], tree)] = float(case.attrib["time"])
    return found


def _id(parts: Sequence[str], name: str, tree: Path) -> str:
    """A test's id; a report joins folders, module and classes by dots."""
    files = (
        number for number in range(len(parts), 0, -1) if tree.joinpath(*parts[:number]).with_suffix(".py").exists()
    )
    end = next(files, len(parts))
    return "::".join((f"{'/'.join(parts[:end])}.py", *parts[end:], name))


def _name(test: str) -> str:
    """Function and parameters of an id."""
    place, bracket, parameters = test.partition("[")
    return place.rpartition("::")[2] + bracket + parameters


def _file(test: str) -> str:
    """Name of the file of an id."""
    return test.partition("::")[0].rpartition("/")[2]


def same_tests(wanted: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """For each test the one of the same name and parameters, wherever it is now; none where several could be it.

    Of several, one in a file of the same name is it.

    Args:
        wanted: ids, `file::name[parameters]` or `file::class::name[parameters]`.
        others: ids of the other version.
    """
    found = {}
    for test in wanted:
        same = [other for other in others if _name(other) == _name(test)]
        if len(same) > 1:
            same = [other for other in same if _file(other) == _file(test)]
        if len(same) == 1:
            found[test] = same[0]
    return found


def collected(tree: Path) -> list[str]:
    """Ids of all tests of a checkout."""
    printed = pytest_in(tree, "-n", "0", "--collect-only", "-q")
    return [line for line in printed.splitlines() if "::" in line and not line.startswith(" ")]


def timed(tree: Path, tests: Sequence[str]) -> list[float]:
    """Seconds of some tests, which run alone in one process, in their order.

    Raises:
        RuntimeError: one did not pass.
    """
    report = tree / "seconds.xml"
    pytest_in(tree, "-n", "0", "-q", "--junitxml", report, *tests)
    found = seconds_of(report, tree)
    report.unlink()
    if missing := [test for test in tests if test not in found]:
        raise RuntimeError(f"did not pass: {', '.join(missing)}")
    return [found[test] for test in tests]


def suite_report(tree: Path) -> Path:
    """Run the whole suite of a checkout, as it is set up there, and give what `--junitxml` wrote.

    Tests of an older version may fail on newer packages; they are not compared.
    """
    report = tree / "suite.xml"
    pytest_in(tree, "-q", "--junitxml", report, may_fail=True)
    return report


def rows_of(taken: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[dict[str, Any]]:
    """A row of each test, and one of all: medians over the rounds and how many times as fast.

    Args:
        taken: seconds of the rounds by test, those of the newer version first.
    """
    newer = {test: statistics.median(rounds) for test, (rounds, _) in taken.items()}
    older = {test: statistics.median(rounds) for test, (_, rounds) in taken.items()}
    newer[ALL], older[ALL] = sum(newer.values()), sum(older.values())
    # Reports have milliseconds.
    return [
        {
            "test": test,
            "seconds": newer[test],
            "seconds_against": older[test],
            "ratio": older[test] / max(newer[test], 1e-3),
        }
        for test in newer
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add_versions(parser)
    parser.add_argument("--report", type=Path, help="what pytest's --junitxml wrote of the suite of --against")
    parser.add_argument("--count", type=int, default=10, help="how many of the slowest tests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the table tests.csv")
    add_json_option(parser)
    options = parser.parse_args()
    for name in ("count", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if options.report is not None and not options.report.is_file():
        raise UserError(f"--report {options.report} is no file; `pytest --junitxml` writes it")
    return options


def main() -> int:
    """Find the slowest tests, run them in both, and print what they took."""
    options = parse()
    out_file = json_output(options, "bench_tests")
    newer, older = resolve(options.version, options.against)
    facts = machine(torch.device("cpu")) | {"date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        checkout(older, Path(scratch) / older) as old,
        checkout(newer, Path(scratch) / newer) as new,
    ):
        whole = seconds_of(options.report or suite_report(old), old)
        slowest = sorted(whole, key=lambda test: -whole[test])[: options.count]
        pairs = same_tests(slowest, collected(new))
        for test in slowest:
            print(f"{whole[test]:8.1f} s {test}{'' if test in pairs else ' (no such test now)'}", flush=True)
        if not pairs:
            raise UserError(f"{newer} has none of these tests")
        rounds = [(timed(new, list(pairs.values())), timed(old, list(pairs))) for _ in range(options.rounds)]
    taken = {test: ([a[i] for a, _ in rounds], [b[i] for _, b in rounds]) for i, test in enumerate(pairs)}
    facts |= {"found": len(pairs), "slowest": len(slowest), "rounds": options.rounds}
    rows = [{"version": newer, "against": older} | row | facts for row in rows_of(taken)]
    for row in rows:
        print(f"{row['seconds_against']:8.1f} {row['seconds']:8.1f} s, {row['ratio']:.2f} times as fast: {row['test']}")
    if options.results is not None:
        merge_csv(options.results / "tests.csv", rows, key=KEY)
    if out_file is not None:
        out_file.write_json({"machine": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
