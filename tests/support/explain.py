"""Runs with random weights and images with maps, for tests of pages of maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from spml_fast.analysis import explain
from spml_fast.analysis.explain import Explained
from spml_fast.cli import explain as explain_command
from spml_fast.cli.parse import parse_config
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.recipe import to_yaml
from tests.support.paths import ROOT

NAMES = ["a $x_1^2$ b", "traffic light", "\u732b\U0001f408\u200b\ue000", "\u0441\u043e\u0431\u0430\u043a\u0430"]
NAMES += ["W" * 60, r"\frac{1}", "$", "{}<b>", "x", "y"]


def call(*arguments: object) -> int:
    """Run the command in this process; a user error stays an exception."""
    return int(explain_command.main([str(a) for a in arguments]))


def make_run(folder: Path, data: Path, recipe: str, scale: float, *more: str, seed: int = 3) -> Path:
    """A run with random weights."""
    folder.mkdir()
    arguments = ["--config", str(ROOT / "launch" / "configs" / recipe), "--data.dir", str(data)]
    config = parse_config([*arguments, "--train.precision", "fp32", "--eval.batch_size", "32", *more])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    torch.manual_seed(seed)
    classifier = Classifier(config.model, 10, config.data.image_size)
    if recipe == "digits.yaml":
        with torch.no_grad():
            classifier.get_parameter("head.weight").mul_(scale)
    save_weights(folder / "model.safetensors", classifier, {})
    return folder


def example(kind: explain.Kind = "evidence", scale: float = 1.0, **more: Any) -> Explained:
    """An image of 8 x 8 pixels with the maps of classes 0 and 3, whose peaks lie at the upper left and lower right."""
    maps = np.array([[[4, -1], [0, -3]], [[0, 1], [1, 2]]], np.float32) * np.float32(scale)
    values: dict[str, Any] = {
        "path": "a.jpg",
        "image": np.full((8, 8, 3), 90, np.uint8),
        "aspect": 1.5,
        "classes": np.array([0, 3]),
        "probability": np.array([0.9, 0.2]),
        "logit": np.array([2.2, -1.4], np.float32),
        "plain": np.array([1.0, -1.4], np.float32),
        "maps": maps,
        "kind": kind,
        "attention": np.abs(maps) / 10 if kind == "attention" else None,
        "predicted": (0,),
        **more,
    }
    return Explained(**values)
