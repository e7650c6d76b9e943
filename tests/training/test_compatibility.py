"""What version 0.1.0 wrote still works: a Manifest, and a run of two ranks that was killed after its second epoch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from spml_fast.core.precision import prefers_bf16
from spml_fast.data.manifest import Manifest
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

OLD = ROOT / "tests" / "fixtures" / "version_0_1_0"
# What 0.1.0 itself gave. Another processor may round otherwise.
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A copy of the run beside a copy of its Manifest."""
    shutil.copytree(OLD / "manifest", tmp_path / "manifest")
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("dir: manifest", f"dir: {tmp_path / 'manifest'}")
    if prefers_bf16(torch.device("cpu")):
        # What `auto` of 0.1.0 was where the run began.
        assert "precision: auto" in text
        text = text.replace("precision: auto", "precision: fp32")
    config.write_text(text, encoding="utf-8")
    return run


def test_manifest_opens():
    manifest = Manifest(OLD / "manifest")
    assert {name: len(split) for name, split in manifest.splits.items()} == {"train": 48, "val": 16, "test": 16}
    assert manifest.split("train").observed.row_counts(1).tolist() == [1] * 48
    assert manifest.split("train").known.row_counts(-1).tolist() == [0] * 48


def test_run_evaluates(old_run: Path, run_script: Run, tmp_path: Path):
    done = run_script("evaluate.py", "--run", old_run, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert {a: v["map"] for a, v in found["alpha"].items()} == pytest.approx(EXPECTED["evaluate"], abs=0.5)


def test_run_goes_on(old_run: Path, run_script: Run):
    """One rank takes over what two saved, ROLE's estimates of each rank's images among it."""
    words = ("--config", old_run / "config.yaml", "--run.dir", old_run)
    done = run_script("train.py", *words, "--train.batch_size", 8)
    assert done.returncode == 1 and "train.batch_size cannot change within a run of method role" in done.stderr
    done = run_script("train.py", *words, "--run.seed", 5)
    assert done.returncode == 1 and "is another run (run.seed 0 -> 5)" in done.stderr
    done = run_script("train.py", "--config", old_run / "config.yaml", "--run.dir", old_run)
    assert done.returncode == 0, done.stderr
    assert "has no checksums" in done.stdout
    epochs = read_metrics(old_run, "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4]
    assert {str(e["epoch"]): e["loss"] for e in epochs} == pytest.approx(EXPECTED["losses"], rel=1e-4)
