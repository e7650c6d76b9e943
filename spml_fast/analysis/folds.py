"""Folds of a run's training images: data sets without one part of the images each, and what is to be trained on them.

A network that was trained on a wrong label has learned it, and does not contradict it. So each image is judged by a
model that has not seen it: the images are cut into K folds, and K runs, each as the run was trained, learn from the
others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json
from spml_fast.core.text import parse_json
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.runs.layout import FoldsLayout, RunLayout
from spml_fast.runs.read import read_results
from spml_fast.runs.warm_start import source_run

# The split of a fold's data set that its run does not train on.
HELD = "held-out"


def fold_of(images: int, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Fold of each image, int64 [N]: at random, and of the same size to within one image."""
    out = np.empty(images, np.int64)
    out[np.random.default_rng([seed, images]).permutation(images)] = np.arange(images) % folds
    return out


@dataclass(frozen=True)
class Folds:
    """The folds of a run.

    Attributes:
        layout: where they lie.
        config: of the run.
        manifest: its data set.
        split: its training split.
        fold: of each image of that, int64 [N].
        number: K.
    """

    layout: FoldsLayout
    config: Config
    manifest: Manifest
    split: Split
    fold: npt.NDArray[np.int64]
    number: int

    def rows(self, k: int) -> npt.NDArray[np.int64]:
        """Images of a fold, int64."""
        return np.flatnonzero(self.fold == k)

    def finished(self, k: int) -> bool:
        """Whether a fold's run has ended."""
        run = self.layout.run(k)
        return run.results.exists() and run.weights.exists()

    def config_of(self, k: int) -> Config:
        """What trains a fold's run: the run's own options, without a test."""
        data = dataclasses.replace(self.config.data, dir=str(self.layout.data(k)), image_root=None, test_split=None)
        run = dataclasses.replace(self.config.run, dir=str(self.layout.run(k).folder), resume="auto")
        # What others look at is the run itself.
        local = [name for name in run.trackers if name == "tensorboard"]
        run = dataclasses.replace(run, trackers=local, tracker_options={})
        return dataclasses.replace(self.config, data=data, run=run)

    def write_data(self, k: int) -> None:
        """Write a fold's data set, unless it is there. Raises `UserError`."""
        if (self.layout.data(k) / "manifest.json").is_file():
            return
        writer = ManifestWriter(
            self.layout.data(k), self.manifest.name, self.manifest.classes, self.manifest.image_root
        )
        try:
            writer.take_rows(self.split, np.flatnonzero(self.fold != k), self.split.name)
            writer.take_rows(self.split, self.rows(k), HELD)
            val = self.config.data.val_split
            if val is not None and val in self.manifest.splits:
                writer.copy_split(self.manifest.split(val), self.manifest.meta["splits"][val])
            writer.finish({"notes": [f"fold {k + 1} of {self.number} of {self.manifest.source}"]})
        except OSError as error:
            shutil.rmtree(writer.staging, ignore_errors=True)
            raise UserError(f"writing {writer.staging} failed: {error.strerror or error}") from error


def make_folds(run: Path, config: Config, manifest: Manifest, number: int, folder: Path | None) -> Folds:
    """The folds of a run's training split; writes down what they are of, or compares it with what was written.

    Args:
        run: the run directory.
        config: the run's.
        manifest: its data set.
        number: K.
        folder: of the folds; None for one in the run directory.

    Raises:
        UserError: fewer images than folds, a folder of something else, or folds of another run, number or labels.
    """
    split = manifest.split(config.data.train_split)
    if not 2 <= number <= len(split):
        raise UserError(f"--folds is {number}; it must lie between 2 and the {len(split)} images of {split.name!r}")
    if HELD in manifest.splits:
        raise UserError(f"{manifest.source} has a split {HELD!r}, a name that --folds needs; rename the split")
    layout = RunLayout(run).folds(number) if folder is None else FoldsLayout(folder)
    plan = {
        "run": str(run.resolve()),
        "folds": number,
        "data": manifest.where,
        "split": split.name,
        "images": len(split),
        "labels_crc32": f"{_labels_crc32(split):08x}",
        # The seed says which image is in which fold; other options would make other runs.
        "seed": config.run.seed,
        "options_crc32": f"{_options_crc32(config):08x}",
    }
    _check_plan(layout, plan)
    return Folds(layout, config, manifest, split, fold_of(len(split), number, config.run.seed), number)


def _options_crc32(config: Config) -> int:
    """Checksum of the options that folds are trained with; those of the run itself (`run`) are their own."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "run"}
    return zlib.crc32(json.dumps(values, sort_keys=True, default=str).encode())


def _labels_crc32(split: Split) -> int:
    """Checksum of the labels that training sees."""
    value = 0
    for array in (split.observed.indptr, split.observed.classes, split.observed.codes):
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _check_plan(layout: FoldsLayout, plan: dict[str, Any]) -> None:
    """Write the plan into a new folder; `UserError` where the folder has another one."""
    try:
        if layout.plan.is_file():
            before = parse_json(layout.plan.read_text(encoding="utf-8"))
            if before != plan:
                differing = [name for name in plan if not isinstance(before, dict) or before.get(name) != plan[name]]
                raise UserError(
                    f"{layout.folder} has folds of something else ({', '.join(differing)} differ); delete it, or give "
                    "another --folds-dir"
                )
            return
        if layout.folder.exists() and any(layout.folder.iterdir()):
            raise UserError(f"{layout.folder} is not empty and has no folds; give another --folds-dir")
        layout.folder.mkdir(parents=True, exist_ok=True)
        write_json(layout.plan, plan)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{layout.plan} cannot be used ({reason}); delete {layout.folder}") from error


def prepare_fold(folds: Folds, k: int) -> bool:
    """Write a fold's data set, unless it is there; whether its run has ended."""
    folds.write_data(k)
    return folds.finished(k)


def cost(folds: Folds, run: Path) -> list[str]:
    """What is going to be trained and how long that takes, and a warning where it may be of no use; before it starts.

    Args:
        folds: of the run.
        run: its directory.
    """
    images = len(folds.split)
    kept = images - images // folds.number
    todo = [k for k in range(folds.number) if not folds.finished(k)]
    text = f"{folds.number} runs of {kept:,} of {images:,} images each, as {run} was trained"
    if len(todo) < folds.number:
        text += f"; {folds.number - len(todo)} of them are there"
    seconds = _train_seconds(run)
    share = 1 - 1 / folds.number
    if todo and seconds is not None:
        total = len(todo) * share * seconds
        text += f"; about {len(todo)} x {share:.0%} of its {seconds / 60:.1f} minutes: {total / 60:.1f} minutes"
    lines = [f"{text}; in {folds.layout.folder}"]
    if (source := source_run(folds.config.model.weights)) is not None:
        lines.append(
            f"note: {run} started from {source}, and so do these runs: images that {source} was trained on have been "
            "seen all the same"
        )
    return lines


def _train_seconds(run: Path) -> float | None:
    try:
        return float(read_results(run)["train_seconds"])
    except (UserError, KeyError, TypeError, ValueError, json.JSONDecodeError):
        return None
