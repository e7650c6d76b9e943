"""Decoded images kept in memory, so that a small split is decoded once and not once an epoch (`data.keep_decoded`).

What is kept is the whole image as DALI decoded it, upright, so every view can be made of it and has the same bits. A
split is kept if it fits whole, for a part of a large one would save little. Each rank keeps the images that it saw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.dlpack import from_dlpack

from spml_fast.core.config import DataConfig
from spml_fast.data.manifest import Split

Pixels = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.integer[Any]]


class DecodedImages:
    """The images of a split that were decoded so far.

    Args:
        width: pixels of each image as shown, integer [N].
        height: the same.
    """

    def __init__(self, width: IntArray, height: IntArray) -> None:
        self._width, self._height = width, height
        self._images: list[Pixels | None] = [None] * len(width)
        self._missing = np.ones(len(width), np.bool_)

    def missing(self, samples: IntArray) -> npt.NDArray[np.int64]:
        """Places of those samples that are not here, int64 [m], ascending."""
        return np.flatnonzero(self._missing[samples])

    def keep(self, sample: int, pixels: Pixels) -> Pixels:
        """Copy an image, uint8 [H, W, 3], and return the copy. One of another size than it had is not kept.

        Something has replaced that file: it has to be decoded again for what is wrong with it to be found.
        """
        copy = pixels.copy()
        if copy.shape[:2] == (self._height[sample], self._width[sample]):
            self._images[sample] = copy
            self._missing[sample] = False
        return copy

    def image(self, sample: int) -> Pixels:
        """An image, uint8 [H, W, 3]; nobody may write to it. `KeyError` if it is not here."""
        pixels = self._images[sample]
        if pixels is None:
            raise KeyError(sample)
        return pixels

    @property
    def complete(self) -> bool:
        """Whether every image is here."""
        return not self._missing.any()


def decoded_bytes(split: Split) -> int | None:
    """Bytes of all images of a split, decoded; None where the Manifest does not know all sizes."""
    width, height = split.width, split.height
    if not len(split) or min(int(width.min()), int(height.min())) <= 0:
        return None
    # Without an array of all products, which of millions of images is a large one; fp64, for wrong sizes may overflow.
    return 3 * int(np.einsum("i,i->", width, height, dtype=np.float64, casting="safe"))


def room_for(split: Split, config: DataConfig) -> DecodedImages | None:
    """Where the decoded images of a split go; None where they do not stay in memory.

    Args:
        split: the images.
        config: `keep_decoded`; images of `decode: reduced` have another size in every epoch, and those of `cache` are
            decoded already.
    """
    if config.decode != "full" or config.cache != "none" or not config.keep_decoded:
        return None
    size = decoded_bytes(split)
    return None if size is None or size > config.keep_decoded * 1e9 else DecodedImages(split.width, split.height)


@dataclass
class _Batch:
    """A batch that was fed.

    Attributes:
        samples: int64 [n].
        missing: int64 [m], places of those to decode.
        inputs: of the pipeline, for these alone.
        running: they were handed to the pipeline.
    """

    samples: npt.NDArray[np.int64]
    missing: npt.NDArray[np.int64]
    inputs: dict[str, Any]
    running: bool = False


def _rows(values: Any, places: npt.NDArray[np.int64]) -> Any:
    """Some rows of an array, or elements of a list."""
    return [values[place] for place in places.tolist()] if isinstance(values, list) else values[places]


class KeepingDecoder:
    """Decodes the images that are not in memory yet; called as a DALI pipeline is, with `sample` as one input more.

    Args:
        decoded: the images so far; those that are decoded join them.
        make: prefetch_queue_depth -> the DALI pipeline that decodes, built. It is made when there is something to
            decode, and given up when everything is here.
    """

    def __init__(self, decoded: DecodedImages, make: Callable[[int], Any]) -> None:
        self._decoded, self._make = decoded, make
        self._fed: dict[str, deque[Any]] = {}
        self._batches: deque[_Batch] = deque()
        self._pipe: Any = None
        # Batches that the pipeline's queue holds, and those that are in it.
        self._depth = self._running = 0

    def feed_input(self, name: str, value: Any) -> None:
        """An input of the next batch: an array, or a list of arrays, with a row per image."""
        self._fed.setdefault(name, deque()).append(value)

    def schedule_run(self) -> None:
        """Start to decode what was fed."""
        while all(self._fed.values()):
            inputs = {name: values.popleft() for name, values in self._fed.items()}
            samples = inputs.pop("sample")
            missing = self._decoded.missing(samples)
            inputs = {name: _rows(value, missing) for name, value in inputs.items()}
            self._batches.append(_Batch(samples, missing, inputs))
        self._start()

    def _start(self) -> None:
        """Hand batches to the pipeline as long as its queue has room."""
        waiting = [batch for batch in self._batches if len(batch.missing) and not batch.running]
        first = self._pipe is None
        if first and waiting:
            self._depth = len(waiting)
            self._pipe = self._make(self._depth)
        waiting = waiting[: self._depth - self._running]
        for batch in waiting:
            for name, value in batch.inputs.items():
                self._pipe.feed_input(name, value)
            batch.running = True
            self._running += 1
        # The first run of a pipeline starts as many batches as its queue is deep; each later one starts one.
        for _ in range(min(1, len(waiting)) if first else len(waiting)):
            self._pipe.schedule_run()

    def share_outputs(self) -> tuple[list[Pixels]]:
        """Wait for the oldest batch, and return its images, uint8 [H, W, 3] each.

        Raises:
            RuntimeError: one of them cannot be decoded.
        """
        batch = self._batches[0]
        samples = batch.samples.tolist()
        new: dict[int, Pixels] = {}
        if len(batch.missing):
            (images,) = self._pipe.share_outputs()
            for row, place in enumerate(batch.missing.tolist()):
                new[place] = self._decoded.keep(samples[place], from_dlpack(images[row]).numpy())
        return ([new[i] if i in new else self._decoded.image(sample) for i, sample in enumerate(samples)],)

    def release_outputs(self) -> None:
        """The oldest batch was taken."""
        if len(self._batches.popleft().missing):
            self._pipe.release_outputs()
            self._running -= 1
        if self._running == 0 and self._decoded.complete:
            self._pipe = None
        self._start()
