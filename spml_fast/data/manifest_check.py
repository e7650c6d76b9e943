"""Checks of the arrays of a Manifest when they are opened: what a kernel or a loader would follow out of bounds.

Files are made by one program and read by others, copied, cut short and edited. The ranges of 54 million labels take
0.1 s to check (docs/data.md), and opening is the last moment at which a sentence can name the file.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, read_text
from spml_fast.core.text import parse_json

ADVICE = "prepare the data again"
# What NumPy raises at files that are damaged, or are no arrays at all.
ARRAY_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    OverflowError,
    TypeError,
    SyntaxError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)
# Values checked at a time: temporary arrays of a few MB.
_CHUNK = 1 << 19
# A path from an id: braces are `{split}`, `{id}` with the width and base of a number, or doubled.
_TEMPLATE = re.compile(r"(?:[^{}]|\{\{|\}\}|\{split\}|\{id(?::0?\d{0,2}[dxXob]?)?\})*")
# Most sides of an image: what fits into an int32, as widths and heights are kept.
MAX_SIDE = 2**31 - 1


def invalid(path: Path, reason: str) -> UserError:
    """The error for a file that does not hold what it should."""
    return UserError(f"{path} is damaged: {reason}; {ADVICE}")


def load_array(path: Path, mode: Literal["r", "c"] = "r") -> npt.NDArray[Any]:
    """A .npy file, memory-mapped: `r` read-only, `c` copied on writing. Raises `UserError`."""
    try:
        with open_regular(path) as file:
            if not file.read(6) == b"\x93NUMPY":
                raise ValueError("it is no NumPy array")
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except ARRAY_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "out of memory"
        raise UserError(f"{path} cannot be read ({reason}); {ADVICE}") from error
    return cast(npt.NDArray[Any], array)


def read_meta(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError`."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise invalid(path, str(error)) from error


def check_column(path: Path, values: npt.NDArray[Any], size: int, dtypes: Sequence[type], low: int, high: int) -> None:
    """Raise `UserError` where a column is not N whole numbers of a range.

    Args:
        path: its file.
        values: the column.
        size: N.
        dtypes: types that it may have.
        low: the smallest value allowed.
        high: the largest value allowed.
    """
    if values.shape != (size,) or values.dtype not in dtypes:
        names = " or ".join(np.dtype(t).name for t in dtypes)
        raise invalid(path, f"it has {values.dtype} {list(values.shape)} instead of {names} [{size}]")
    for start in range(0, size, _CHUNK):
        part = values[start : start + _CHUNK]
        if int(part.min()) < low or int(part.max()) > high:
            row = start + int(np.argmax((part < low) | (part > high)))
            raise invalid(path, f"value {row} is {values[row]}, not between {low} and {high}")


def check_offsets(path: Path, offsets: npt.NDArray[Any], size: int, end: int) -> None:
    """Raise `UserError` where offsets do not ascend from 0 to the number of entries.

    Args:
        path: their file.
        offsets: int64 [N + 1].
        size: N.
        end: number of entries.
    """
    if offsets.shape != (size + 1,) or offsets.dtype != np.int64:
        raise invalid(path, f"it has {offsets.dtype} {list(offsets.shape)} instead of int64 [{size + 1}]")
    if int(offsets[0]) != 0 or int(offsets[-1]) != end:
        raise invalid(path, f"it runs from {offsets[0]} to {offsets[-1]} instead of from 0 to {end}")
    for start in range(0, size, _CHUNK):
        part = offsets[start : start + _CHUNK + 1]
        falls = part[1:] < part[:-1]
        if falls.any():
            raise invalid(path, f"it descends at row {start + int(np.argmax(falls))}")


def check_labels(
    folder: Path, indptr: npt.NDArray[Any], classes: npt.NDArray[Any], codes: npt.NDArray[Any], meta: Any
) -> tuple[int, int]:
    """Check sparse labels as `SparseLabels` describes them.

    Args:
        folder: of their files.
        indptr: offsets, int64 [N + 1].
        classes: class ids, int16 or int32 [nnz], ascending within a row.
        codes: int8 [nnz].
        meta: the content of labels.json.

    Returns:
        Number of classes, and code of unlisted entries.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    path = folder / "labels.json"
    num_classes, default = (meta.get(k) if isinstance(meta, dict) else None for k in ("num_classes", "default"))
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or not 0 < num_classes <= MAX_SIDE:
        raise invalid(path, f"it has {num_classes!r} as num_classes")
    if not isinstance(default, int) or isinstance(default, bool) or default not in (0, -1):
        raise invalid(path, f"it has {default!r} as default, which is 0 or -1")
    count = len(codes) if codes.ndim == 1 else -1
    check_column(folder / "codes.npy", codes, count, (np.int8,), -1, 1)
    if indptr.ndim != 1 or not len(indptr):
        raise invalid(folder / "indptr.npy", "it has no row")
    check_offsets(folder / "indptr.npy", indptr, len(indptr) - 1, count)
    check_column(folder / "classes.npy", classes, count, (np.int16, np.int32), 0, num_classes - 1)
    _check_ascending(folder / "classes.npy", indptr, classes)
    return num_classes, default


def _check_ascending(path: Path, indptr: npt.NDArray[Any], classes: npt.NDArray[Any]) -> None:
    """Raise `UserError` where a row lists a class twice, or not in ascending order."""
    for start in range(0, len(classes) - 1, _CHUNK):
        part = classes[start : start + _CHUNK + 1]
        ascends = part[1:] > part[:-1]
        first, last = np.searchsorted(indptr, (start + 1, start + len(ascends) + 1))
        # Between the last entry of a row and the first of the next one anything goes.
        ascends[indptr[first:last] - (start + 1)] = True
        if not ascends.all():
            entry = start + int(np.argmin(ascends)) + 1
            row = int(np.searchsorted(indptr, entry, "right")) - 1
            raise invalid(path, f"row {row} lists class {classes[entry]} behind class {classes[entry - 1]}")


def check_boxes(folder: Path, indptr: npt.NDArray[Any], boxes: npt.NDArray[Any], size: int, num_classes: int) -> None:
    """Check boxes.

    Args:
        folder: of their files.
        indptr: offsets, int64 [N + 1].
        boxes: float32 [K, 5] of class, x0, y0, x1, y1 in 0..1.
        size: N.
        num_classes: C.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    path = folder / "boxes.npy"
    if boxes.ndim != 2 or boxes.shape[1] != 5 or boxes.dtype != np.float32:
        raise invalid(path, f"it has {boxes.dtype} {list(boxes.shape)} instead of float32 [K, 5]")
    check_offsets(folder / "boxes_indptr.npy", indptr, size, len(boxes))
    for start in range(0, len(boxes), _CHUNK):
        part = np.asarray(boxes[start : start + _CHUNK])
        ids, corners = part[:, 0], part[:, 1:]
        # Comparisons with a number that is none are false.
        fine = (ids >= 0) & (ids < num_classes) & (ids == np.floor(ids)) & ((corners >= 0) & (corners <= 1)).all(1)
        if not fine.all():
            raise invalid(path, f"box {start + int(np.argmin(fine))} has a class or corner out of range")


def check_split_info(path: Path, name: str, info: Any) -> Mapping[str, Any]:
    """A split's entry in manifest.json, checked. Raises `UserError`."""
    where = f"split {name!r}"
    if not isinstance(info, dict) or not _is_int(info.get("size")) or not 0 <= info["size"] < 2**40:
        raise invalid(path, f"{where} has no size")
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise invalid(path, f"{where} has a name that cannot be a folder's")
    template = info.get("template")
    for text in [template] if isinstance(template, str) else template or []:
        if not isinstance(text, str) or not _TEMPLATE.fullmatch(text):
            raise invalid(path, f"{where} has the template {text!r}; only {{split}} and {{id:016x}} stand in braces")
    if not isinstance(template, str | list | None):
        raise invalid(path, f"{where} has {template!r} as its template")
    constant = info.get("constant", {})
    limits = {"width": (0, MAX_SIDE), "height": (0, MAX_SIDE), "orientation": (1, 8)}
    if not isinstance(constant, dict):
        raise invalid(path, f"{where} has {constant!r} as its constant columns")
    for key, value in constant.items():
        low, high = limits.get(key, (1, 0))
        if not _is_int(value) or not low <= value <= high:
            raise invalid(path, f"{where} has {value!r} as its constant {key!r}")
    if not isinstance(info.get("hides_labels"), bool | None):
        raise invalid(path, f"{where} has {info['hides_labels']!r} as hides_labels")
    return info


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
