"""Label arrays in the encodings of published code, converted to label codes.

Source: docs/sources.md#label-encodings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import require_regular
from spml_fast.data.manifest_check import ARRAY_ERRORS
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype
from spml_fast.prepare.observed_labels import CHUNK_ENTRIES

ImportFormat = Literal["spml", "openimages", "nan", "soft"]


@dataclass(frozen=True)
class Imported:
    """Labels read from an array in one of the published encodings.

    Attributes:
        labels: the codes.
        soft: for the format "soft", float32 [nnz] beside `labels.codes`: the frozen soft label of entries whose code
            is unknown, nan elsewhere. Soft values are a method's state, so they are kept beside the codes.
    """

    labels: SparseLabels
    soft: npt.NDArray[np.float32] | None = None


_MEANING = {
    "spml": "1 positive, 0 unobserved, -1 observed negative",
    "openimages": "1 positive, 0 negative, -1 unobserved",
    "nan": "1 positive, 0 negative, NaN unobserved",
    "soft": "1 positive, 0 unobserved, -s a soft label s between 0 and 1",
}


def _check_array(values: npt.NDArray[Any], fmt: ImportFormat, num_classes: int | None, source: str) -> None:
    """Raise `UserError` if an array cannot hold labels, whatever its values."""
    if fmt not in get_args(ImportFormat):
        raise UserError(f"label format {fmt!r} does not exist; choose {', '.join(get_args(ImportFormat))}")
    if values.ndim != 2:
        raise UserError(f"{source} has shape {values.shape}; labels need two dimensions, images x classes")
    if values.dtype.kind not in "biuf":
        raise UserError(f"{source} has dtype {values.dtype}; labels must be bool, integers or floats")
    if values.shape[1] == 0:
        raise UserError(f"{source} has no class (shape {values.shape})")
    if num_classes is not None and values.shape[1] != num_classes:
        raise UserError(f"{source} has {values.shape[1]} columns, but there are {num_classes} classes")


def import_labels(
    values: npt.NDArray[Any], fmt: ImportFormat, num_classes: int | None = None, source: str = "label array"
) -> Imported:
    """Read a dense label array [N, C] of bool, integers or floats in one of the four published encodings.

    The caller names the encoding; it is never guessed, since "spml" and "openimages" use the same values with 0 and
    -1 swapped. The array may be memory-mapped; it is read in blocks of rows. Unobserved entries are not listed.

    Args:
        values: the array [N, C].
        fmt: "spml", "openimages", "nan" or "soft".
        num_classes: the C that is expected, when known.
        source: name of the array in error messages, such as its file.

    Raises:
        UserError: unknown format, wrong shape or dtype, or a value that the format does not have; names the first
            offending row and column.
    """
    _check_array(values, fmt, num_classes, source)
    classes_type = class_dtype(values.shape[1])
    row_counts = [np.zeros(1, np.int64)]
    classes = [np.empty(0, classes_type)]
    codes = [np.empty(0, np.int8)]
    soft = [np.empty(0, np.float32)]
    step = max(1, CHUNK_ENTRIES // values.shape[1])
    for start in range(0, len(values), step):
        block = np.asarray(values[start : start + step])
        if block.dtype.kind in "bu":
            # Unsigned values must not wrap when they are negated below.
            block = block.astype(np.float64)
        allowed, listed = _read_block(block, fmt)
        if not allowed.all():
            raise _invalid_value(block, allowed, start, fmt, source)
        rows, columns = np.nonzero(listed)
        entries = block[rows, columns]
        row_counts.append(np.bincount(rows, minlength=len(block)))
        classes.append(columns.astype(classes_type))
        if fmt == "soft":
            codes.append(np.where(entries == 1, POSITIVE, UNKNOWN).astype(np.int8))
            soft.append(np.where(entries < 0, -entries, np.nan).astype(np.float32))
        else:
            codes.append(np.where(entries == 1, POSITIVE, NEGATIVE).astype(np.int8))
    labels = SparseLabels(
        np.cumsum(np.concatenate(row_counts), dtype=np.int64),
        np.concatenate(classes),
        np.concatenate(codes),
        values.shape[1],
        UNKNOWN,
    )
    return Imported(labels, np.concatenate(soft) if fmt == "soft" else None)


def load_array(path: Path) -> npt.NDArray[Any]:
    """A .npy file, memory-mapped; never one that holds Python objects. Raises `UserError` naming it."""
    try:
        require_regular(path)
        # Reads .npy files alone: archives and pickles, which `np.load` takes too, are refused by their first bytes.
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} is not a NumPy array of text or numbers ({error})") from error


def observed_from_file(path: Path, fmt: ImportFormat, known: SparseLabels) -> SparseLabels:
    """Observed labels of the official training rows from a published array, such as Cole's `labels_obs.npy`.

    Args:
        path: .npy, dense [rows of `known`, classes], in the order of the official rows and classes.
        fmt: its encoding, as in `import_labels`.
        known: the rows' annotations.

    Raises:
        UserError: another shape or encoding; soft labels; labels that contradict the annotations, which shows that rows
            or classes are in another order.
    """
    if fmt == "soft":
        raise UserError("soft labels are a method's state, not observed labels; import spml, openimages or nan arrays")
    values = load_array(path)
    if len(values) != len(known):
        raise UserError(f"{path} has {len(values):,} rows, but there are {len(known):,} official training images")
    labels = import_labels(values, fmt, known.num_classes, str(path)).labels
    rows, classes, codes = labels.entry_rows(), np.asarray(labels.classes), np.asarray(labels.codes)
    step = max(1, CHUNK_ENTRIES // known.num_classes)
    wrong, first = 0, (0, 0)
    for start in range(0, len(known), step):
        of_block = (rows >= start) & (rows < start + step)
        truth = known.rows(range(start, min(start + step, len(known))))
        expected = truth[rows[of_block] - start, classes[of_block]]
        differs = np.flatnonzero((expected != UNKNOWN) & (expected != codes[of_block]))
        if len(differs) and not wrong:
            first = int(rows[of_block][differs[0]]), int(classes[of_block][differs[0]])
        wrong += len(differs)
    if wrong:
        raise UserError(
            f"{path}: {wrong:,} of {len(codes):,} observed labels contradict the annotations, the first in row "
            f"{first[0]}, column {first[1]}; its rows or classes are in another order, or its format is not {fmt}"
        )
    return labels


def _invalid_value(
    block: npt.NDArray[Any], allowed: npt.NDArray[np.bool_], start: int, fmt: ImportFormat, source: str
) -> UserError:
    """The error that names the first value of a block, the rows from `start` on, that a format does not have."""
    row, column = (int(i) for i in np.argwhere(~allowed)[0])
    value = block[row, column]
    hint = ""
    if fmt == "soft" and value == -1:
        hint = "; -1 would be a soft label of exactly 1, so this may be an array in the format spml"
    return UserError(
        f"{source}: row {start + row}, column {column} holds {value}, "
        f"which the format {fmt} does not have ({_MEANING[fmt]}){hint}"
    )


def _read_block(block: npt.NDArray[Any], fmt: ImportFormat) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(entries whose value the format has, entries that are to be listed), bool of the block's shape."""
    one, zero = block == 1, block == 0
    if fmt == "spml":
        negative = block == -1
        return one | zero | negative, one | negative
    if fmt == "openimages":
        return one | zero | (block == -1), one | zero
    if fmt == "nan":
        return one | zero | np.isnan(block), one | zero
    soft = (block < 0) & (block > -1)
    return one | zero | soft, one | soft
