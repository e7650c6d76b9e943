"""A run directory has one training at a time, and a Manifest that a training reads stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spml_fast.core import lock
from tests.support.paths import ROOT
from tests.support.runs import Run, environment
from tests.training.test_training import options, succeed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_training_is_refused(ranks: int, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock.acquire(run / ".lock", "the test")
    try:
        done = run_script("train.py", *options(small_digits, run), ranks=ranks)
    finally:
        lock.release_all()
    assert done.returncode == 1
    line, *others = [line for line in done.stderr.splitlines() if line.strip()]
    assert not others, done.stderr
    assert line.startswith(f"error: run directory {run} is in use by process {os.getpid()} on "), done.stderr
    assert not (run / "config.yaml").exists() and not (run / "metrics.jsonl").exists()


def test_two_started_at_once(small_digits: Path, tmp_path: Path) -> None:
    """One trains to its end, the other says why it does not; the finished one leaves the directory free."""
    run = tmp_path / "run"
    words = [sys.executable, str(ROOT / "launch" / "train.py"), *options(small_digits, run, train__epochs=1)]
    both = [
        subprocess.Popen(
            words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    refused = next(text for text, process in zip(said, both, strict=True) if process.returncode)
    winner = next(process for process in both if process.returncode == 0)
    assert f"in use by process {winner.pid} on " in refused and "Traceback" not in refused
    assert (run / "results.json").is_file() and not (run / ".lock").exists()
    # Runs that other tests killed may have left a note, which counts for nothing.
    assert lock.readers(small_digits / ".readers") == []


def test_prepare_does_not_replace_what_a_training_reads(small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    words = ["digits", "--out", data, "--train", 64, "--val", 32, "--test", 32]
    succeed(run_script("prepare.py", *words))
    lock.register_reader(data / ".readers")
    try:
        done = run_script("prepare.py", *words, "--overwrite")
    finally:
        lock.release_all()
    assert done.returncode == 1 and f"{data} is being read by process {os.getpid()} on " in done.stderr
    succeed(run_script("prepare.py", *words, "--overwrite"))
