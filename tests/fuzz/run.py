"""Throws hostile inputs at every parser: `python -m tests.fuzz.run [--target T] [--cases N] [--seed S]`.

Inputs are mutations of the seeds of targets.py and of what lies in corpus/TARGET. A case is a function of target, seed
and number, so that it can be repeated. Whatever is raised but `UserError`, and whatever takes longer than ten seconds,
is a finding: the input is written to corpus/TARGET, where the suite meets it from then on. `--record` adds what was run
to record.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import io
import itertools
import json
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from spml_fast.core.errors import UserError
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import Target, make_targets

HERE = Path(__file__).parent
CORPUS, RECORD = HERE / "corpus", HERE / "record.json"
# Of a whole run, more than a million over all targets.
CASES = 60_000
SECONDS = 10
# Processor time, so that other work on the machine finds nothing; a parser that waits for something has longer.
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 20 * SECONDS))
LIBRARIES = ("numpy", "pillow", "pyarrow", "pyyaml", "torch")


class TooLongError(Exception):
    """A case that takes longer than `SECONDS`."""


def _too_long(*_: object) -> NoReturn:
    raise TooLongError(f"more than {SECONDS} s")


def corpus(target: Target) -> list[bytes]:
    """The target's seeds and found inputs."""
    found = sorted((CORPUS / target.name).glob("*")) if (CORPUS / target.name).is_dir() else []
    return [*target.seeds, *(path.read_bytes() for path in found)]


def run_case(target: Target, data: bytes, folder: Path) -> BaseException | None:
    """Parse one input in an empty folder; returns what was raised but `UserError`, or None."""
    folder.mkdir()
    for number, timer, seconds in TIMERS:
        signal.signal(number, _too_long)
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            target.parse(folder, data)
    except UserError:
        return None
    except Exception as error:
        return error
    finally:
        for _, timer, _ in TIMERS:
            signal.setitimer(timer, 0)
        shutil.rmtree(folder)
    return None


def make_case(target: Target, inputs: list[bytes], seed: int, number: int) -> bytes:
    """Input `number`: the seeds as they are, then mutations."""
    if number < len(inputs):
        return inputs[number]
    rng = random.Random(f"{target.name}/{seed}/{number}")
    return mutate(rng.choice(inputs), inputs, rng, target.words)


def run_target(target: Target, cases: int, seed: int, folder: Path, keep: bool = True) -> list[str]:
    """Run cases of a target; returns a text for each different finding, whose inputs are kept in the corpus.

    Args:
        target: the parser.
        cases: how many.
        seed: of the mutations.
        folder: for files.
        keep: write findings to the corpus.
    """
    inputs, findings = corpus(target), dict[str, str]()
    for number in range(cases):
        data = make_case(target, inputs, seed, number)
        error = run_case(target, data, folder / "case")
        if error is None:
            continue
        frames = traceback.extract_tb(error.__traceback__)
        place = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
        key = f"{type(error).__name__} at {place}"
        if key not in findings:
            findings[key] = f"{target.name}, seed {seed}, case {number}: {key}: {str(error)[:200]}"
            print(findings[key], flush=True)
            if keep:
                (CORPUS / target.name).mkdir(parents=True, exist_ok=True)
                (CORPUS / target.name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return list(findings.values())


def add_record(name: str, cases: int, seed: int, seconds: float, findings: int) -> None:
    """Add a run of a target to record.json, to the entry of the same day and versions where there is one.

    Args:
        name: of the target.
        cases: that were run.
        seed: of the mutations.
        seconds: that they took.
        findings: different ones.
    """
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": 0, "targets": {}}
    target = record["targets"].setdefault(name, {"cases": 0, "runs": []})
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    made_with = {
        "date": day,
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
    run = next((r for r in target["runs"] if made_with.items() <= r.items()), None)
    if run is None:
        run = {**made_with, "seeds": [], "cases": 0, "seconds": 0.0, "findings": 0}
        target["runs"].append(run)
    if seed in run["seeds"]:
        # The same inputs once more are no more cases.
        run["cases"], run["seconds"] = max(run["cases"], cases), round(max(run["seconds"], seconds), 1)
    else:
        run["seeds"].append(seed)
        run["cases"], run["seconds"] = run["cases"] + cases, round(run["seconds"] + seconds, 1)
    run["findings"] += findings
    target["cases"] = sum(r["cases"] for r in target["runs"])
    record["cases"] = sum(entry["cases"] for entry in record["targets"].values())
    record["targets"] = dict(sorted(record["targets"].items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    """Run the targets; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", help="only this target; may be given several times")
    parser.add_argument("--cases", type=int, default=CASES, help="inputs of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="seeds, from --seed on, one after the other")
    parser.add_argument("--record", action="store_true", help="add what was run to record.json")
    args = parser.parse_args()
    found = 0
    # In memory where there is such a folder: every case writes files.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=shared if shared.is_dir() else None) as made:
        folder = Path(made)
        targets = make_targets(folder)
        names = args.target or list(targets)
        for name in names:
            if name not in targets:
                parser.error(f"there is no target {name!r}; choose among {', '.join(targets)}")
        for seed, name in itertools.product(range(args.seed, args.seed + args.rounds), names):
            started = time.perf_counter()
            findings = run_target(targets[name], args.cases, seed, folder)
            seconds = time.perf_counter() - started
            print(f"{name}: {args.cases:,} cases of seed {seed}, {len(findings)} findings, {seconds:.1f} s", flush=True)
            found += len(findings)
            if args.record:
                add_record(name, args.cases, seed, seconds, len(findings))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
