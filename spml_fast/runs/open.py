"""Opens a run directory for use: configuration, data, classifier with its best weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.bad_images import BadImages
from spml_fast.data.decoded_images import DecodedImages
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest, Split, may_exist
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import load_weights
from spml_fast.prepare.datasets.digits import prepare_digits
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.read import read_classes
from spml_fast.runs.recipe import load_config
from spml_fast.runs.weights_check import check_weights


def run_classes(run: Path, config: Config) -> list[str]:
    """Class names of a run in class-id order: from the run directory or, where it has none, from its data set.

    Raises:
        UserError: neither has them.
    """
    path = RunLayout(run).classes
    if not path.is_file():
        if config.data.dir is None or not may_exist(config.data.dir):
            raise UserError(
                f"{run} has no {path.name}, and its data set {config.data.dir} is not there either; "
                f"copy {path.name} of the data set to {run}"
            )
        return Manifest.configured(config.data).classes
    try:
        classes = read_classes(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy {path.name} of the data set there") from error
    if not classes:
        raise UserError(f"{path} is empty; copy {path.name} of the data set there")
    return classes


DIGITS_DIR = "data/digits"


def open_data(config: Config) -> Manifest:
    """The Manifest of a run; builds the embedded digit scenes on first use (one process builds, others wait).

    While this process runs it is not replaced by another's `prepare --overwrite`.
    """
    manifest = prepare_digits(Path(DIGITS_DIR)) if config.data.dir is None else None
    if manifest is None:
        manifest = Manifest.configured(config.data)
    if distributed.is_main():
        manifest.register_reader()
    return manifest


def open_run_data(run: Path, config: Config) -> Manifest:
    """The Manifest of a run that is used again, as `open_data`.

    Args:
        run: its directory.
        config: its resolved recipe.

    Raises:
        UserError: the data set is not there any more, or cannot be opened.
    """
    folder = config.data.dir
    if folder is not None and not may_exist(folder):
        raise UserError(
            f"the data set of {run} is not at {folder} any more: put it back or, where it was moved, write "
            f"its place as data.dir into {RunLayout(run).config}"
        )
    try:
        return open_data(config)
    except UserError as error:
        raise UserError(f"the data set of {run} cannot be used: {error}") from error


def input_normalisation(config: Config, classifier: Classifier) -> tuple[list[float], list[float]]:
    """Channel mean and standard deviation: as configured, or the backbone's."""
    mean, std = classifier.input_normalisation()
    return config.data.mean or mean, config.data.std or std


def make_eval_loader(
    config: Config,
    split: Split,
    classifier: Classifier,
    device: torch.device,
    bad_images: BadImages | None = None,
    decoded: DecodedImages | None = None,
) -> EvalLoader:
    """The loader that both training and stand-alone evaluation use.

    Args:
        config: image size, normalisation and batch size.
        split: its images.
        classifier: its backbone knows the normalisation where the configuration has none.
        device: where the images go.
        bad_images: as in `EvalLoader`.
        decoded: as in `EvalLoader`: for a split that is evaluated again and again.
    """
    mean, std = input_normalisation(config, classifier)
    return EvalLoader(
        split,
        config.data,
        batch_size=config.eval.batch_size,
        device=device,
        mean=mean,
        std=std,
        bad_images=bad_images,
        decoded=decoded,
    )


def load_run_config(run: Path) -> Config:
    """The resolved recipe of a run. `UserError` if the folder is not a run directory."""
    return load_config(RunLayout(run).require().config)


def load_classifier(
    run: Path, config: Config, num_classes: int, device: torch.device
) -> tuple[Classifier, dict[str, str]]:
    """A run's classifier with its best weights, in eval mode on `device`, and the weights' metadata.

    Args:
        run: the run directory.
        config: its backbone, head and image size.
        num_classes: C.
        device: where the classifier goes.

    Raises:
        UserError: no weights yet, they are not those that the run recorded, or belong to a model with other classes.
    """
    # The weights come from the run; nothing is downloaded to use it.
    model = dataclasses.replace(config.model, pretrained=False, weights=None)
    classifier = Classifier(model, num_classes, config.data.image_size)
    layout = RunLayout(run)
    check_weights(layout)
    metadata = load_weights(layout.weights, classifier)
    classifier.to(device).to(memory_format=torch.channels_last).eval()
    return classifier, metadata


def load_for_export(run: Path) -> tuple[Config, list[str], Classifier]:
    """A run's configuration, classes and classifier on the CPU, to be written in another form.

    The configuration is without what is for training alone. Raises `UserError` as `load_classifier`.
    """
    config = load_run_config(run)
    classes = run_classes(run, config)
    # Checkpointing would be in an exported graph.
    model = dataclasses.replace(config.model, grad_checkpointing=False, compile=False, drop_path=None)
    config = dataclasses.replace(config, model=model)
    classifier, _ = load_classifier(run, config, len(classes), torch.device("cpu"))
    classifier.to(memory_format=torch.contiguous_format)
    return config, classes, classifier


class RunContext:
    """A run opened for use: its configuration and classes at once, its classifier when it is first asked for.

    Args:
        run: the run directory.
        device: where the classifier goes.
        with_data: open the run's Manifest too, whose classes then count; without it the data set may be gone, and the
            classes are those that the run has kept.

    Attributes:
        layout: where everything of the run lies.
        config: its resolved recipe, with what `with_options` changed.
        device: as given.
        classes: class names in class-id order.

    Raises:
        UserError: not a run directory, from another version, or without its data set or list of classes.
    """

    def __init__(self, run: Path, device: torch.device | None = None, with_data: bool = True) -> None:
        self.layout = RunLayout(run)
        self.config = load_run_config(run)
        self.device = torch.device("cpu") if device is None else device
        self._manifest = open_run_data(run, self.config) if with_data else None
        self.classes = run_classes(run, self.config) if self._manifest is None else self._manifest.classes

    @property
    def has_data(self) -> bool:
        """Whether the Manifest was opened."""
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        """The run's data set. ValueError if it was not opened."""
        if self._manifest is None:
            raise ValueError("the run was opened without its data")
        return self._manifest

    @functools.cached_property
    def _loaded(self) -> tuple[Classifier, dict[str, str]]:
        return load_classifier(self.layout.folder, self.config, len(self.classes), self.device)

    @property
    def classifier(self) -> Classifier:
        """The classifier with the best weights, in eval mode. `UserError` where there are no weights that fit."""
        return self._loaded[0]

    @property
    def metadata(self) -> dict[str, str]:
        """What the weights say of themselves: phase, epoch, val_map, backbone, version."""
        return self._loaded[1]

    def with_options(self, section: str, **values: Any) -> RunContext:
        """The same run with other options in one section of its configuration.

        Args:
            section: `eval`, `model`, ...; of `model`, before the classifier is loaded.
            **values: new values by option.
        """
        if section == "model" and "_loaded" in self.__dict__:
            raise ValueError("the classifier is loaded already")
        other = copy.copy(self)
        changed = dataclasses.replace(getattr(self.config, section), **values)
        other.config = dataclasses.replace(self.config, **{section: changed})
        return other

    def on(self, device: torch.device) -> RunContext:
        """The same run with its classifier on another device."""
        other = copy.copy(self)
        other.device = device
        if "_loaded" in self.__dict__:
            self.classifier.to(device)
        return other

    def split(self, name: str | None, default: str = "test") -> Split:
        """A split that has images.

        Args:
            name: of the split; None takes the default.
            default: `test` is the run's test split or, where it has none, its training split; `train` the latter.

        Raises:
            UserError: there is no such split, or it is empty.
        """
        data = self.config.data
        chosen = self.manifest.split(name or (data.test_split if default == "test" else None) or data.train_split)
        if len(chosen) == 0:
            raise UserError(f"split {chosen.name!r} of {self.manifest.source} has no images")
        return chosen

    def loader(self, split: Split) -> EvalLoader:
        """This rank's batches of a split, as evaluation takes them."""
        return make_eval_loader(self.config, split, self.classifier, self.device)

    def normalisation(self) -> tuple[list[float], list[float]]:
        """Channel mean and standard deviation."""
        return input_normalisation(self.config, self.classifier)


def load_run(run: Path, device: torch.device) -> tuple[Config, Manifest, Classifier, dict[str, str]]:
    """Config, data, classifier with the best weights, and the weights' metadata of a finished or running run.

    Raises:
        UserError: not a run directory, no weights yet, or the data have other classes than the run.
    """
    context = RunContext(run, device)
    return context.config, context.manifest, context.classifier, context.metadata
