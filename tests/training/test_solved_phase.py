"""Runs whose linear phase solves for its head: one rank and two, resumed, interrupted, with damaged images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spml_fast.core.config import RunConfig
from spml_fast.models.classifier import Classifier
from spml_fast.prepare.datasets.digits import prepare_digits
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import load_run_config
from spml_fast.training.linear_probe import DEFAULT_PENALTY, PENALTIES
from spml_fast.training.save_times import SaveTimes
from spml_fast.training.saving import RunCheckpoints
from spml_fast.training.signals import Interrupted
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

RECIPE = ROOT / "launch" / "configs" / "digits.yaml"


def options(data: Path, run: Path, **more: object) -> list[str]:
    """Options of a short run with a solved linear phase; `more` maps section__field to a value."""
    base: dict[str, object] = {
        "config": RECIPE,
        "data__dir": data,
        "run__dir": run,
        "run__keep": 9,
        "method": "an",
        "model__alpha_train": 1,
        "train__linear": "solve",
        "train__linear_epochs": "null",
        "train__epochs": 1,
        "train__best_of": "run",
        "train__precision": "fp32",
        "eval__batch_size": 32,
        "deepspeed__tensorboard": "false",
    }
    base |= more
    return [word for key, value in base.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def succeed(done: object) -> str:
    """The output of a run that must have ended well."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]  # type: ignore[attr-defined]
    return str(done.stdout)  # type: ignore[attr-defined]


def state(run: Path, tag: str) -> dict[str, torch.Tensor]:
    """The classifier of a checkpoint."""
    values = torch.load(run / "checkpoints" / tag / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    return {k.removeprefix("classifier."): v for k, v in values.items() if k.startswith("classifier.")}


@pytest.fixture(scope="module")
def finished(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("solved") / "run"
    return run, succeed(warm.run_script("train.py", *options(small_digits, run)))


def test_it_says_what_was_done(finished: tuple[Path, str]) -> None:
    run, out = finished
    assert "one pass over 252 images for their mean features (96 numbers each, " in out
    epoch, tuned = read_metrics(run, "epoch")
    assert (epoch["phase"], epoch["epoch"], epoch["linear"], tuned["phase"]) == ("linear", 1, "solve", "finetune")
    tried = epoch["penalties"]
    assert [one["penalty"] for one in tried] == list(PENALTIES)
    assert all(one["gradient"] < 1e-5 and 0 < one["evaluations"] < 1000 for one in tried)
    best = max(tried, key=lambda one: one["val_map"])
    assert epoch["penalty"] == best["penalty"] and epoch["loss"] == best["loss"]
    assert f"{best['penalty']:g}: {best['val_map']:.2f}" in out and f"{best['penalty']:g} is taken" in out
    assert "linear epoch 1/1 | loss" in out and epoch["images_per_second"] > 0


def test_only_the_head_changed(finished: tuple[Path, str]) -> None:
    run, _ = finished
    config, solved = load_run_config(run), state(run, "linear-e0001-u000000-w1")
    torch.manual_seed(config.run.seed)
    fresh = Classifier(config.model, 10, config.data.image_size).state_dict()
    backbone = [k for k in solved if k.startswith("backbone.")]
    # BatchNorm's statistics too.
    assert backbone and all(torch.equal(solved[k], fresh[k]) for k in backbone)
    assert float(solved["head.weight"].abs().max()) > 1


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_find_the_same_head(
    finished: tuple[Path, str], small_digits: Path, run_script: Run, tmp_path: Path, stage: int
) -> None:
    """Also where no rank has whole parameters (ZeRO stage 3)."""
    run, two = finished[0], tmp_path / "two"
    succeed(run_script("train.py", *options(small_digits, two, deepspeed__zero_stage=stage), ranks=2))
    one, tag = state(run, "linear-e0001-u000000-w1"), "linear-e0001-u000000-w2"
    both = state(two, tag) if stage == 0 else load_file(RunLayout(two).checkpoints.weights(tag))
    assert one.keys() == both.keys()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-3)
    epochs = [read_metrics(path, "epoch")[0] for path in (run, two)]
    assert epochs[0]["penalty"] == epochs[1]["penalty"]
    assert epochs[0]["loss"] == pytest.approx(epochs[1]["loss"], rel=1e-6)


def test_resumed_after_it_the_run_is_the_same(
    finished: tuple[Path, str], small_digits: Path, run_script: Run, tmp_path: Path
) -> None:
    run, again = finished[0], tmp_path / "run"
    shutil.copytree(run, again)
    (again / "results.json").unlink()
    for name in ("newest.json", "finetune-e0001-u000000-w1"):
        path = again / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out = succeed(run_script("train.py", *options(small_digits, again)))
    assert "resuming after linear epoch 1, the last" in out and "one pass over" not in out
    results = [json.loads((path / "results.json").read_text()) for path in (run, again)]
    assert results[0]["alpha"] == results[1]["alpha"]
    ends = [load_file(path / "model.safetensors") for path in (run, again)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])

    trained = run_script("train.py", *options(small_digits, again, train__linear="sgd", train__linear_epochs=2))
    assert trained.returncode == 0, "fine-tuning has begun, so that the linear phase does not matter any more"


def test_a_head_that_was_trained_by_steps_is_no_solution(
    finished: tuple[Path, str], small_digits: Path, run_script: Run, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished[0], again)
    for name in ("newest.json", "finetune-e0001-u000000-w1"):
        path = again / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run_script("train.py", *options(small_digits, again, train__linear="sgd", train__linear_epochs=2))
    assert done.returncode == 1
    assert "train.linear cannot change from solve to sgd within the linear phase" in done.stderr


def test_damaged_images_are_left_out_and_no_split_chooses(run_script: Run, tmp_path: Path) -> None:
    """Without a validation split the default penalty is taken; an average of the weights is the solution too."""
    manifest = prepare_digits(tmp_path / "digits", sizes={"train": 40, "val": 8, "test": 8})
    heads = []
    for number, damage in enumerate((False, True)):
        if damage:
            Path(manifest.split("train").path(7)).write_bytes(b"no image")
        run = tmp_path / f"run{number}"
        more: dict[str, object] = {"data__val_split": "null", "data__bad_images": "replace", "train__ema_decay": 0.9}
        out = succeed(run_script("train.py", *options(tmp_path / "digits", run, train__batch_size=8, **more)))
        assert f"solved with penalty {DEFAULT_PENALTY:g}, since no validation split chooses one" in out
        epoch = read_metrics(run, "epoch")[0]
        assert epoch["penalty"] == DEFAULT_PENALTY and len(epoch["penalties"]) == PENALTIES.index(DEFAULT_PENALTY) + 1
        saved = torch.load(
            run / "checkpoints" / "linear-e0001-u000000-w1" / "mp_rank_00_model_states.pt", weights_only=False
        )
        head = saved["module"]["classifier.head.weight"]
        assert torch.equal(saved["spml_fast"]["ema"]["head.weight"], head)
        heads.append(head)
    assert not torch.allclose(*heads, atol=1e-3), "the damaged image was left out"


def test_a_signal_ends_it_between_two_batches(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    with pytest.raises(Interrupted, match="stopped by SIGTERM: nothing was saved yet"):  # noqa: SIM117
        with SaveTimes(RunConfig(), tmp_path, RunCheckpoints(layout, 1, {}), program=False) as saves:
            saves.stop_between()
            os.kill(os.getpid(), signal.SIGTERM)
            # Another thread takes the signal, sooner or later.
            end = time.monotonic() + 60
            while time.monotonic() < end:
                saves.stop_between()
                time.sleep(0.001)
