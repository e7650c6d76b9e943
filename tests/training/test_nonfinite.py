"""Losses and gradients that are not finite: noticed, named, left out where asked, and never published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spml_fast.core.config import TrainConfig
from spml_fast.data.manifest import Manifest
from spml_fast.data.sampler import TrainSampler
from spml_fast.methods import Progress
from spml_fast.training.nonfinite import NonFiniteGuard
from tests.support.runs import Run, read_metrics
from tests.training.test_training import losses, options, succeed, weights

# A method of a user: its loss or its gradient is not a number when one image is in the batch of one epoch. Checkpoints
# reach the disk later than that.
METHOD = '''
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from spml_fast.core import io
from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import LossOutput, MethodOptions, register


@dataclass(frozen=True)
class Options(MethodOptions):
    """Faulty.

    Attributes:
        name: the method.
        image: the image.
        epoch: the epoch.
        what: loss or gradient.
    """

    name: str = "faulty"
    image: int = 0
    epoch: int = 2
    what: str = "loss"


flush = io.flush_to_disk


def slow(file):
    if threading.current_thread().name == "checkpoint":
        time.sleep(1.5)
    flush(file)


io.flush_to_disk = slow


@register("faulty")
class Faulty(AssumeNegative):
    """Assume negative with a fault."""

    Options: ClassVar[type[MethodOptions]] = Options
    examples = (Options(),)

    def loss(self, logits, batch, progress):
        out = super().loss(logits, batch, progress)
        if self.options.epoch != progress.epoch:
            return out
        there = (batch.index == self.options.image).any().float()
        if self.options.what == "gradient":
            # The square root has no gradient at 0.
            return LossOutput(out.loss + ((1 - there) + 0 * logits.sum()).sqrt() - (1 - there), out.metrics)
        return LossOutput(out.loss * (1 + 0 * torch.log(1 - there)), out.metrics)
'''
BATCH, IMAGE, EPOCH = 32, 100, 2


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method's file."""
    path = tmp_path_factory.mktemp("plugin") / "faulty.py"
    path.write_text(METHOD)
    return path


def words(data: Path, run: Path, faulty: Path, **more: object) -> list[str]:
    """Options of a run with the fault in the second epoch."""
    given = {"train__batch_size": BATCH, "train__epochs": 3, "train__log_every": 2, "data__val_split": "null", **more}
    method = {"method": "faulty", "method__image": IMAGE, "method__epoch": EPOCH}
    recipe = options(data, run, **{**method, **given})
    del recipe[:2]
    base = {"data.image_size": 64, "model.backbone": "test_resnet", "model.pretrained": "false", "train.lr": 3e-3}
    base["train.schedule"] = "constant"
    return ["--plugins", str(faulty), *(w for k, v in base.items() for w in (f"--{k}", str(v))), *recipe]


def faulty_update(data: Path, ranks: int = 1, accumulation: int = 1) -> tuple[int, set[int], int]:
    """The fault's update in its epoch from 1, all images of that update, and the rank that has the image."""
    size = len(Manifest(data).split("train"))
    per_rank = [list(TrainSampler(size, BATCH, accumulation, ranks, r, 0).epoch(EPOCH)) for r in range(ranks)]
    for update in range(len(per_rank[0])):
        mine = [{i for micro in part[update] for i in micro.index.tolist()} for part in per_rank]
        if any(IMAGE in images for images in mine):
            return update + 1, set().union(*mine), next(r for r, images in enumerate(mine) if IMAGE in images)
    raise AssertionError("the image is not in the epoch")


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]


def check_stopped(run: Path, data: Path, error: str, ranks: int = 1, accumulation: int = 1) -> dict[str, Any]:
    """The run ended with one sentence, the images of the right update, and finite weights of the epoch before."""
    update, images, _ = faulty_update(data, ranks, accumulation)
    assert f"not finite at update {update} of epoch {EPOCH}" in error and "learning rate 0.003" in error, error
    assert "Traceback" not in error and "rank 1: error" not in error
    (event,) = events(run)
    assert (event["epoch"], event["update"], event["outcome"]) == (EPOCH, update, "stopped")
    assert {i for part in event["samples"] for i in part["index"]} == images
    paths = [path for part in event["samples"] for path in part["images"]]
    assert len(paths) == len(images) and all(Path(path).is_file() for path in paths)
    kept = json.loads((run / "checkpoints" / "newest.json").read_text())
    assert kept["epoch"] == EPOCH - 1 and kept["update"] == 0
    assert all(torch.isfinite(t).all() for t in load_file(run / "model.safetensors").values())
    # The epoch was not trained to its end: the figures end with the update that noticed.
    assert {e["epoch"] for e in read_metrics(run, "epoch")} == {1}
    assert len([e for e in read_metrics(run, "update") if e["epoch"] == EPOCH]) <= (update - 1) // 2
    return event


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_stops_at_once_and_keeps_what_was_finite(
    what: str, small_digits: Path, faulty: Path, run_script: Run, tmp_path: Path
) -> None:
    done = run_script("train.py", *words(small_digits, tmp_path / "run", faulty, method__what=what))
    assert done.returncode == 1, done.stdout + done.stderr
    event = check_stopped(tmp_path / "run", small_digits, done.stderr)
    assert event["gradient_norm"] in ("nan", "inf")
    assert (event["loss_by_rank"]["0"] == ["nan"]) == (what == "loss")


@pytest.mark.parametrize("stage", [0, 1])
def test_one_rank_under_accumulation(
    stage: int, small_digits: Path, faulty: Path, run_script: Run, tmp_path: Path
) -> None:
    more = {"deepspeed__zero_stage": stage, "train__accumulation": 2}
    done = run_script("train.py", *words(small_digits, tmp_path / "run", faulty, **more), ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr
    event = check_stopped(tmp_path / "run", small_digits, done.stderr, 2, 2)
    assert {(part["rank"], part["micro_step"]) for part in event["samples"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    owner = faulty_update(small_digits, 2, 2)[2]
    for rank in (0, 1):
        values = event["loss_by_rank"].get(str(rank), [])
        assert ("nan" in values) == (rank == owner)


@pytest.mark.parametrize(("ranks", "stage", "clip"), [(1, 0, 0), (2, 0, 1), (2, 1, 0)])
def test_skip_leaves_the_update_out(
    ranks: int, stage: int, clip: int, small_digits: Path, faulty: Path, run_script: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = {
        "train__nonfinite": "skip",
        "deepspeed__zero_stage": stage,
        "train__clip": clip,
        "train__schedule": "constant",
    }
    succeed(run_script("train.py", *words(small_digits, run, faulty, **more), ranks=ranks))
    update, images, _ = faulty_update(small_digits, ranks)
    (event,) = events(run)
    assert (event["epoch"], event["update"], event["outcome"]) == (EPOCH, update, "skipped")
    assert {i for part in event["samples"] for i in part["index"]} == images
    assert all(torch.isfinite(t).all() for t in weights(run).values())
    assert all(torch.isfinite(torch.tensor(losses(run))))
    assert len(read_metrics(run, "epoch")) == 3


def test_skip_has_a_limit(small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    """Weights that overflow stay useless: leaving updates out does not go on for ever."""
    run = tmp_path / "run"
    more = {"train__lr": 1e30, "train__optimizer": "sgd", "train__nonfinite": "skip", "train__nonfinite_limit": 3}
    done = run_script("train.py", *options(small_digits, run, **more))
    assert done.returncode == 1 and "train.nonfinite_limit is 3" in done.stderr, done.stdout + done.stderr
    assert [e["outcome"] for e in events(run)] == ["skipped"] * 3 + ["stopped"]
    assert not (run / "model.safetensors").exists() and "no checkpoint was written yet" in done.stderr


@pytest.mark.parametrize("first", [0, 1, 63, 64, 70, 127, 128, 149])
def test_the_first_of_many_updates_is_named(first: int) -> None:
    # No more of an engine is used before an update is judged.
    engine: Any = SimpleNamespace(device="cpu")
    unused: Any = SimpleNamespace(layout=None)
    guard = NonFiniteGuard(TrainConfig(accumulation=2), engine, unused, unused, unused)
    for update in range(150):
        bad = update == first or (update > first and update % 7 == 0)
        losses = [torch.tensor(float(update)), torch.tensor(math.nan if bad else 1.0)]
        progress = Progress(1, 1, update, 150, "finetune", lr=update / 1000)
        guard._note(losses, torch.tensor(2.0) if update % 2 else 2.0, progress)
    assert not guard._all_finite()
    assert guard._updates[int(guard._first) - 1] == (first + 1, first / 1000)
    assert guard._values[0] == first and guard._values[1].isnan() and guard._values[2] == 2
    guard._forget()
    assert guard._all_finite() and not guard._updates
