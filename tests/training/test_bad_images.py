"""Whole runs over images that go bad."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

BAD = (5, 17)


def options(data: Path, run: Path, **more: object) -> list[str]:
    """Options of a short run of one epoch; `more` maps section__field to a value."""
    base: dict[str, object] = {
        "config": ROOT / "launch" / "configs" / "digits.yaml",
        "data__dir": data,
        "run__dir": run,
        "data__val_split": "null",
        "data__test_split": "null",
        "model__freeze_bn": "true",
        "train__epochs": 1,
        "train__batch_size": 24,
        "train__precision": "fp32",
        "train__log_every": 1,
        "deepspeed__tensorboard": "false",
    }
    return [word for key, value in (base | more).items() for word in (f"--{key.replace('__', '.')}", str(value))]


@pytest.fixture
def damaged(small_digits: Path, tmp_path: Path) -> Path:
    """A copy of the scenes of which one image is missing and one cut short."""
    folder = tmp_path / "digits"
    shutil.copytree(small_digits, folder)
    root = folder / json.loads((folder / "manifest.json").read_text())["image_root"]
    first, second = (root / "train" / f"{i:05d}.jpg" for i in BAD)
    first.unlink()
    second.write_bytes(second.read_bytes()[:400])
    return folder


def ended(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error of a run that must have ended well."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr


def test_replaced_images_leave_ranks_in_step(damaged: Path, run_script: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    policy = {"data__bad_images": "replace", "data__bad_image_limit": 2}
    told = ended(run_script("train.py", *options(damaged, one, **policy)))
    assert told.count("replaced by another image") == 2
    ended(run_script("train.py", *options(damaged, two, **policy), ranks=2))
    losses = [[e["loss"] for e in read_metrics(run, "update")] for run in (one, two)]
    assert len(losses[0]) == 7
    np.testing.assert_allclose(*losses, rtol=2e-5)
    for run in (one, two):
        with (run / "bad_images.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [f"train/{i:05d}.jpg" for i in BAD]
        assert "is missing" in rows[0]["reason"] and "cannot be read" in rows[1]["reason"]
        assert read_metrics(run, "epoch")[0]["bad_images"] == 2
    # Without the policy the first one is named; with a lower limit of all ranks together the run ends too.
    done = run_script("train.py", *options(damaged, tmp_path / "stop"))
    assert done.returncode == 1 and "00005.jpg is missing; restore it" in done.stderr
    policy["data__bad_image_limit"] = 1
    done = run_script("train.py", *options(damaged, tmp_path / "limit", **policy), ranks=2)
    assert done.returncode == 1 and "more than data.bad_image_limit 1; the last one: image" in done.stderr
