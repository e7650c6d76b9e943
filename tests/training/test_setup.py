"""What a run needs before its first update."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.runs.layout import RunLayout
from spml_fast.training.setup import (
    Phase,
    load_data,
    make_classifier,
    make_phases,
    make_run_dir,
    make_truth,
    resolve_epochs,
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
    found = resolve_epochs(config, images).train
    assert (found.epochs, found.linear_epochs) == (epochs, epochs)


def test_epochs_that_were_given_stay(small_digits: Path) -> None:
    config = configured(small_digits, "--train.epochs", "5", "--train.linear_epochs", "0")
    assert resolve_epochs(config, 2000) == config
    mixed = resolve_epochs(configured(small_digits, "--train.epochs", "5", "--train.linear_epochs", "null"), 2000)
    assert (mixed.train.epochs, mixed.train.linear_epochs) == (5, 8)
