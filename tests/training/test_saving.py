"""Whole runs and their checkpoints: what is refused, damage, full disks, going back, another batch size."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import spml_fast
from spml_fast.cli import checkpoints as checkpoints_command
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.runs import weights_check
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.weights_check import check_weights
from spml_fast.training.best_weights import damaged_best, recover, repair
from spml_fast.training.checkpoint import list_checkpoints
from spml_fast.training.resume import find_resume
from tests.support.paths import ROOT
from tests.support.payload import Payload
from tests.support.runs import Run, environment, rank_variables, read_metrics
from tests.support.warm import WARM
from tests.training.test_training import options, succeed

MIDDLE = "finetune-e0000-u000005-w1"
ENDS = [f"finetune-e000{epoch}-u000000-w1" for epoch in (1, 2)]
LONG: dict[str, Any] = {"run__keep": 9, "run__save_updates": 5, "train__schedule": "one_cycle"}
STATES = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def whole(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with three of its checkpoints: within the first epoch, and after each."""
    run = tmp_path_factory.mktemp("saving") / "whole"
    words = options(small_digits, run, **LONG)
    succeed(WARM.run([str(ROOT / "launch" / "train.py"), *words], rank_variables(1), 600, environment()))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def states(run: Path, tag: str) -> Path:
    """DeepSpeed's file of a checkpoint."""
    return run / "checkpoints" / tag / STATES


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def snapshot(run: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def refused(done: Any) -> str:
    """The one sentence of a command that must have failed."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return str(done.stderr)


def test_another_run_is_refused_and_leaves_everything_as_it_was(run: Path, small_digits: Path, run_script: Run) -> None:
    before = snapshot(run)
    more = {"method": "an", "data__image_size": 32, "train__epochs": 1}
    text = refused(run_script("train.py", *options(small_digits, run, **more)))
    assert "(method.name ll_r -> an, data.image_size 64 -> 32); give another --run.dir" in text
    text = refused(run_script("train.py", *options(small_digits, run, train__epochs=1)))
    assert "train.epochs is 1, but checkpoint" in text and "has 2 epochs behind it" in text
    text = refused(run_script("train.py", *options(small_digits, run, train__optimizer="sgd")))
    assert "train.optimizer cannot change from adamw to sgd" in text
    assert snapshot(run) == before
    # In a folder that is no run nothing is made.
    held = snapshot(small_digits)
    assert "is no run directory: it holds images" in refused(
        run_script("train.py", *options(small_digits, small_digits, run__dir=small_digits))
    )
    assert snapshot(small_digits) == held and not (small_digits / "checkpoints").exists()


def test_a_run_that_goes_back_ends_where_it_ended(whole: Path, run: Path, small_digits: Path, run_script: Run) -> None:
    """From within an epoch of the same run: weights to the byte, figures of the whole epoch."""
    back = run / "checkpoints" / MIDDLE
    out = succeed(run_script("train.py", *options(small_digits, run, run__resume=back, **LONG)))
    assert f"resuming at epoch 1, update 6 (from {back})" in out
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    first, second = (read_metrics(path, "epoch")[-2:] for path in (whole, run))
    for name in ("loss", "val_map", "lr", "selected_count", "hidden_positive_count"):
        assert [e[name] for e in first] == [e[name] for e in second], name
    # What was there is written over by nothing that is not whole.
    assert {f"{tag}-2" for tag in ENDS} < {path.name for path in (run / "checkpoints").iterdir()}


def test_another_batch_size_and_schedule_go_on_in_the_epoch(run: Path, small_digits: Path, run_script: Run) -> None:
    """160 of 192 images are done: two updates of 16 are left of 12, and the schedule ends with the run."""
    more = {"train__batch_size": 16, "train__schedule": "cosine", "train__lr": 1e-3}
    back = run / "checkpoints" / MIDDLE
    words = options(small_digits, run, **{**LONG, **more}, run__resume=back)
    out = succeed(run_script("train.py", *words))
    assert "resuming at epoch 1, update 11 (from" in out
    assert "train.batch_size 32 -> 16; " in out and "train.schedule one_cycle -> cosine" in out
    updates = read_metrics(run, "update")[-12:]
    assert [(e["epoch"], e["update"]) for e in updates] == [(1, 11), *((2, 12 + u) for u in range(1, 12))]
    epochs = read_metrics(run, "epoch")[-2:]
    assert epochs[-1]["lr"] == pytest.approx(0, abs=1e-9) and updates[-1]["lr"] > 0
    mark = json.loads((run / "checkpoints" / f"{ENDS[0]}-2" / "mark.json").read_text())
    assert mark["update"] == 0 and mark["serial"] > 4


def test_damage_is_found_named_and_passed_over(
    whole: Path, run: Path, small_digits: Path, run_script: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(states(run, ENDS[1]))
    flip(run / "model.safetensors")
    (run / "checkpoints" / "newest.json").write_text("{")
    (run / "checkpoints" / "finetune-e0007-u000000-w1").mkdir()
    assert checkpoints_command.main([str(run)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f"damaged: {STATES} has another checksum" in lines[ENDS[1]] and "best" in lines[ENDS[1]]
    assert lines[ENDS[0]].split()[1:] == ["finetune", "1", "4.6", "MB", "whole"]
    assert lines[MIDDLE].split()[1:4] == ["finetune", "0", "5"] and lines[MIDDLE].endswith("whole")
    assert lines["finetune-e0007-u000000-w1"].endswith("unfinished")
    assert "damaged: " in lines["model.safetensors"]
    out = succeed(run_script("train.py", *options(small_digits, run, **LONG)))
    assert "newest.json is damaged" in out and f"{ENDS[1]} is damaged ({STATES} has another checksum" in out
    assert "resuming from finetune-e0001-u000005-w1, the newest whole checkpoint" in out
    assert "resuming at epoch 2, update 6 (from" in out
    assert (
        f"does not hold the best weights of that time (its checksum differs); written again from {ENDS[0]}"[:60] in out
    )
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert checkpoints_command.main([str(run)]) == 0


def test_lost_weights_come_back_byte_for_byte(whole: Path, run: Path, small_digits: Path, run_script: Run) -> None:
    """A finished run trains nothing; its weights are compared before the test, and written again."""
    flip(run / "model.safetensors")
    epochs = len(read_metrics(run, "epoch"))
    out = succeed(run_script("train.py", *options(small_digits, run, **LONG)))
    assert "nothing left to train" in out and f"written again from checkpoint {ENDS[1]}" in out
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(read_metrics(run, "epoch")) == epochs


COMMANDS = {
    "evaluate.py": ["--run", "RUN"],
    "predict.py": ["--run", "RUN", "IMAGE"],
    "export.py": ["--run", "RUN", "--format", "safetensors"],
}


def test_damaged_weights_are_not_used_and_written_again_without_the_data(
    whole: Path, run: Path, small_digits: Path, run_script: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit: every command that opens the run refuses it, and `checkpoints --repair` puts it right."""
    flip(run / "model.safetensors")
    sentence = (
        f"{run}/model.safetensors is damaged (its checksum is not the one that was recorded when it was written); "
        f"spml-fast checkpoints {run} --repair writes it again from the best checkpoint"
    )
    image = next(small_digits.rglob("*.jpg"))
    for script, words in COMMANDS.items():
        given = [{"RUN": run, "IMAGE": image}.get(word, word) for word in words]
        assert refused(run_script(script, *given)) == f"error: {sentence}\n", script
    with pytest.raises(UserError) as raised:
        spml_fast.load(run)
    assert str(raised.value) == sentence
    assert checkpoints_command.main([str(run), "--repair"]) == 0
    said = capsys.readouterr()
    assert f"written again from checkpoint {ENDS[1]}" in said.err and "model.safetensors" in said.out
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert spml_fast.load(run).classes == [str(n) for n in range(10)]
    assert checkpoints_command.main([str(run), "--repair"]) == 0
    assert capsys.readouterr().err == f"{run}/model.safetensors is whole\n" and not (run / ".lock").exists()


def test_which_weights_are_a_runs_own(whole: Path, run: Path) -> None:
    layout = RunLayout(run)
    check_weights(layout)
    # A save that was killed before the weights got their name: the record is newer than the file.
    best = layout.checkpoints.best
    values = json.loads(best.read_text())
    values["weights"]["crc32"] = "00000000"
    best.write_text(json.dumps(values))
    check_weights(layout)
    best.write_text("{")
    check_weights(layout)
    layout.weights.unlink()
    with pytest.raises(UserError, match=r"is damaged \(it is missing\); spml-fast checkpoints"):
        check_weights(layout)
    # No record, no comparison: a copy without checkpoints, or a run of a version before 0.2.0.
    shutil.copyfile(whole / "model.safetensors", layout.weights)
    flip(layout.weights)
    shutil.rmtree(layout.checkpoints.folder)
    check_weights(layout)
    with pytest.raises(UserError, match=r"has no checkpoint to write model\.safetensors from"):
        repair(layout)


def test_a_file_that_is_replaced_while_it_is_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a training does that saves better weights: its old record may be gone before the new file was read."""
    layout = RunLayout(run)
    before = weights_check.recorded_weights(layout)
    layout.weights.write_bytes(b"better")
    better = {file_record(layout.weights)}
    answers = [before, better]
    monkeypatch.setattr(weights_check, "recorded_weights", lambda _: answers.pop(0) if answers else better)
    check_weights(layout)


def test_weights_that_stand_in_for_lost_ones_can_be_used(run: Path, small_digits: Path, run_script: Run) -> None:
    """Weights and their checkpoint are gone: the newest checkpoint's are used, and known as the run's."""
    layout = RunLayout(run)
    flip(layout.weights)
    mark = json.loads(layout.checkpoints.position(ENDS[1]).read_text())
    flip(states(run, ENDS[1]))
    with pytest.raises(UserError, match="no checkpoint has them any more"):
        repair(layout)
    (layout.checkpoints.folder / ENDS[1] / "mark.json").unlink()
    older = layout.checkpoints.position(ENDS[0])
    values = json.loads(older.read_text())
    older.write_text(json.dumps(values | {"best": mark["best"], "serial": 99}))
    with pytest.raises(UserError, match="is damaged"):
        check_weights(layout)
    resume = find_resume(layout.checkpoints.folder, "auto")
    assert resume is not None and resume.checkpoint.position.tag == ENDS[0]
    assert recover(layout, resume.checkpoint, "resnet18", 1.0).lost
    check_weights(layout)
    assert damaged_best(layout, list_checkpoints(layout.checkpoints.folder)) is None


def test_a_new_run_takes_over_the_best_weights_of_a_path(
    whole: Path, small_digits: Path, run_script: Run, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    words = options(small_digits, new, **LONG, run__resume=whole)
    assert "nothing left to train" in succeed(run_script("train.py", *words))
    assert (new / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((new / "results.json").read_text())["best_epoch"] == 2


@pytest.mark.parametrize("place", ["own", "path"])
def test_a_checkpoint_runs_no_code(place: str, run: Path, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    """Even one whose maker wrote fitting checksums."""
    made, path = tmp_path / "made", states(run, ENDS[1])
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "payload": Payload(made)}, path)
    mark = path.parent / "mark.json"
    values = json.loads(mark.read_text())
    values["files"][STATES] = asdict(file_record(path))
    mark.write_text(json.dumps(values))
    new = run if place == "own" else tmp_path / "new"
    resume = "auto" if place == "own" else path.parent
    text = refused(run_script("train.py", *options(small_digits, new, **LONG, run__resume=resume)))
    assert str(path) in text and "it was not loaded, since such a file can run code" in text
    assert not made.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_full_disk_leaves_the_last_checkpoint(run: Path, small_digits: Path, run_script: Run) -> None:
    """The file of the best weights lies on a device that is full."""
    before = {path.name for path in (run / "checkpoints").iterdir()}
    partial = run / "model.safetensors.partial"
    partial.symlink_to("/dev/full")
    more = {**LONG, "run__save_updates": 0, "run__resume": run / "checkpoints" / MIDDLE}
    words = options(small_digits, run, **more)
    text = refused(run_script("train.py", *words))
    assert f"checkpoint {run}/checkpoints/{ENDS[0]}-2 cannot be written: no space left on /" in text
    assert f"7 MB needed; checkpoint {MIDDLE} is kept" in text and os.strerror(errno.ENOSPC) not in text
    assert {path.name for path in (run / "checkpoints").iterdir()} == before and not partial.is_symlink()
    succeed(run_script("train.py", *words))
    assert f"{ENDS[1]}-2" in {path.name for path in (run / "checkpoints").iterdir()}
