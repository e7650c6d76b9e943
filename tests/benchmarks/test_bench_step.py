"""The benchmark of whole steps: it checks before it times, and what it writes is complete."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_step
from benchmarks.bench_step import PARTS
from spml_fast.core.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import Run


def test_both_ways_train_alike_and_are_timed(run_script: Run, tmp_path: Path) -> None:
    arguments = "--methods ll_r --backbone test_resnet --image-size 32 --count 8 --batch-size 4 --threads 1 --steps 1"
    out = tmp_path / "out.json"
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *arguments.split(), "--rounds", 1, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["methods"]["ll_r"]
    assert figures["losses_apart"] < 1e-5 and set(figures) == {"losses_apart", "spml_fast", "plain"}
    for variant in ("spml_fast", "plain"):
        assert figures[variant]["images_per_second"] > 0 and set(figures[variant]["seconds"]) == set(PARTS)
    assert figures["spml_fast"]["ratio"] == 1


def test_images_in_memory_and_a_loop_of_pytorch(run_script: Run, tmp_path: Path) -> None:
    """What a machine without DALI and DeepSpeed can time; rows go to a table."""
    arguments = (
        "--methods an ignore --backbone test_resnet --image-size 32 --count 8 --batch-size 4 --steps 1 --rounds 1"
    )
    more = ["--input", "memory", "--loop", "torch", "--results", tmp_path, "--commit", "abc"]
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *arguments.split(), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "none_steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["shape"].split()[0], row["provider"], row["mode"], row["commit"]) for row in rows}
    assert found == {(m, v, "memory torch", "abc") for m in ("an", "ignore") for v in ("spml_fast", "plain")}
    for row in rows:
        assert float(row["images_per_second"]) > 0 and all(float(row[f"{part}_s"]) >= 0 for part in PARTS)


@pytest.mark.parametrize(
    ("words", "missing", "sentence"),
    [
        ("", "nvidia.dali", "DALI, which loads the images, is not installed; give --input memory"),
        ("--input memory", "deepspeed", "DeepSpeed, which makes the updates, is not installed; give --loop torch"),
        ("--input memory --images photos", "", "--images has no use with --input memory"),
    ],
)
def test_what_cannot_be_timed_is_said(words: str, missing: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "installed", lambda name: name != missing)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *words.split()])
    with pytest.raises(UserError, match=sentence):
        bench_step.main()
