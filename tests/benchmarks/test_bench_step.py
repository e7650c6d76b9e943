"""The benchmark of whole steps: it checks before it times, and what it writes is complete."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step
from benchmarks.bench_step import ON_CPU, PARTS, check
from spml_fast.core.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import Run

WORDS = "--backbone test_resnet --image-size 32 --count 8 --batch-size 4 --steps 1 --rounds 1"


def test_both_ways_train_alike_and_are_timed(run_script: Run, tmp_path: Path) -> None:
    """With the engine beside PyTorch's own loop, and a rival in a process of its own."""
    arguments = [*WORDS.split(), "--methods", "ll_r", "--threads", 1, "--precision", "fp32"]
    out = tmp_path / "out.json"
    ways = ["--ways", "spml_fast", "plain", "--engine"]
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *arguments, *ways, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["methods"]["ll_r"]
    assert figures["losses_apart"] < 1e-5 and set(figures) == {"losses_apart", "spml_fast", "plain", "bare"}
    for variant in ("spml_fast", "plain", "bare"):
        assert figures[variant]["images_per_second"] > 0 and set(figures[variant]["seconds"]) == set(PARTS)
    assert figures["spml_fast"]["ratio"] == 1 and "DeepSpeed's engine takes" in done.stdout


def test_images_in_memory_and_a_loop_of_pytorch(run_script: Run, tmp_path: Path) -> None:
    """What a machine without DALI and DeepSpeed can time; rows go to a table."""
    more = ["--input", "memory", "--loop", "torch", "--results", tmp_path, "--commit", "abc", "--precision", "fp32"]
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *WORDS.split(), "--methods", "an", "ignore", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "no_gpu_steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["shape"].split()[0], row["provider"], row["mode"], row["commit"]) for row in rows}
    assert found == {(m, v, "memory torch", "abc") for m in ("an", "ignore") for v in ON_CPU}
    for row in rows:
        assert float(row["images_per_second"]) > 0 and all(float(row[f"{part}_s"]) >= 0 for part in PARTS)


def test_another_training_is_not_timed() -> None:
    """fp32 must agree to rounding, bf16 to its own, whichever of the ways is ours."""
    half = torch.bfloat16
    assert check({"spml_fast": 2.0, "plain": 2.0001, "bf16": 2.02}, None) == pytest.approx(0.01)
    assert check({"spml_fast": 2.02, "plain": 2.0}, half) == pytest.approx(0.01)
    for losses, ours in (
        ({"spml_fast": 2.001, "plain": 2.0}, None),
        ({"spml_fast": 2.0, "plain": 2.0, "bf16": 2.1}, None),
        ({"spml_fast": 2.1, "plain": 2.0}, half),
        ({"spml_fast": float("nan"), "plain": 2.0}, None),
    ):
        with pytest.raises(UserError, match="not the same training"):
            check(losses, ours)


def test_a_helper_that_ends_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    helper = bench_step.Helper(["plain"])
    with pytest.raises(UserError, match="other ways of training failed"):
        helper.ask("losses", "an")


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
