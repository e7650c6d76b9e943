"""Whether a map finds the objects of its class: the pointing game, and MaxBoxAcc.

Pointing game: a map hits when its highest cell lies in a box of its class.

MaxBoxAcc: a map is upsampled bilinearly to `SIDE` pixels and scaled to 0..1; at a threshold t the pixels of t or more
fall into connected parts (8 neighbours), each with a box around it. An image of the class counts when a box overlaps a
box of the class by an IoU of d or more; the accuracy is the fraction of pairs of image and class that count, at the one
t that is best for all of them together.
    MaxBoxAcc     the box of the largest part alone, d = 0.5
    MaxBoxAccV2   the boxes of all parts, the mean over d = 0.3, 0.5, 0.7, each with its own best t

Source: docs/sources.md#maxboxacc, docs/sources.md#large-loss (pointing game).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch.nn import functional as F

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Pixels of an upsampled map on each side. 224, which the paper has, moves an edge by half a pixel of these at most, and
# takes four times as long.
SIDE = 112

THRESHOLDS = np.arange(100) / 100

# IoU of MaxBoxAcc, and those that MaxBoxAccV2 is the mean of.
OVERLAP, OVERLAPS = 0.5, (0.3, 0.5, 0.7)


def peaks(maps: npt.ArrayLike) -> FloatArray:
    """Centre (x, y) of the highest cell of every map [n, h, w] as fractions of the image, float64 [n, 2]."""
    array = np.asarray(maps)
    height, width = array.shape[1:]
    cell = array.reshape(len(array), -1).argmax(1)
    return np.stack([(cell % width + 0.5) / width, (cell // width + 0.5) / height], 1)


def cells_in_boxes(boxes: npt.ArrayLike, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which cell centres lie in any of the boxes [k, 4] (x0, y0, x1, y1 as fractions of the image), bool [h, w]."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T[:, :, None]
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    rows, columns = (y0 <= y) & (y <= y1), (x0 <= x) & (x <= x1)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def peak_in_boxes(cells: npt.ArrayLike, boxes: npt.ArrayLike) -> bool:
    """Whether the highest cell of a map [h, w], the first of equals, has its centre in one of the boxes [k, 4]."""
    array = np.asarray(cells)
    return bool(cells_in_boxes(boxes, *array.shape).flat[array.argmax()])


def boxes_of(
    boxes: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]], sample: int, class_id: int
) -> npt.NDArray[np.float32]:
    """The boxes of one class in one image, float32 [k, 4].

    Args:
        boxes: of the split.
        sample: the image.
        class_id: the class.
    """
    indptr, values = boxes
    rows = values[indptr[sample] : indptr[sample + 1]]
    return np.asarray(rows[rows[:, 0] == class_id, 1:])


def box_overlap(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Intersection over union of boxes (x0, y0, x1, y1), float64 [n, k]; 0 where both are empty.

    Args:
        first: [n, 4].
        second: [k, 4].
    """
    a, b = np.asarray(first, np.float64)[:, None], np.asarray(second, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = np.prod(np.clip(sides, 0, None), -1)
    areas = np.prod(a[..., 2:] - a[..., :2], -1) + np.prod(b[..., 2:] - b[..., :2], -1)
    union = areas - common
    return np.divide(common, union, out=np.zeros(union.shape), where=union > 0)


def scaled_map(cells: npt.NDArray[np.floating], side: int = SIDE) -> FloatArray:
    """A map [h, w] upsampled bilinearly and scaled to 0..1, float64 [side, side]; a flat one is 0 everywhere."""
    source = torch.from_numpy(np.asarray(cells, np.float64))[None, None]
    large = F.interpolate(source, size=(side, side), mode="bilinear", align_corners=False)[0, 0].numpy()
    low, high = large.min(), large.max()
    return np.asarray((large - low) / (high - low)) if high > low else np.zeros_like(large)


# Parts within a threshold, never across thresholds.
_NEIGHBOURS = np.zeros((3, 3, 3), bool)
_NEIGHBOURS[1] = True


def overlaps(
    cells: npt.NDArray[np.floating], boxes: npt.ArrayLike, side: int = SIDE, thresholds: FloatArray = THRESHOLDS
) -> tuple[FloatArray, FloatArray]:
    """How well a map's boxes overlap those of its class, at each threshold.

    Args:
        cells: the map [h, w].
        boxes: of the class, [k, 4] as fractions of the image, at least one.
        side: pixels on each side of the upsampled map.
        thresholds: [T] in 0..1, ascending.

    Returns:
        Two float64 [T]: the best IoU of the box of the largest part (the first of equals) with a box of the class, and
        the best IoU of any part's; 0 where no pixel reaches the threshold.
    """
    large = scaled_map(cells, side)
    parts, _ = ndimage.label(large[None] >= thresholds[:, None, None], _NEIGHBOURS)
    largest, best = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    places = ndimage.find_objects(parts)
    if not places:
        return largest, best
    # One number a part: its threshold, its box in pixels, how many pixels it has.
    edges = np.array([(s[0].start, s[2].start, s[1].start, s[2].stop, s[1].stop) for s in places], np.int64)
    pixels = np.bincount(parts.ravel())[1:]
    overlap = box_overlap(edges[:, 1:] / side, boxes).max(1)
    np.maximum.at(best, edges[:, 0], overlap)
    # Labels ascend with the threshold; of each threshold's parts the one of most pixels comes first.
    order = np.lexsort((np.arange(len(pixels)), -pixels, edges[:, 0]))
    first = order[np.unique(edges[order, 0], return_index=True)[1]]
    largest[edges[first, 0]] = overlap[first]
    return largest, best


@dataclass(frozen=True)
class BoxAccuracy:
    """MaxBoxAcc over pairs of image and class, in per cent.

    Attributes:
        max_box_acc: of the largest part's box, IoU 0.5.
        threshold: at which that is.
        class_mean: mean over classes of the accuracy at that threshold.
        max_box_acc_v2: of any part's box, mean over IoU 0.3, 0.5, 0.7.
        by_overlap: what `max_box_acc_v2` is the mean of.
    """

    max_box_acc: float
    threshold: float
    class_mean: float
    max_box_acc_v2: float
    by_overlap: dict[str, float]


def box_accuracy(
    largest: npt.NDArray[np.floating],
    best: npt.NDArray[np.floating],
    class_id: IntArray,
    thresholds: FloatArray = THRESHOLDS,
) -> BoxAccuracy:
    """MaxBoxAcc from the overlaps of n pairs, at least one.

    Args:
        largest: [n, T] IoU of the largest part's box, from `overlaps`.
        best: [n, T] IoU of any part's box.
        class_id: [n].
        thresholds: [T].
    """
    right = largest >= OVERLAP
    place = int(right.mean(0).argmax())
    of_class = [right[class_id == c, place].mean() for c in np.unique(class_id)]
    by_overlap = {f"{d:g}": 100 * float((best >= d).mean(0).max()) for d in OVERLAPS}
    return BoxAccuracy(
        max_box_acc=100 * float(right[:, place].mean()),
        threshold=float(thresholds[place]),
        class_mean=100 * float(np.mean(of_class)),
        max_box_acc_v2=float(np.mean(list(by_overlap.values()))),
        by_overlap=by_overlap,
    )
