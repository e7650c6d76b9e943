"""Faults by kind, each with the tests that inject it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

# What happens to a run or its data -> files of tests, or tests of them.
KINDS = {
    "another program's file where a result goes": ("tests/core/test_outputs.py",),
    "a run resumed with other options, or into another folder": (
        "tests/training/test_saving.py",
        "tests/runs/test_write.py",
    ),
    "two trainings in one run directory, prepare under a training": (
        "tests/training/test_run_lock.py",
        "tests/core/test_lock.py",
    ),
    "losses, gradients or weights that are not finite": ("tests/training/test_nonfinite.py",),
    "damaged, cut off, missing and malicious checkpoints; full disks": (
        *("tests/training/test_checkpoint.py", "tests/training/test_tensor_files.py", "tests/training/test_saving.py"),
    ),
    "ranks killed while an epoch's end is written": ("tests/training/test_background_saves.py",),
    "Manifests with values out of range": ("tests/data/test_manifest_check.py",),
    "hostile tables, lists, recipes, tar files and images": ("tests/fuzz/test_fuzz.py",),
    "signals": ("tests/training/test_signals.py",),
    "launchers, ranks and machines that die or hang": ("tests/training/test_watch.py", "tests/training/test_peers.py"),
    "images that cannot be read": ("tests/training/test_bad_images.py",),
    "memory that runs out": ("tests/training/test_memory.py",),
}


@dataclass(frozen=True)
class Outcome:
    """Tests of one kind of fault.

    Attributes:
        kind: of the fault.
        tried: tests that ran.
        failed: names of those that failed.
    """

    kind: str
    tried: int
    failed: tuple[str, ...]


def inject() -> Iterator[Outcome]:
    """Run the tests of every kind."""
    for kind, tests in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report), *tests]
            subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ), check=False)
            yield read_report(kind, report)


def read_report(kind: str, report: Path) -> Outcome:
    """Counts of a report that pytest wrote; a test that was skipped was not tried."""
    if not report.exists():
        return Outcome(kind, 0, ("pytest itself",))
    cases = list(ElementTree.parse(report).iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    failed = [case for case in ran if case.find("failure") is not None or case.find("error") is not None]
    return Outcome(kind, len(ran), tuple(f"{c.get('classname')}.{c.get('name')}" for c in failed))
