"""Augmentation parameters as pure functions of (seed, epoch, sample index): flips, crops, RandAugment.

A sample looks the same on whatever rank and in whatever batch it is, and nothing has to be saved for a resume.

Source: docs/sources.md#randaugment; torchvision.transforms.RandAugment and RandomResizedCrop.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Increment of splitmix64, and the mask of its 64 bits.
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Streams: what a random number is for. A stream has room for 2**16 draws of one sample.
_FLIP = {"weak": 0, "strong": 1}
_CROP, _OPERATION, _SIGN, _CUTOUT = 2, 3, 4, 5
_CROP_TRIES = 10
# The operations of torchvision.transforms.RandAugment in its order.
RANDAUGMENT_OPS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
RANDAUGMENT_BINS = 31
_SIGNED = np.array([1 <= op <= 9 for op in range(len(RANDAUGMENT_OPS))])


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_mix` of every element."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, epoch: int, index: npt.ArrayLike, stream: int, draw: int = 0) -> FloatArray:
    """Uniform numbers in [0, 1), float64 [n], one per sample index, by hashing (seed, epoch, stream, draw, index).

    Args:
        seed: of the run.
        epoch: number of the epoch.
        index: integers [n], at least 0.
        stream: what the numbers are for; different pairs of stream and draw give independent numbers.
        draw: number of the draw within the stream.
    """
    key = 0
    for part in (seed, epoch, (stream << 16) | draw):
        key = _mix((key + part + _GAMMA) & _MASK)
    counter = np.asarray(index).astype(np.uint64)
    # Twice: splitmix sequences share one increment, so keys that differ by a multiple of it would be shifted copies.
    bits = _mix_array(_mix_array(counter * np.uint64(_GAMMA) + np.uint64(key)) ^ np.uint64(_mix(key)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def flips(seed: int, epoch: int, index: npt.ArrayLike, view: str, probability: float) -> npt.NDArray[np.bool_]:
    """Whether each sample is mirrored in a view, bool [n].

    Args:
        seed: of the run.
        epoch: number of the epoch.
        index: sample indices, int [n].
        view: "weak" or "strong", which are independent of each other.
        probability: of a flip.
    """
    return uniform(seed, epoch, index, _FLIP[view]) < probability


def randaugment_choice(
    seed: int, epoch: int, index: npt.ArrayLike, num_ops: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Operation ids into `RANDAUGMENT_OPS` and signs (1 or -1; 1 where the operation has none), int32 [n, num_ops].

    As torchvision draws them: uniform with replacement, and a fair sign for signed operations.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        index: sample indices, int [n].
        num_ops: operations per image.
    """
    draws = range(num_ops)
    ops = [uniform(seed, epoch, index, _OPERATION, k) * len(RANDAUGMENT_OPS) for k in draws]
    ids = np.stack(ops, axis=-1).astype(np.int32) if num_ops else np.empty((len(np.asarray(index)), 0), np.int32)
    negative = np.stack([uniform(seed, epoch, index, _SIGN, k) < 0.5 for k in draws], axis=-1) if num_ops else ids > 0
    return ids, np.where(negative & _SIGNED[ids], -1, 1).astype(np.int32)


def _linspace(start: float, end: npt.ArrayLike, step: int) -> npt.NDArray[np.float32]:
    """Element `step` of `torch.linspace(start, end, 31)`, with its float32 arithmetic."""
    first, end = np.float32(start), np.asarray(end, np.float32)
    width = (end - first) / np.float32(RANDAUGMENT_BINS - 1)
    if step < RANDAUGMENT_BINS // 2:
        return first + width * np.float32(step)
    return end - width * np.float32(RANDAUGMENT_BINS - 1 - step)


def randaugment_matrices(
    ops: npt.NDArray[np.int32],
    signs: npt.NDArray[np.int32],
    magnitude: int,
    width: npt.ArrayLike,
    height: npt.ArrayLike,
) -> FloatArray:
    """Maps from output to input pixel coordinates of the geometric operations, float64 [n, 2, 3]; else the identity.

    The same maps as torchvision hands to Pillow: shears keep the top left corner, rotations the centre, translations
    are whole pixels towards zero of a fraction of the image's side.

    Args:
        ops: int32 [n], ids into `RANDAUGMENT_OPS`.
        signs: int32 [n], 1 or -1.
        magnitude: RandAugment magnitude 0..30.
        width: of the images as shown, in pixels, int [n].
        height: of the images as shown, in pixels, int [n].
    """
    widths, heights = np.asarray(width, np.float64), np.asarray(height, np.float64)
    sign = signs.astype(np.float64)
    out = np.zeros((len(ops), 2, 3))
    out[:, 0, 0] = out[:, 1, 1] = 1.0
    shear = float(_linspace(0.0, 0.3, magnitude)) * sign
    out[:, 0, 1] = np.where(ops == 1, shear, 0.0)
    out[:, 1, 0] = np.where(ops == 2, shear, 0.0)
    for op, row, sides in ((3, 0, widths), (4, 1, heights)):
        moved = np.trunc(_linspace(0.0, 150.0 / 331.0 * sides, magnitude)) * sign
        out[:, row, 2] = np.where(ops == op, -moved, 0.0)
    angle = -np.radians(float(_linspace(0.0, 30.0, magnitude)) * sign)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = widths / 2.0, heights / 2.0
    rotation = np.stack(
        [np.stack([cos, sin, x - cos * x - sin * y], -1), np.stack([-sin, cos, y + sin * x - cos * y], -1)], 1
    )
    out[ops == 5] = rotation[ops == 5]
    return out


def randaugment_factor(magnitude: int, sign: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Factor of Brightness, Color, Contrast and Sharpness, float32 [n] (1 leaves the image as it is)."""
    return (1.0 + float(_linspace(0.0, 0.9, magnitude)) * sign).astype(np.float32)


def posterize_mask(magnitude: int) -> int:
    """Bit mask that Posterize leaves of every value, 0..255."""
    bits = 8 - int(np.round(np.float32(magnitude) / np.float32((RANDAUGMENT_BINS - 1) / 4)))
    return 255 & ~(2 ** (8 - bits) - 1)


def solarize_threshold(magnitude: int) -> int:
    """Smallest value that Solarize inverts, 0..255."""
    return math.ceil(float(_linspace(255.0, 0.0, magnitude)))


def cutouts(
    seed: int, epoch: int, index: npt.ArrayLike, side: int, fraction: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cutout's squares: top left corners [n, 2], heights and widths [n, 2] in pixels, and colours [n, 3], all float32.

    The centre is a pixel of the image, uniform, and what lies outside is cut off. Colours are uniform in 0..255.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        index: sample indices, int [n].
        side: of the square images in pixels.
        fraction: side of the square as a fraction of that.

    Source: Cutout (DeVries and Taylor, 2017), with the colour of the programs of ASL.
    """
    half = int(fraction * side + 0.5) // 2
    centre = np.stack([np.floor(uniform(seed, epoch, index, _CUTOUT, k) * side) for k in range(2)], -1)
    start, stop = np.clip(centre - half, 0, side), np.clip(centre + half, 0, side)
    colour = np.stack([np.floor(uniform(seed, epoch, index, _CUTOUT, k) * 256) for k in range(2, 5)], -1)
    return start.astype(np.float32), (stop - start).astype(np.float32), colour.astype(np.float32)


def crop_boxes(
    seed: int, epoch: int, index: npt.ArrayLike, width: npt.ArrayLike, height: npt.ArrayLike, scale: float
) -> npt.NDArray[np.int32]:
    """Random-resized-crop boxes (top, left, height, width) in pixels, int32 [n, 4].

    As torchvision.transforms.RandomResizedCrop: an area uniform in [scale, 1] of the image's, an aspect ratio
    log-uniform in [3/4, 4/3], ten tries, and then the largest central box with an allowed ratio.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        index: sample indices, int [n].
        width: of the images as shown, in pixels, int [n].
        height: of the images as shown, in pixels, int [n].
        scale: smallest fraction of the area.
    """
    widths, heights = np.asarray(width, np.int64), np.asarray(height, np.int64)
    low, high = 3.0 / 4.0, 4.0 / 3.0
    tall, wide = widths < low * heights, widths > high * heights
    box_h = np.where(tall, np.rint(widths / low), heights).astype(np.int64)
    box_w = np.where(wide, np.rint(heights * high), widths).astype(np.int64)
    box = np.stack([(heights - box_h) // 2, (widths - box_w) // 2, box_h, box_w], -1)
    # Tries in reverse, so that the first that fits is the one that stays.
    for attempt in reversed(range(_CROP_TRIES)):
        area, ratio, top, left = (uniform(seed, epoch, index, _CROP, 4 * attempt + k) for k in range(4))
        target = widths * heights * (scale + (1.0 - scale) * area)
        aspect = np.exp(math.log(low) + (math.log(high) - math.log(low)) * ratio)
        try_w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        try_h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        fits = (try_w > 0) & (try_w <= widths) & (try_h > 0) & (try_h <= heights)
        top_px = np.floor(top * (heights - try_h + 1)).astype(np.int64)
        left_px = np.floor(left * (widths - try_w + 1)).astype(np.int64)
        box = np.where(fits[:, None], np.stack([top_px, left_px, try_h, try_w], -1), box)
    return box.astype(np.int32)
