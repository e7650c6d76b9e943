"""Which options make no sense together, and that sensible ones are not spoken of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import ModelConfig
from spml_fast.models.classifier import Classifier
from spml_fast.training import advice
from spml_fast.training.advice import warnings_of
from spml_fast.training.setup import load_data, make_classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks() -> dict[int, Classifier]:
    model = ModelConfig(backbone="test_resnet", pretrained=False)
    return {size: make_classifier(model, 10, size, CPU) for size in (16, 64, 448)}


def told(networks: dict[int, Classifier], data: Path, *words: str, updates: int = 1000) -> list[str]:
    config = parse_config(["--data.dir", str(data), *words], "digits")
    network = networks[config.data.image_size]
    network.alpha_train = config.model.alpha_train
    return warnings_of(config, load_data(config), network, updates)


RANDOM = ("--model.pretrained", "false")
# Nothing is loaded: the network is made apart, and what it starts from is an option here.
PRETRAINED = ("--model.weights", "weights.safetensors", "--train.lr", "5e-5")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*RANDOM, "--train.lr", "1e-5"), "train.lr 1e-05 is for pretrained weights"),
        ((*RANDOM, "--model.freeze_bn", "true"), "model.freeze_bn keeps the BatchNorm statistics of random weights"),
        ((*RANDOM, "--train.linear_epochs", "2"), "train.linear_epochs 2 trains a head on random features"),
        ((*RANDOM, "--model.freeze", "[conv1*]"), "model.freeze keeps random weights"),
        ((*PRETRAINED, "--train.lr", "3e-3"), "train.lr 0.003 is for random weights"),
        ((*PRETRAINED, "--train.batch_size", "4"), "BatchNorm normalises by 4 images at a time"),
        ((*PRETRAINED, "--train.accumulation", "8"), "BatchNorm normalises by 4 images at a time"),
        (("--train.batch_size", "193"), "train.batch_size 193 is larger than the training split (192 images)"),
        (("--data.image_size", "16"), "data.image_size 16 leaves test_resnet a feature map of 1 x 1"),
        (("--data.image_size", "448"), "data.image_size 448 only enlarges the images: nine in ten have 64 px"),
        (("--data.val_split", "null", "--train.patience", "3"), "train.patience does nothing"),
        (("--data.val_split", "null", "--train.stop_after_drop", "3"), "train.stop_after_drop does nothing"),
        (("--train.ema_decay", "0.9997"), "train.ema_decay 0.9997 averages over more updates than the run has (1000)"),
        (("--method", "an"), "method an with model.alpha_train 5"),
    ],
)
def test_each_is_one_sentence(
    networks: dict[int, Classifier], small_digits: Path, words: tuple[str, ...], sentence: str
):
    (line,) = told(networks, small_digits, *words)
    assert line.startswith(sentence) and "\n" not in line


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--method", "an", "--model.alpha_train", "1"),
        PRETRAINED,
        (*PRETRAINED, "--train.batch_size", "4", "--model.freeze_bn", "true", "--train.linear_epochs", "4"),
        ("--train.optimizer", "sgd", "--train.lr", "1e-5"),
        ("--train.ema_decay", "0.99", "--train.patience", "3"),
    ],
)
def test_sensible_options_are_not_spoken_of(
    networks: dict[int, Classifier], small_digits: Path, words: tuple[str, ...]
):
    assert told(networks, small_digits, *words) == []


def test_few_images_to_validate(networks: dict[int, Classifier], small_digits: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "FEW_TO_VALIDATE", 61)
    (line,) = told(networks, small_digits)
    assert line.startswith("the validation split has 60 images")
