"""What the images of a batch give to DALI's graph and to the threads that make views: paths, turns, sizes, filters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.data.bad_images import read_size
from spml_fast.data.manifest import Split


def encoded_paths(split: Split, index: npt.NDArray[np.int64]) -> dict[str, Any]:
    """File names as DALI takes them: bytes, in any encoding. Nothing for shards, whose images `Stream` hands in."""
    if split.shards is not None:
        return {}
    return {"path": [np.frombuffer(split.path(i).encode("utf-8", "surrogateescape"), np.uint8) for i in index.tolist()]}


def is_oriented(split: Split) -> bool:
    """Whether any image of the split has to be turned."""
    return bool((split.orientation != 1).any())


# EXIF orientation 1..8 as an optional swap of rows and columns and then mirrors: (turn: 0 nothing, 1 mirrors only,
# 2 swap and mirrors; mirror horizontally; mirror vertically).
_TURNS = np.array(
    [(0, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (2, 0, 0), (2, 1, 0), (2, 1, 1), (2, 0, 1)], np.int32
)


def turns(split: Split, index: npt.NDArray[np.int64]) -> dict[str, Any]:
    """How each image is turned upright."""
    rows = _TURNS[np.asarray(split.orientation[index])]
    return {
        name: np.ascontiguousarray(rows[:, k]) for k, name in enumerate(("turn", "turn_horizontal", "turn_vertical"))
    }


def sharpness_kernels(factor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Filters that blend an image with Pillow's smoothed one, float32 [n, 3, 3]."""
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
    same = np.zeros((3, 3), np.float32)
    same[1, 1] = 1
    return factor[:, None, None] * same + (1 - factor)[:, None, None] * smooth


def shown_sizes(split: Split, index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Widths and heights as shown, int64 [n] each; read from the images where preparation did not."""
    width, height = split.width[index].astype(np.int64), split.height[index].astype(np.int64)
    for position in np.flatnonzero((width <= 0) | (height <= 0)).tolist():
        sample = int(index[position])
        width[position], height[position] = read_size(split, sample)
    return width, height


def smallest_sizes(
    split: Split,
    index: npt.NDArray[np.int64],
    side: int,
    crop: npt.NDArray[np.integer[Any]] | None = None,
    full: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Width and height as stored, int64 [n, 2], that an image needs for what a view shows of it to have `side` pixels.

    Args:
        split: the images.
        index: int64 [n].
        side: of the view.
        crop: height and width of what it shows, [n, 2], of an image as shown; None for all of it.
        full: height and width of the image as shown, int64 [n, 2].
    """
    need = np.full((len(index), 2), side, np.int64)
    if crop is not None and full is not None:
        # Rounded up: as many pixels of the crop as of the view.
        need = -(-side * full // np.maximum(crop, 1)).astype(np.int64)
    # Height and width as shown are width and height of an image that is stored on its side.
    on_side = np.asarray(split.orientation[index]) >= 5
    return np.where(on_side[:, None], need, need[:, ::-1])
