"""The views of decoded images on CPUs: crop, resize, RandAugment, flip, normalise; threads make them.

Without a GPU, DALI decodes alone. PyTorch resizes bytes as Pillow does, with the same antialiased triangular filter and
whole-number weights, at a fifth of the time that DALI's CPU resize takes, and pillow_ops.py has RandAugment as
torchvision does it. NumPy and Pillow compute without the interpreter's lock, so that threads do it at the same time;
operators of PyTorch that would start threads of their own are not used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from spml_fast.core.workers import DaemonThreads
from spml_fast.data.dali_graph import GraphOptions
from spml_fast.data.pillow_ops import Operation, Pixels, randaugment

IntArray = npt.NDArray[np.integer[Any]]

# Batches of a view whose memory is kept for later ones: fresh memory costs a third of the normalisation.
_KEPT = 4
# Bytes of a view that a job makes at most, unless one image has more: to hand over a job, and to call NumPy, takes as
# long as a small image. A core's cache holds them until they are normalised.
_JOB_BYTES = 1 << 18


class _Batches:
    """Memory for batches of one view, used again when nobody has a tensor of it any more."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._shape = shape
        self._kept: list[npt.NDArray[np.float32]] = []
        # As many as a batch has that nobody else refers to: how the loop and the call count is the interpreter's own
        # business, and differs between versions of Python.
        (self._unused,) = self._references([np.empty(0, np.float32)])

    @staticmethod
    def _references(batches: list[npt.NDArray[np.float32]]) -> list[int]:
        """References to each batch of a list. A tensor or an array of its memory is one more."""
        return [sys.getrefcount(batch) for batch in batches]

    def take(self) -> npt.NDArray[np.float32]:
        """A batch to write to, float32 [B, S, S, 3], with anything in it."""
        for batch, references in zip(self._kept, self._references(self._kept), strict=True):
            if references == self._unused:
                return batch
        if len(self._kept) == _KEPT:
            del self._kept[0]
        self._kept.append(np.empty(self._shape, np.float32))
        return self._kept[-1]


class PendingViews:
    """Views that are being made."""

    def __init__(self, futures: list[Future[None]], views: tuple[Tensor, ...]) -> None:
        self._futures, self._views = futures, views

    def result(self) -> tuple[Tensor, ...]:
        """Wait, and return the views, float32 [B, 3, S, S] each in channels_last memory.

        Raises:
            RuntimeError: a crop lies outside of its image.
        """
        for future in self._futures:
            future.result()
        return self._views

    def cancel(self) -> None:
        """Do not start what has not been started."""
        for future in self._futures:
            future.cancel()


def _resized(pixels: Pixels, side: int) -> Pixels:
    """uint8 [H, W, 3] to [side, side, 3]."""
    if pixels.shape[:2] == (side, side):
        return pixels
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    out = functional.interpolate(image, size=(side, side), mode="bilinear", antialias=True)
    return out[0].permute(1, 2, 0).contiguous().numpy()


def _mirrored(pixels: Pixels) -> Pixels:
    out = np.empty_like(pixels)
    # A channel at a time, because rows of three bytes are slow to copy.
    for channel in range(3):
        out[..., channel] = pixels[:, ::-1, channel]
    return out


class CpuViews:
    """Makes the views of batches.

    Args:
        options: what to make.
        batch_size: images of the largest batch.
        threads: images at a time.
    """

    def __init__(self, options: GraphOptions, batch_size: int, threads: int) -> None:
        self._options = options
        side = options.image_size
        self._batches = [_Batches((batch_size, side, side, 3)) for _ in options.views]
        self._job_images = _JOB_BYTES // (side * side * 3 * 4)
        self._threads = DaemonThreads(threads, "views", native=True)
        # One row of an image.
        self._mean = np.tile(np.array([255.0 * m for m in options.mean], np.float32), side)
        self._scale = np.tile(np.float32(1) / np.array([255.0 * s for s in options.std], np.float32), side)

    def submit(self, image: Callable[[int], Pixels], count: int, inputs: dict[str, Any]) -> PendingViews:
        """Start to make the views of a batch; returns at once.

        Args:
            image: place in the batch -> uint8 [H, W, 3], upright; threads call it.
            count: images of the batch.
            inputs: as the loaders' `_inputs` make them, arrays with a row per image.
        """
        batches = [batches.take()[:count] for batches in self._batches]
        size = max(1, min(count // (4 * self._threads.threads), self._job_images))
        futures = [
            self._threads.submit(
                partial(self._make_some, image, inputs, range(start, min(start + size, count)), batches)
            )
            for start in range(0, count, size)
        ]
        return PendingViews(futures, tuple(torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in batches))

    def _make_some(
        self,
        image: Callable[[int], Pixels],
        inputs: dict[str, Any],
        places: range,
        batches: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        """All views of some images, written to their places in `batches`, float32 [B, S, S, 3] each."""
        for place in places:
            self._make(image, inputs, place, [batch[place] for batch in batches])
        for batch in batches:
            rows = batch[places.start : places.stop].reshape(-1, len(self._mean))
            rows -= self._mean
            rows *= self._scale

    def _make(
        self,
        image: Callable[[int], Pixels],
        inputs: dict[str, Any],
        place: int,
        outputs: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        """All views of one image, not normalised, written to `outputs`, float32 [S, S, 3] each."""
        options, pixels = self._options, image(place)
        plain: Pixels | None = None
        for view, out in zip(options.views, outputs, strict=True):
            changed = pixels
            if view == options.randaugment_view == "strong" and not options.randaugment_resized:
                changed = randaugment(pixels, self._operations(inputs, place))
            if changed is pixels:
                if plain is None:
                    plain = self._cropped_and_resized(pixels, inputs, place)
                small = plain
            else:
                small = self._cropped_and_resized(changed, inputs, place)
            if view == "weak" and options.cutout:
                small = _covered(small, inputs, place)
            if view == options.randaugment_view and options.randaugment_resized:
                small = randaugment(small, self._operations(inputs, place))
            if options.flipped and inputs[f"flip_{view}"][place]:
                small = _mirrored(small)
            np.copyto(out, small)

    def _operations(self, inputs: dict[str, Any], place: int) -> list[Operation]:
        names = ("op", "factor", "matrix", "mask", "threshold")
        return [
            Operation(*(inputs[f"{name}{step}"][place] for name in names))
            for step in range(self._options.randaugment_ops)
        ]

    def _cropped_and_resized(self, pixels: Pixels, inputs: dict[str, Any], place: int) -> Pixels:
        if self._options.cropped:
            start, shape = inputs["crop_start"][place], inputs["crop_shape"][place]
            if self._options.reduced:
                start, shape = _scaled(start, shape, inputs["full_shape"][place], pixels.shape[:2])
            (top, left), (height, width) = start, shape
            if top + height > pixels.shape[0] or left + width > pixels.shape[1]:
                raise RuntimeError(f"a crop of {width} x {height} pixels lies outside of its image")
            pixels = pixels[top : top + height, left : left + width]
        return _resized(pixels, self._options.image_size)


def _scaled(start: IntArray, shape: IntArray, full: IntArray, reduced: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """A crop of an image, (top, left) and (height, width), as that of the image in another size, at least one pixel."""
    scale = np.array(reduced) / full
    first = np.minimum(np.rint(start * scale).astype(np.int64), np.array(reduced) - 1)
    end = np.rint((start + shape) * scale).astype(np.int64)
    return first, np.maximum(end - first, 1)


def _covered(pixels: Pixels, inputs: dict[str, Any], place: int) -> Pixels:
    """Cutout."""
    top, left = inputs["cutout_anchor"][place].astype(int)
    height, width = inputs["cutout_shape"][place].astype(int)
    pixels = pixels.copy()
    pixels[top : top + height, left : left + width] = inputs["cutout_fill_value"][place]
    return pixels
