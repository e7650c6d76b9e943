"""The maps of several runs for the same classes of the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spml_fast.analysis.compare_page import Column
from spml_fast.analysis.explain import Explained, MaskedView, explain
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.progress import watched
from spml_fast.data.image_files import ImageFiles
from spml_fast.methods.ignore import IgnoreOptions
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import MaskOptions
from spml_fast.runs.open import load_classifier, load_run_config, run_classes


@dataclass(frozen=True)
class ComparedRun:
    """A run whose maps are drawn beside another's.

    Attributes:
        title: what it is called on the page.
        config: its own.
        classifier: with its best weights, on the device.
    """

    title: str
    config: Config
    classifier: Classifier


def mask_of(config: Config) -> MaskedView | None:
    """How a run of IGNORE masks images; None for other methods."""
    options = config.method
    if not isinstance(options, IgnoreOptions):
        return None
    mask = MaskOptions(options.choice("cam_threshold"), options.choice("cam_norm"), options.norm_group)
    return MaskedView(mask, options.masked_scale)


def run_titles(runs: Sequence[Path]) -> list[str]:
    """Names of run directories: of their paths as many last parts as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(len(p) for p in parts)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return [printable(name) for name in names]
    return [printable(str(run)) for run in runs]


def run_about(config: Config, classifier: Classifier) -> str:
    """A run's method and BoostLU's alphas, or its head where alpha has no meaning."""
    name = config.method.name
    if not classifier.head.supports_boostlu:
        return f"{name}, head {config.model.head}"
    if classifier.alpha_train == classifier.alpha_eval == 1:
        return f"{name}, without BoostLU"
    return f"{name}, alpha {classifier.alpha_train:g} in training, {classifier.alpha_eval:g} here"


def load_compared(
    runs: Sequence[Path], titles: Sequence[str], classes: list[str], device: torch.device
) -> list[ComparedRun]:
    """Runs with their classifiers.

    Args:
        runs: run directories.
        titles: of each.
        classes: that each must have, in class-id order.
        device: where the classifiers go.

    Raises:
        UserError: a run has other classes, or none of its weights can be read.
    """
    out = []
    for run, title in zip(runs, titles, strict=True):
        config = load_run_config(run)
        if run_classes(run, config) != classes:
            raise UserError(f"--against {run} was trained on other classes; compare runs of the same ones")
        out.append(ComparedRun(title, config, load_classifier(run, config, len(classes), device)[0]))
    return out


def compared_columns(
    runs: Sequence[ComparedRun],
    files: ImageFiles,
    images: Sequence[Explained],
    device: torch.device,
    classes: Sequence[str],
    batch_size: int,
) -> list[Column]:
    """A column for each run, with the classes that the images have.

    Args:
        runs: the compared runs.
        files: the images, once more.
        images: what the first run says of them.
        device: where the classifiers are.
        classes: names for error messages.
        batch_size: images a forward.
    """
    columns = []
    chosen = [image.classes.tolist() for image in images]
    for run in runs:
        section = dataclasses.replace(run.config.eval, batch_size=batch_size)
        alpha = run.classifier.alpha_eval
        explained = explain(
            run.classifier,
            dataclasses.replace(run.config, eval=section),
            files,
            device,
            alpha=alpha,
            classes=classes,
            top=len(chosen[0]),
            first=chosen,
            aspects=[image.aspect for image in images],
            mask=mask_of(run.config),
        )
        with watched(explained, f"explaining by {run.title}", total=len(images)) as counted:
            found = list(counted)
        assert all(np.array_equal(a.classes, b.classes) for a, b in zip(found, images, strict=True))
        # Labels and boxes are the images', whichever run looks at them.
        found = [
            dataclasses.replace(a, known=b.known, labels=b.labels, boxes=b.boxes)
            for a, b in zip(found, images, strict=True)
        ]
        about = run_about(run.config, run.classifier)
        mask = mask_of(run.config)
        trained = run.classifier.alpha_train
        columns.append(Column(run.title, about, alpha, found, mask=mask, mask_alpha=trained))
    return columns


def chosen_files(files: ImageFiles, places: Sequence[int]) -> ImageFiles:
    """Some of the images, in that order."""
    index = np.array(places, np.int64)
    return ImageFiles([files.path(i) for i in places], np.asarray(files.orientation)[index])


def compare_with(
    runs: Sequence[ComparedRun], files: ImageFiles, device: torch.device, classes: Sequence[str], batch_size: int
) -> Callable[[list[int], list[Explained]], list[Column]]:
    """A function that gives the runs' columns for some images, from their places in `files` and what is known of them.

    Args:
        runs: the compared runs.
        files: all images.
        device: where the classifiers are.
        classes: names for error messages.
        batch_size: images a forward at most.
    """

    def columns(places: list[int], images: list[Explained]) -> list[Column]:
        chosen = chosen_files(files, places)
        return compared_columns(runs, chosen, images, device, classes, min(batch_size, len(places)))

    return columns
