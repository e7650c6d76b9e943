"""Boxes of objects under EXIF orientations: from pixels of one frame to fractions of another.

Boxes of N images are (indptr int64 [N + 1], [K, 5] of class, x0, y0, x1, y1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# EXIF orientation -> the one that undoes it.
TURNED_BACK = np.array([1, 1, 2, 3, 4, 5, 8, 7, 6], np.uint8)


def pixels_to_fractions(
    boxes: tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]],
    width: npt.NDArray[np.int32],
    height: npt.NDArray[np.int32],
    back: npt.NDArray[np.uint8],
    applied: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float32]:
    """Boxes [K, 5] in pixels -> fractions of the image as the loader turns it, within 0..1.

    Args:
        boxes: of N images.
        width: [N] of the images that the boxes were drawn on, in pixels.
        height: [N] of the same.
        back: [N] EXIF orientation that leads from those images to the stored ones.
        applied: [N] EXIF orientation that the loader applies to the stored ones.
    """
    indptr, values = boxes
    row = np.repeat(np.arange(len(width)), np.diff(indptr))
    out = np.asarray(values, np.float64).copy()
    scale = np.stack([width, height, width, height], 1)[row]
    out[:, 1:] = np.clip(out[:, 1:] / scale, 0, 1)
    return turn_boxes(turn_boxes(out.astype(np.float32), back[row]), applied[row])


def turn_fractions(
    boxes: tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]],
    exif: npt.NDArray[np.uint8],
    applied: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float32]:
    """Boxes as fractions of the image as EXIF shows it -> of the image as the loader turns it.

    Args:
        boxes: of N images.
        exif: [N] orientation in the images' own data.
        applied: [N] orientation that the loader applies.
    """
    indptr, values = boxes
    row = np.repeat(np.arange(len(exif)), np.diff(indptr))
    stored = turn_boxes(np.asarray(values, np.float32), TURNED_BACK[exif][row])
    return turn_boxes(stored, applied[row])


def turn_boxes(boxes: npt.NDArray[np.float32], orientation: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Boxes [K, 5] as fractions of the stored image -> of the image that EXIF `orientation` [K] shows."""
    out = boxes.copy()
    x, y = boxes[:, [1, 3]], boxes[:, [2, 4]]
    # Orientation o: the point as shown of a stored point (x, y); EXIF 2.3, tag 0x0112.
    turned = {
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (1 - y, x),
        7: (1 - y, 1 - x),
        8: (y, 1 - x),
    }
    for code, (new_x, new_y) in turned.items():
        mask = orientation == code
        out[mask, 1], out[mask, 3] = new_x[mask].min(1), new_x[mask].max(1)
        out[mask, 2], out[mask, 4] = new_y[mask].min(1), new_y[mask].max(1)
    return out
