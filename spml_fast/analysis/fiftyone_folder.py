"""Predictions and maps as a data set of FiftyOne on disk, written without the package `fiftyone`.

    DIR/metadata.json                name and media type
    DIR/samples.json                 a sample for each image
    DIR/data/000000-NAME.jpg         copies of the images
    DIR/fields/map_1/000000.png      the map of the most probable class, and so on

`fiftyone.Dataset.from_dir(dataset_dir=DIR, dataset_type=fiftyone.types.LegacyFiftyOneDataset)` opens it: that form says
what a sample holds in the sample itself, while the newer one wants the schema of the data base of one version. Fields:

    predictions           Classifications with confidence, the most probable first
    map_1 ... map_K       Heatmap: evidence for one class, its name in `label`; 0 where there is none or some against it
    ground_truth          Classifications: known positives, of a split alone
    observed, observed_negatives    what training may see of them, of a split alone

Source: the importers of fiftyone 1.22 (utils/data/importers.py, core/labels.py), read for the format alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spml_fast.analysis.explain import Explained
from spml_fast.analysis.predict import Prediction
from spml_fast.core.errors import UserError
from spml_fast.core.io import move_into_place, partial_path, printable, write_json
from spml_fast.core.outputs import WRITTEN_BY
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.manifest import Split

METADATA, SAMPLES, DATA, FIELDS = "metadata.json", "samples.json", "data", "fields"
# Bytes of an image's name that are kept behind its number.
LONGEST_NAME = 200


def classifications(names: Iterable[str], confidence: Iterable[float | None]) -> dict[str, Any]:
    """A field of several classes."""
    pairs = zip(names, confidence, strict=True)
    entries = [{"_cls": "Classification", "label": name, "confidence": value} for name, value in pairs]
    return {"_cls": "Classifications", "classifications": entries}


def grey(evidence: npt.NDArray[np.float32], size: tuple[int, int]) -> Image.Image:
    """A map as FiftyOne shows it: 0 where nothing speaks for the class, 255 at the strongest cell.

    Args:
        evidence: float32 [h, w], signed.
        size: width and height of the result; FiftyOne stretches it over the image.
    """
    positive = np.maximum(evidence, 0)
    highest = float(positive.max())
    cells = np.rint(positive * (255 / highest)).astype(np.uint8) if highest > 0 else positive.astype(np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BILINEAR)


class FiftyOneFolder:
    """Collects predictions, and writes them with the images when all are there.

    Args:
        folder: new or empty; its parent exists.
        classes: class names in class-id order.
        split: whose samples the images are, in its order; None where nothing is known of them.

    Raises:
        UserError: the folder holds something, or cannot be one.
    """

    def __init__(self, folder: Path, classes: Sequence[str], split: Split | None = None) -> None:
        self.folder, self.classes, self.split = folder, classes, split
        self._samples: dict[str, dict[str, Any]] = {}
        name = printable(str(folder))
        if not folder.parent.is_dir():
            raise UserError(f"--fiftyone {name} cannot be written: there is no directory {folder.parent}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--fiftyone {name} exists and is no empty folder; give the name of a new one")

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, prediction: Prediction) -> None:
        """Take an image's classes; its path must be new."""
        names = [self.classes[c] for c in prediction.classes.tolist()]
        self._samples[prediction.path] = {"predictions": classifications(names, prediction.shown.tolist())}

    def _copy(self, number: int, path: str, into: Path) -> str:
        """Copy an image; returns its path within the folder."""
        # The end of a long name tells its type, and with the number it stays below what file systems take.
        end = os.path.basename(path).encode("utf-8", "replace")[-LONGEST_NAME:].decode("utf-8", "ignore")
        name = f"{number:06d}-{end}"
        shutil.copyfile(path, into / DATA / name)
        return f"{DATA}/{name}"

    def _labels(self, index: int) -> dict[str, Any]:
        """What is known of a sample of the split."""
        assert self.split is not None
        known, observed = self.split.known.rows([index])[0], self.split.observed.rows([index])[0]
        found = {"ground_truth": known == POSITIVE, "observed": observed == POSITIVE}
        found["observed_negatives"] = observed == NEGATIVE
        named = {field: [self.classes[c] for c in np.flatnonzero(mask).tolist()] for field, mask in found.items()}
        return {field: classifications(names, [None] * len(names)) for field, names in named.items()}

    def _maps(self, number: int, explained: Explained, into: Path) -> dict[str, Any]:
        """Write the maps of an image; returns their fields."""
        fields = {}
        height, width = explained.image.shape[:2]
        for place, class_id in enumerate(explained.classes.tolist()):
            field = f"map_{place + 1}"
            path = f"{FIELDS}/{field}/{number:06d}.png"
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            grey(explained.maps[place], (width, height)).save(into / path)
            fields[field] = {"_cls": "Heatmap", "label": self.classes[class_id], "map_path": path}
        return fields

    def write(self, paths: Sequence[str], maps: Iterable[Explained] = ()) -> None:
        """Write everything; the folder appears when it is whole.

        Args:
            paths: of all images, in the split's order where there is one; those without a prediction are left out.
            maps: of the same images in the same order, or none.

        Raises:
            UserError: the folder cannot be written, or an image not be copied.
        """
        staging = partial_path(self.folder)
        try:
            staging.mkdir()
            (staging / DATA).mkdir()
        except OSError as error:
            advice = "delete it" if isinstance(error, FileExistsError) else "choose another folder"
            name = printable(str(staging))
            raise UserError(f"--fiftyone: {name} cannot be made: {error.strerror}; {advice}") from error
        try:
            self._write(staging, paths, maps)
            move_into_place(staging, self.folder)
        except OSError as error:
            what = printable(str(error.filename or self.folder))
            reason = error.strerror or str(error)
            raise UserError(f"{printable(str(self.folder))} cannot be written: {what}: {reason}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _write(self, into: Path, paths: Sequence[str], maps: Iterable[Explained]) -> None:
        """As `write`, into a folder that is there."""
        tags = [] if self.split is None else [self.split.name]
        samples = []
        drawn = iter(maps)
        for number, path in enumerate(paths):
            explained = next(drawn, None)
            if path not in self._samples:
                continue
            sample = {"filepath": self._copy(number, path, into), "tags": tags, "_media_type": "image"}
            sample |= {"metadata": None} | self._samples[path]
            sample |= {} if self.split is None else self._labels(number)
            sample |= {} if explained is None or explained.refused else self._maps(number, explained, into)
            samples.append(sample)
        write_json(into / SAMPLES, {"samples": samples})
        info = {WRITTEN_BY: "spml_fast predict", "classes": list(self.classes)}
        write_json(into / METADATA, {"name": self.folder.name, "media_type": "image", "info": info})
