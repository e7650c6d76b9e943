"""Opens a run directory for use: configuration, data, classifier with its best weights."""

from __future__ import annotations

from pathlib import Path

import torch

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import load_weights
from spml_fast.prepare.datasets.digits import prepare_digits
from spml_fast.runs.recipe import load_config


def run_classes(run: Path, config: Config) -> list[str]:
    """Class names of a run in class-id order: from the run directory or, where it has none, from its data set.

    Raises:
        UserError: neither has them.
    """
    path = run / "classes.txt"
    if not path.is_file():
        if config.data.dir is None or not Path(config.data.dir, "manifest.json").is_file():
            raise UserError(
                f"{run} has no classes.txt, and its data set {config.data.dir} is not there either; "
                f"copy classes.txt of the data set to {run}"
            )
        return Manifest(config.data.dir, config.data.image_root).classes
    try:
        classes = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy classes.txt of the data set there") from error
    if not classes:
        raise UserError(f"{path} is empty; copy classes.txt of the data set there")
    return classes


DIGITS_DIR = "data/digits"


def open_data(config: Config) -> Manifest:
    """The Manifest of a run; builds the embedded digit scenes on first use (one process builds, others wait)."""
    if config.data.dir is not None:
        return Manifest(config.data.dir, config.data.image_root)
    return prepare_digits(Path(DIGITS_DIR))


def input_normalisation(config: Config, classifier: Classifier) -> tuple[list[float], list[float]]:
    """Channel mean and standard deviation: as configured, or the backbone's."""
    mean, std = classifier.input_normalisation()
    return config.data.mean or mean, config.data.std or std


def make_eval_loader(config: Config, split: Split, classifier: Classifier, device: torch.device) -> EvalLoader:
    """The loader that training and stand-alone evaluation share."""
    mean, std = input_normalisation(config, classifier)
    return EvalLoader(split, config.data, batch_size=config.eval.batch_size, device=device, mean=mean, std=std)


def load_run_config(run: Path) -> Config:
    """The resolved recipe of a run. `UserError` if the folder is not a run directory."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory (no config.yaml in it)")
    return load_config(run / "config.yaml")


def load_classifier(
    run: Path, config: Config, num_classes: int, device: torch.device
) -> tuple[Classifier, dict[str, str]]:
    """A run's classifier with its best weights, in eval mode on `device`, and the weights' metadata.

    Raises:
        UserError: no weights yet, or they belong to a model with other classes.
    """
    # The weights come from the run; nothing is downloaded to use it.
    config.model.pretrained, config.model.weights = False, None
    classifier = Classifier(config.model, num_classes, config.data.image_size)
    metadata = load_weights(run / "model.safetensors", classifier)
    classifier.to(device).to(memory_format=torch.channels_last).eval()
    return classifier, metadata


def load_run(run: Path, device: torch.device) -> tuple[Config, Manifest, Classifier, dict[str, str]]:
    """Config, data, classifier with the best weights, and the weights' metadata of a finished or running run.

    Raises:
        UserError: not a run directory, no weights yet, or the data have other classes than the run.
    """
    config = load_run_config(run)
    manifest = open_data(config)
    classifier, metadata = load_classifier(run, config, manifest.num_classes, device)
    return config, manifest, classifier, metadata
