"""What a run needs before its first update."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.runs.layout import RunLayout
from spml_fast.training.setup import (
    Phase,
    load_data,
    make_classifier,
    make_phases,
    make_run_dir,
    make_truth,
    resolve_phases,
    resolved_config,
)

CPU = torch.device("cpu")


def configured(data: Path, *words: str) -> Config:
    model = ["--model.backbone", "test_resnet", "--model.pretrained", "false", "--data.image_size", "64"]
    return parse_config(["--method", "ll_r", "--data.dir", str(data), *model, *words])


def test_phases(small_digits: Path) -> None:
    assert make_phases(configured(small_digits, "--train.epochs", "3")) == [Phase("finetune", 3)]
    config = configured(small_digits, "--train.epochs", "3", "--train.linear_epochs", "2")
    assert make_phases(config) == [Phase("linear", 2), Phase("finetune", 3)]


def test_data(small_digits: Path) -> None:
    data = load_data(configured(small_digits))
    assert (data.train.name, data.val.name, data.test.name) == ("train", "val", "test")
    assert data.labels is data.train.observed
    assert load_data(configured(small_digits, "--data.val_split", "null")).val is None
    known = load_data(configured(small_digits, "--method", "full"))
    assert known.labels is known.train.known
    every = configured(small_digits, "--method", "partial", "--data.train_labels", "known")
    assert (data := load_data(every)).labels is data.train.known and make_truth(every, data.train, CPU) is None
    with pytest.raises(UserError, match="'dev'"):
        load_data(configured(small_digits, "--data.val_split", "dev"))


def test_truth_is_what_training_may_not_see(small_digits: Path) -> None:
    config = configured(small_digits)
    truth = make_truth(config, load_data(config).train, CPU)
    assert truth is not None and set(truth.rows(torch.arange(4)).unique().tolist()) == {0, 1}
    full = configured(small_digits, "--method", "full")
    assert make_truth(full, load_data(full).train, CPU) is None


def test_run_directory(small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(small_digits, "--run.dir", str(tmp_path / "a" / "run"))
    assert make_run_dir(config, "digits") == tmp_path / "a" / "run"
    layout = RunLayout(tmp_path / "a" / "run")
    assert set(layout.folder.iterdir()) == {layout.checkpoints.folder, layout.lock}
    monkeypatch.chdir(tmp_path)
    new = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=None))
    folders = [str(make_run_dir(new, "digits")) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"runs/digits-ll_r-\d{8}-\d{6}(-\d)?", folder) for folder in folders)
    (tmp_path / "file").touch()
    blocked = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "file" / "run")))
    with pytest.raises(UserError, match=r"run directory .*file/run cannot be written"):
        make_run_dir(blocked, "digits")


def test_resolved_configuration(small_digits: Path, tmp_path: Path) -> None:
    config = configured(small_digits, "--data.std", "[0.1,0.2,0.3]")
    data = load_data(config)
    classifier = make_classifier(config.model, data.manifest.num_classes, 64, CPU)
    resolved = resolved_config(config, data, tmp_path, classifier, None)
    assert resolved.data.mean == classifier.input_normalisation()[0] and resolved.data.std == [0.1, 0.2, 0.3]
    assert resolved.data.dir == str(small_digits.resolve()) and resolved.run.dir == str(tmp_path)
    assert dataclasses.replace(resolved, data=config.data, run=config.run) == config


def test_synchronised_statistics_need_gpus(small_digits: Path) -> None:
    config = configured(small_digits, "--model.sync_bn", "true")
    with pytest.raises(UserError, match=r"model\.sync_bn needs GPUs"):
        make_classifier(config.model, 10, 64, CPU)


@pytest.mark.parametrize(
    ("images", "epochs"), [(1, 30), (148, 29), (200, 25), (2000, 8), (8000, 4), (14_000, 3), (9_000_000, 3)]
)
def test_epochs_by_the_number_of_images(small_digits: Path, images: int, epochs: int) -> None:
    config = configured(small_digits, "--train.epochs", "null", "--train.linear_epochs", "null")
    found = resolve_phases(config, images)[0].train
    assert (found.epochs, found.linear_epochs) == (epochs, epochs)


def test_epochs_that_were_given_stay(small_digits: Path) -> None:
    config = configured(small_digits, "--train.epochs", "5", "--train.linear_epochs", "0")
    assert resolve_phases(config, 2000) == (config, [])
    mixed, _ = resolve_phases(configured(small_digits, "--train.epochs", "5", "--train.linear_epochs", "null"), 2000)
    assert (mixed.train.epochs, mixed.train.linear_epochs) == (5, 8)


NULL = ("--train.linear_epochs", "null")


@pytest.mark.parametrize(
    ("words", "way", "epochs", "note"),
    [
        (("--train.linear", "solve", *NULL), "solve", 1, None),
        (("--train.linear", "solve", "--train.linear_epochs", "1"), "solve", 1, None),
        (("--train.linear", "sgd", *NULL), "sgd", 8, None),
        (("--train.linear", "auto", *NULL), "solve", 1, "is solved for, in one pass"),
        (("--train.linear", "auto", "--train.linear_epochs", "0"), "sgd", 0, None),
        (("--train.linear", "auto", "--train.linear_epochs", "4"), "sgd", 4, "train.linear_epochs asks for 4 epochs"),
        (("--train.linear", "auto", *NULL, "--method", "ignore"), "sgd", 8, "method ignore has no loss that"),
        (("--train.linear", "auto", *NULL, "--model.head", "query2label"), "sgd", 8, "head query2label reads more"),
        (
            ("--train.linear", "auto", *NULL, "--train.sampling", "repeat_factor"),
            *("sgd", 8, "train.sampling repeat_factor weighs images"),
        ),
    ],
)
def test_how_the_linear_phase_is_trained(
    small_digits: Path, words: tuple[str, ...], way: str, epochs: int, note: str | None
) -> None:
    config, notes = resolve_phases(configured(small_digits, *words), 2000)
    assert (config.train.linear, config.train.linear_epochs) == (way, epochs)
    assert len(notes) == (note is not None) and (note or "") in "".join(notes)
    first = make_phases(config)[0]
    assert first == (Phase("linear", epochs, solved=way == "solve") if epochs else Phase("finetune", 10))
    # The resolved recipe repeats it.
    assert resolve_phases(config, 99) == (config, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "gr"), "method gr has no loss that a head can be solved for"),
        (("--model.head", "query2label"), "head query2label reads more than the mean feature"),
        (("--train.sampling", "repeat_factor"), "train.sampling repeat_factor weighs images differently"),
    ],
)
def test_what_cannot_be_solved_for_is_refused(small_digits: Path, words: tuple[str, ...], message: str) -> None:
    config = configured(small_digits, "--train.linear", "solve", *NULL, *words)
    with pytest.raises(UserError, match=f"train.linear solve cannot be used here: {message}; set train.linear to sgd"):
        resolve_phases(config, 2000)


@pytest.mark.parametrize("epochs", [0, 4])
def test_one_pass_has_no_number_of_epochs(epochs: int) -> None:
    with pytest.raises(
        UserError, match=rf"train\.linear solve is one pass, and train\.linear_epochs is {epochs}; .*null"
    ):
        TrainConfig(linear="solve", linear_epochs=epochs)
