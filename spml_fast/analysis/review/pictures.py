"""Thumbnails of suggested images, and the class activation map of each suggestion, by the run that made it.

Images go through the loader that the network's come through, a part of them at a time, so that packed and loose ones
look alike. Maps are of the suggested classes alone.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from spml_fast.analysis.explain import Choice, seen_pixels
from spml_fast.analysis.explain_samples import sample_files
from spml_fast.analysis.predict import load_images
from spml_fast.analysis.suggest import Suggestions
from spml_fast.core.config import Config
from spml_fast.core.precision import autocast, inference_dtype
from spml_fast.data.manifest import Split
from spml_fast.models.classifier import Classifier
from spml_fast.runs.open import load_classifier, load_run_config

# Images that are opened at a time; packed ones are unpacked for it.
PART = 512
JPEG_QUALITY = 82
# Cells of a map beyond the scale's end are as strong as it.
_LARGEST = 127


@dataclass(frozen=True)
class Thumbnail:
    """An image as the page shows it.

    Attributes:
        jpeg: the file; empty where the loader refuses the image.
        width: pixels, in the aspect ratio of the original.
        height: pixels.
    """

    jpeg: bytes
    width: int
    height: int


@dataclass
class Pictures:
    """What is seen of suggestions.

    Attributes:
        thumbnails: by sample.
        maps: float16 [h, w] by (sample, class): signed, with the bias and without the boost.
        signed: whether maps say what speaks against a class.
    """

    thumbnails: dict[int, Thumbnail] = field(default_factory=dict)
    maps: dict[tuple[int, int], npt.NDArray[np.float16]] = field(default_factory=dict)
    signed: bool = False


def make_thumbnail(pixels: npt.NDArray[np.uint8], aspect: float, side: int) -> Thumbnail:
    """A thumbnail of what the network saw.

    Args:
        pixels: uint8 [S, S, 3].
        aspect: width / height of the original.
        side: pixels of the longer side at most; small images are not enlarged.
    """
    longer = min(side, len(pixels))
    width, height = (max(1, round(longer * min(1.0, a))) for a in (aspect, 1 / aspect))
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=JPEG_QUALITY)
    return Thumbnail(file.getvalue(), width, height)


def map_scale(maps: Sequence[npt.NDArray[np.float16]]) -> float:
    """The end of the colour scale: 99 per cent of all cells of the maps lie within plus and minus this."""
    if not maps:
        return 1.0
    end = float(np.percentile(np.abs(np.concatenate([cells.ravel() for cells in maps])).astype(np.float32), 99))
    return end if end > 0 and np.isfinite(end) else 1.0


def encoded_map(cells: npt.NDArray[np.float16], scale: float) -> str:
    """A map's cells as int8 in base64, row by row."""
    value = np.nan_to_num(cells.astype(np.float32) / scale)
    return base64.b64encode((np.clip(value, -1, 1) * _LARGEST).round().astype(np.int8).tobytes()).decode()


def pairs_by_run(lists: Sequence[Suggestions]) -> dict[str, dict[int, list[int]]]:
    """Class ids by run directory and sample."""
    found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for ranked in lists:
        for index, class_id, run in zip(
            ranked.index.tolist(), ranked.class_id.tolist(), ranked.run_places.tolist(), strict=True
        ):
            found[ranked.runs[run]][index].append(class_id)
    return found


def collect(
    lists: Sequence[Suggestions],
    split: Split,
    num_classes: int,
    device: torch.device,
    side: int,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Pictures:
    """Thumbnails and maps of all pairs of the lists, in one process.

    Args:
        lists: the suggestions, with the runs that made them.
        split: that they are about.
        num_classes: C.
        device: where the runs' networks run.
        side: pixels of a thumbnail's longer side at most.
        batch_size: images a forward; None for each run's own.
        advance: called with the number of images that were looked at.

    Raises:
        UserError: a run's weights cannot be used, or a packed image cannot be unpacked.
    """
    pictures = Pictures()
    for run, classes_of in pairs_by_run(lists).items():
        config = load_run_config(Path(run))
        classifier, _ = load_classifier(Path(run), config, num_classes, device)
        pictures.signed = classifier.head.supports_boostlu
        size = batch_size or config.eval.batch_size
        samples = sorted(classes_of)
        for start in range(0, len(samples), PART):
            part = samples[start : start + PART]
            one = replace(config, eval=replace(config.eval, batch_size=min(size, len(part))))
            wanted = [classes_of[i] for i in part]
            for index, thumbnail, maps in _look(classifier, one, split, part, wanted, device, side):
                pictures.thumbnails[index] = thumbnail
                pictures.maps |= {(index, class_id): cells for class_id, cells in maps.items()}
                advance(1)
    return pictures


# A sample, its thumbnail, and its maps by class.
_Looked = tuple[int, Thumbnail, dict[int, npt.NDArray[np.float16]]]


@torch.no_grad()
def _look(
    classifier: Classifier,
    config: Config,
    split: Split,
    samples: Sequence[int],
    wanted: Sequence[Sequence[int]],
    device: torch.device,
    side: int,
) -> Iterator[_Looked]:
    """Thumbnails and maps of some samples, whose classes are in `wanted`."""
    dtype = inference_dtype(config.train.precision, device)
    with contextlib.ExitStack() as stack:
        files, aspects = sample_files(split, [Choice(i, "") for i in samples], stack)
        for start, views in load_images(classifier, config, files, device):
            if views is None:
                yield samples[start], Thumbnail(b"", 1, 1), {}
                continue
            rows = range(start, start + len(views))
            width = max(len(wanted[row]) for row in rows)
            chosen = torch.full((len(views), width), -1, dtype=torch.int64)
            for row in rows:
                chosen[row - start, : len(wanted[row])] = torch.tensor(wanted[row])
            with autocast(device, dtype):
                maps = classifier.classify(classifier.features(views), classes=chosen.to(device)).maps
            cells = None if maps is None else maps.float().cpu().numpy().astype(np.float16)
            pixels = seen_pixels(views, config, classifier)
            for row in rows:
                found = {} if cells is None else dict(zip(wanted[row], cells[row - start], strict=False))
                yield samples[row], make_thumbnail(pixels[row - start], aspects[row], side), found
