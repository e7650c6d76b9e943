"""Runs to be exported, and what their exports must give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from spml_fast.analysis.predict import predict
from spml_fast.cli.parse import parse_config
from spml_fast.data.image_files import ImageFiles
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.open import load_classifier, load_run_config, make_eval_loader
from spml_fast.runs.recipe import to_yaml

CPU = torch.device("cpu")
CLASSES = [str(i) for i in range(10)]


def make_run(folder: Path, *options: str, data: Path | None = None) -> Path:
    """A run directory with random weights, and BatchNorm statistics of noise."""
    folder.mkdir(parents=True)
    given = ["--data.dir", str(data or folder / "gone"), "--data.image_size", "64", "--model.pretrained", "false"]
    # Exports compute in fp32; `auto` takes bf16 on processors with AMX.
    given += ["--train.precision", "fp32"]
    config = parse_config(["--run.dir", str(folder), *given, *options])
    torch.manual_seed(0)
    classifier = Classifier(config.model, len(CLASSES), config.data.image_size)
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # timm starts the last of a block at 0, which would hide what is before it.
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = None
    with torch.no_grad():
        classifier.train()(torch.randn(8, 3, 64, 64))
        if classifier.head.supports_boostlu:
            # Logits of different images differ by far more than rounding.
            weight = classifier.head.weight
            assert isinstance(weight, torch.Tensor)
            weight.mul_(10)
    section = dataclasses.replace(config.data, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    config = dataclasses.replace(config, data=section)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{c}\n" for c in CLASSES), encoding="utf-8")
    save_weights(folder / "model.safetensors", classifier, {"epoch": "1", "val_map": "50"})
    return folder


def logits_of(run: Path, alpha: float, paths: list[str]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Logits of the run's own classifier for its own views, and predict.py's probabilities, [n, C] each."""
    config = load_run_config(run)
    classifier, _ = load_classifier(run, config, len(CLASSES), CPU)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=len(paths)))
    files = ImageFiles(paths, np.ones(len(paths), np.uint8))
    (batch,) = make_eval_loader(config, files, classifier, CPU)
    with torch.no_grad():
        logits = classifier(batch.views["eval"], alpha=alpha).logits.numpy()
    assert logits.std(0).min() > 0.1, "a model for which all images are the same shows nothing"
    predictions = list(predict(classifier, config, files, CPU, alpha=alpha, classes=CLASSES))
    return logits, np.stack([p.probability[np.argsort(p.classes)] for p in predictions])


def pillow_images(paths: list[str], side: int) -> npt.NDArray[np.float32]:
    """What the documentation tells users to do: float32 [n, 3, S, S], 0..255."""
    upright = [ImageOps.exif_transpose(Image.open(p)).convert("RGB") for p in paths]
    images = [p.resize((side, side), Image.Resampling.BILINEAR) for p in upright]
    return np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) for p in images])
