"""Samples of a split whose maps are worth a look: where a run is most wrong, and some at random."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch

from spml_fast.analysis.explain import PREDICTED, Choice, choose_samples
from spml_fast.analysis.suggest import find_suggestions
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.manifest import Manifest, Split
from spml_fast.models.classifier import Classifier
from spml_fast.runs.open import make_eval_loader


def chosen_samples(
    name: str | None,
    count: int,
    seed: int,
    config: Config,
    manifest: Manifest,
    classifier: Classifier,
    device: torch.device,
    alpha: float,
) -> tuple[Split, list[Choice]]:
    """A split, and the samples of it that are worth a look.

    Args:
        name: of the split; None takes the run's test split.
        count: samples wanted.
        seed: of those at random.
        config: of the run.
        manifest: of the run's data set.
        classifier: with the run's weights, on `device`.
        device: where it runs.
        alpha: BoostLU's factor.
    """
    split = manifest.split(name or config.data.test_split or config.data.train_split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} of {manifest.source} has no images")
    with show_progress(len(split), f"looking for mistakes in the {split.name} split") as advance:
        mistakes = find_suggestions(
            classifier,
            make_eval_loader(config, split, classifier, device),
            split.known,
            alpha=alpha,
            precision=config.train.precision,
            classes=manifest.classes,
            top=count,
            min_probability=PREDICTED,
            codes=(NEGATIVE, POSITIVE),
            advance=advance,
        )
    assert mistakes is not None
    return split, choose_samples(mistakes, len(split), count, seed)


def sample_files(split: Split, choices: list[Choice], stack: contextlib.ExitStack) -> tuple[ImageFiles, list[float]]:
    """The chosen samples as image files, and width / height of each; unpacked for a while from tar shards."""
    index = np.array([c.index for c in choices])
    paths = [split.path(i) for i in index.tolist()]
    if split.shards is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spml_explain")))
        paths = [str(folder / str(place)) for place in range(len(index))]
        for path, i in zip(paths, index.tolist(), strict=True):
            try:
                Path(path).write_bytes(split.read(i))
            except OSError as error:
                raise UserError(f"{split.place(i)} cannot be unpacked to {folder}: {error.strerror}") from error
    width, height = np.asarray(split.width)[index], np.asarray(split.height)[index]
    aspects = np.where((width > 0) & (height > 0), width / np.maximum(height, 1), 1.0)
    return ImageFiles(paths, np.asarray(split.orientation)[index]), aspects.tolist()
