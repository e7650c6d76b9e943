"""Mutation testing of the modules whose formulas matter: `python -m tests.mutation.run --help`.

Every mutant is a fork of a process that has imported the libraries. In the fork the changed module takes the place of
the real one before anything imports it; then the tests run that reach the changed line, quickest first, until one
fails. A first pass over the tests finds out which test reaches which line and which tensors carry a gradient. All
results are kept in a folder, so that a run goes on where the one before it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutation import results
from tests.mutation.baseline import Coverage, measure, preload, remembered
from tests.mutation.child import Session, run_tests
from tests.mutation.forks import Events, Fork, run_all
from tests.mutation.host import Host, KernelHost, run_hosted, verdict
from tests.mutation.operators import Mutant, find_mutants, mutated
from tests.mutation.results import Results

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (
    "spml_fast/models/classifier.py",
    "spml_fast/models/heads/*.py",
    "spml_fast/methods/**/*.py",
    "kernels/spml_kernels/*/reference.py",
    "spml_fast/evaluation/*.py",
    "spml_fast/data/labels.py",
    "spml_fast/data/sparse_labels.py",
    "spml_fast/prepare/observed_labels.py",
    "spml_fast/prepare/label_encodings.py",
)
TESTS = (
    *("tests/models", "tests/methods", "tests/kernels", "tests/evaluation", "tests/data"),
    *(f"tests/prepare/test_{name}.py" for name in ("observed_labels", "label_encodings", "id_lists")),
)
# What runs every point function, whose examples it takes from the methods.
KERNEL_TESTS = ["tests/kernels/test_triton_label_loss.py"]
# One thread a fork and no accelerator.
FIXED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def target_modules(root: Path, patterns: Sequence[str]) -> dict[str, str]:
    """File -> name of its module, in the order of the patterns."""
    found = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            file = path.relative_to(root).as_posix()
            found[file] = file.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return found


def warm_up(names: Sequence[str], targets: dict[str, str]) -> None:
    """Import libraries here, once for all forks; the packages of the targets are for the forks alone."""
    own = {"tests", "benchmarks", "launch", "conftest", "__main__", "__mp_main__"}
    own |= {module.partition(".")[0] for module in targets.values()}
    for name in names:
        if name.partition(".")[0] not in own:
            # Some names exist only after others, or in a test's process alone.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _fork(root: Path, module: str, mutant: Mutant, tests: dict[str, float], found: Results) -> Fork:
    source = (root / mutant.file).read_text(encoding="utf-8")
    start = time.monotonic()
    limits = {test: 10 * seconds + 5 for test, seconds in tests.items()}

    def child(report: int, scratch: Path) -> None:
        session = Session(report, limits, stop=True)
        files = list(dict.fromkeys(test.partition("::")[0] for test in limits))
        run_tests(root, {module: mutated(source, mutant)}, files, session, scratch)
        session.say(result="survived" if session.ran else "error", by="" if session.ran else "no test could be run")

    def done(events: Events, late: bool) -> None:
        found.add(mutant, *verdict(events, late), time.monotonic() - start)

    return Fork(child, 20 * sum(limits.values()) + 1200, done, found.folder)


def within(tests: dict[str, float], budget: float) -> dict[str, float]:
    """The first tests that take `budget` seconds together, at least one."""
    ends = itertools.accumulate(tests.values())
    chosen = [t for t, end in zip(tests, ends, strict=True) if end <= budget] or list(tests)[:1]
    return {t: tests[t] for t in chosen}


def run_mutants(
    root: Path,
    targets: dict[str, str],
    mutants: list[Mutant],
    coverage: Coverage,
    found: Results,
    jobs: int,
    end: float,
    budget: float = float("inf"),
) -> None:
    """Run mutants without a result until all are done or `end` (of `time.monotonic`) has come.

    Args:
        root: the repository.
        targets: file -> name of its module.
        mutants: those to run.
        coverage: which tests reach them.
        found: where results go.
        jobs: forks at a time.
        end: when to stop.
        budget: seconds of tests for a mutant; what is later in the order is left for another call.
    """

    reached = {m: coverage.tests(m) for m in mutants}
    for mutant in [m for m, tests in reached.items() if not tests]:
        found.add(mutant, "survived", "no test reaches the line", 0.0)
        del reached[mutant]
    found.read()
    hosted = [(m, tests) for m, tests in reached.items() if not coverage.runs_at_import(m)]
    files = sorted({t.partition("::")[0] for _, tests in hosted for t in tests})
    run_hosted(Host(root, hosted, found, jobs, end, lambda tests: within(tests, budget)), files)
    tried = found.read()

    def forks() -> Iterator[Fork]:
        for mutant, tests in reached.items():
            if (mutant.key, mutant.digest) in tried:
                continue
            if time.monotonic() > end:
                print("the time is up; the next run goes on from here")
                return
            yield _fork(root, targets[mutant.file], mutant, within(tests, budget), found)

    run_all(forks(), jobs)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="forks at a time")
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="files whose path starts so")
    parser.add_argument("--sample", type=int, metavar="N", help="a random choice of N mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no mutant after that")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="S", help="seconds of tests for a mutant, nearest first"
    )
    parser.add_argument("--retry", action="store_true", help="run survivors and timeouts again, before the rest")
    parser.add_argument("--kernels", action="store_true", help="run mutants of Triton functions, in its interpreter")
    parser.add_argument("--stale", action="store_true", help="choose tests by what is known of older sources")
    parser.add_argument("--report", action="store_true", help="write results.md from what is known, run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="patterns of files to change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    parser.add_argument("--warm", nargs="*", default=["torch", "timm", "pytest"], help="imported before the first pass")
    parser.add_argument("--state", type=Path, help="folder of results (default: build/mutation)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the number of survivors that are not explained."""
    options = parse(words)
    # Ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update(FIXED)
    root = options.root.resolve()
    state = options.state or root / "build" / "mutation"
    sys.path[:0] = [str(root), str(root / "kernels")]
    targets = target_modules(root, options.targets)
    found = Results(state, results.read_equivalents(root / "tests" / "mutation" / "equivalent.toml"))
    mutants = [m for f in targets for m in find_mutants((root / f).read_text(encoding="utf-8"), f)]
    files = [p for t in options.tests for p in ([root / t] if (root / t).is_file() else (root / t).rglob("test_*.py"))]
    tests = sorted({p.relative_to(root).as_posix() for p in files})
    if options.kernels:
        os.environ["TRITON_INTERPRET"] = "1"
    if not options.report:
        warm_up(preload(state) or options.warm, targets)
    coverage = Coverage([])
    if not options.kernels and not options.report:
        coverage = measure(
            root, targets, [m for m in mutants if not m.kernel], tests, state, options.jobs, options.stale
        )
        mutants = [m for m in mutants if m.kernel or coverage.counts(m)]
    if options.report:
        known = remembered(state)
        mutants = [m for m in mutants if m.kernel or known.counts(m) or found.verdict(m)]
        (root / "tests" / "mutation" / "results.md").write_text(results.table(mutants, found), encoding="utf-8")
        chosen = mutants
    else:
        chosen = [m for m in mutants if not options.only or m.file.startswith(tuple(options.only))]
        chosen = [m for m in chosen if m.kernel == options.kernels]
        if options.sample is not None:
            chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
        # Survivors first, then what was never run.
        waiting = sorted((m for m in chosen if found.wanted(m, options.retry)), key=lambda m: not found.verdict(m))
        print(f"{len(mutants)} mutants, {len(chosen)} chosen, {len(waiting)} to run", flush=True)
        end = time.monotonic() + options.minutes * 60
        if options.kernels:
            host = KernelHost(root, [(m, {}) for m in waiting], found, options.jobs, end, dict)
            run_hosted(host, KERNEL_TESTS)
            found.read()
        else:
            warm_up(preload(state), targets)
            run_mutants(root, targets, waiting, coverage, found, options.jobs, end, options.budget)
    print(results.summary(chosen, found))
    return len([m for m in chosen if found.verdict(m) == "survived"])


if __name__ == "__main__":
    sys.exit(min(main(), 1))
