"""RandAugment's operations on the CPU, the same bits as torchvision's on Pillow images.

Operations that give every value another one (Brightness, Contrast, Posterize, Solarize, AutoContrast, Equalize) are
tables of 256 values per channel; tables that follow each other become one, and an image is looked up once for all of
them. Their histogram is taken once and pushed through the tables. Sharpness smooths in whole numbers, which Pillow's
general filter does in floats at four times the cost. The rest is Pillow's own.

Source: docs/sources.md#randaugment; PIL.ImageOps and PIL.ImageEnhance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from spml_fast.data.augment import RANDAUGMENT_OPS

Pixels = npt.NDArray[np.uint8]

_RAMP = np.arange(256, dtype=np.uint8)
_GEOMETRIC = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
# Rows that are smoothed at a time, so that what is in between stays in the cache of a core.
_BAND = 32


@dataclass(frozen=True)
class Operation:
    """One operation of RandAugment on one image.

    Attributes:
        op: id into `RANDAUGMENT_OPS`.
        factor: of Brightness, Color, Contrast and Sharpness.
        matrix: float64 [2, 3], from output to input coordinates, of the geometric operations.
        mask: bits that Posterize leaves.
        threshold: smallest value that Solarize inverts.
    """

    op: int
    factor: float
    matrix: npt.NDArray[np.float64]
    mask: int
    threshold: int


class _Edited:
    """An image on its way through operations, with the table that its values still have to be looked up in."""

    def __init__(self, pixels: Pixels) -> None:
        self._image = Image.fromarray(pixels)
        self._table: Pixels | None = None
        self._counts: npt.NDArray[np.int64] | None = None

    def image(self) -> Image.Image:
        """The image, looked up."""
        if self._table is not None:
            self.put(self._image.point(self._table.ravel().tolist()))
        return self._image

    def put(self, image: Image.Image) -> None:
        """Take another image instead."""
        self._image, self._table, self._counts = image, None, None

    def look_up(self, table: Pixels) -> None:
        """Replace values by those of a table, uint8 [3, 256] or [256]."""
        table = np.broadcast_to(table, (3, 256))
        self._table = table if self._table is None else np.take_along_axis(table, self._table.astype(np.intp), 1)

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each value occurs, int64 [3, 256]."""
        if self._counts is None:
            self._counts = np.array(self._image.histogram(), np.int64).reshape(3, 256)
        if self._table is None:
            return self._counts
        rows = zip(self._table, self._counts, strict=True)
        return np.stack([np.bincount(table, row, 256) for table, row in rows]).astype(np.int64)


def _blend_table(base: int, factor: float) -> Pixels:
    """Pillow's blend of a grey level with every value, uint8 [256]."""
    ramp = Image.fromarray(_RAMP[None])
    return np.asarray(Image.blend(Image.new("L", ramp.size, base), ramp, factor))[0]


def _contrast_table(image: Image.Image, factor: float) -> Pixels:
    """Blend with the mean of the grey image."""
    counts = np.array(image.convert("L").histogram(), np.int64)
    mean = float((counts * np.arange(256)).sum()) / float(counts.sum())
    return _blend_table(int(mean + 0.5), factor)


def _auto_contrast_table(counts: npt.NDArray[np.int64]) -> Pixels:
    """Spread the values of each channel over 0..255; a channel with one value stays as it is."""
    used = counts > 0
    low, high = used.argmax(1)[:, None], 255 - used[:, ::-1].argmax(1)[:, None]
    scale = 255.0 / np.maximum(high - low, 1)
    spread = np.clip(np.trunc(_RAMP * scale - low * scale), 0, 255)
    return np.where(high > low, spread, _RAMP).astype(np.uint8)


def _equalize_table(counts: npt.NDArray[np.int64]) -> Pixels:
    """Even out the histogram of each channel; one with fewer than 255 pixels to distribute stays as it is."""
    highest = 255 - (counts > 0)[:, ::-1].argmax(1)
    step = (counts.sum(1) - counts[np.arange(3), highest])[:, None] // 255
    below = counts.cumsum(1) - counts
    even = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return np.where(step > 0, even, _RAMP).astype(np.uint8)


def _smooth(pixels: Pixels) -> Pixels:
    """Pillow's SMOOTH: every neighbour counts once, the pixel five times; the outermost pixels stay as they are."""
    out = pixels.copy()
    height = len(pixels)
    for top in range(1, height - 1, _BAND):
        bottom = min(top + _BAND, height - 1)
        rows = pixels[top - 1 : bottom + 1].astype(np.uint16)
        column = rows[:-2] + rows[1:-1]
        column += rows[2:]
        total = column[:, :-2] + column[:, 1:-1]
        total += column[:, 2:]
        centre = rows[1:-1, 1:-1]
        centre <<= 2
        total += centre
        # Rounded: 13 is odd, so there are no ties.
        total += 6
        total //= 13
        out[top:bottom, 1:-1] = total
    return out


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.fromarray(_smooth(np.asarray(image))), image, factor)


def _affine(image: Image.Image, matrix: npt.NDArray[np.float64]) -> Image.Image:
    coefficients = tuple(matrix.ravel().tolist())
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


def _apply(edited: _Edited, operation: Operation) -> None:
    name, factor = RANDAUGMENT_OPS[operation.op], operation.factor
    if name in _GEOMETRIC:
        edited.put(_affine(edited.image(), operation.matrix))
    elif name == "Brightness":
        edited.look_up(_blend_table(0, factor))
    elif name == "Color":
        edited.put(ImageEnhance.Color(edited.image()).enhance(factor))
    elif name == "Contrast":
        edited.look_up(_contrast_table(edited.image(), factor))
    elif name == "Sharpness":
        edited.put(_sharpness(edited.image(), factor))
    elif name == "Posterize":
        edited.look_up(_RAMP & np.uint8(operation.mask))
    elif name == "Solarize":
        edited.look_up(np.where(operation.threshold > _RAMP, _RAMP, 255 - _RAMP))
    elif name == "AutoContrast":
        edited.look_up(_auto_contrast_table(edited.counts()))
    else:
        edited.look_up(_equalize_table(edited.counts()))


def randaugment(pixels: Pixels, operations: Sequence[Operation]) -> Pixels:
    """Apply operations in turn.

    Args:
        pixels: uint8 [H, W, 3]; left as it is.
        operations: of this image.

    Returns:
        uint8 [H, W, 3]; `pixels` itself where nothing is to be done.
    """
    operations = [operation for operation in operations if RANDAUGMENT_OPS[operation.op] != "Identity"]
    if not operations:
        return pixels
    edited = _Edited(pixels)
    for operation in operations:
        _apply(edited, operation)
    return np.array(edited.image())
