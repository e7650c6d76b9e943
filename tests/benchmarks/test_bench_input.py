"""The input benchmark: every row runs, and processor time counts workers."""

from __future__ import annotations

import csv
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_input
from tests.support.paths import ROOT


def test_loaders_of_every_row_exist():
    for row in bench_input.rows(Path("cache")).values():
        assert row.mode in bench_input.MODES and "pil" in row.loaders
        assert all(hasattr(bench_input.Loaders, name) for name in row.loaders)


def _work(seconds: float, done, leave) -> None:
    while time.process_time() < seconds:
        pass
    done.set()
    leave.wait()


def test_processor_time_of_workers_counts():
    context = multiprocessing.get_context("fork")
    before, done, leave = bench_input.cpu_seconds(), context.Event(), context.Event()
    worker = context.Process(target=_work, args=(0.2, done, leave))
    worker.start()
    done.wait(60)
    after = bench_input.cpu_seconds()
    leave.set()
    worker.join()
    assert after - before > 0.1


@pytest.mark.slow
def test_a_quick_run_has_every_row(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_input.py"), "--quick", "--image-size", "64"]
    options = ["--threads", "1", "--device", "cpu", "--results", str(tmp_path), "--json", str(tmp_path / "input.json")]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=600)
    with (tmp_path / "input.csv").open() as file:
        found = list(csv.DictReader(file))
    expected = [(name, loader) for name, row in bench_input.rows(Path()).items() for loader in row.loaders]
    assert [(row["row"], row["loader"]) for row in found] == expected
    assert all(float(row["images_per_second"]) > 0 and float(row["cpu_ms_per_image"]) > 0 for row in found)
    assert all(float(row["speed_over_pil"]) == 1 for row in found if row["loader"] == "pil")
