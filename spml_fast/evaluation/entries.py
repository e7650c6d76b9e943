"""Scores and label codes as arrays: checks, blocks, small arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from spml_fast.core.errors import UserError

Definition = Literal["sklearn", "rank", "voc"]

EmptyClasses = Literal["zero", "skip_unlabelled", "skip", "skip_one_sided"]

FloatArray = npt.NDArray[np.float64]

IntArray = npt.NDArray[np.int64]

Part = TypeVar("Part")
Result = TypeVar("Result")

BoolArray = npt.NDArray[np.bool_]

# Known entries that are sorted at once in the dense form: 8 MB of keys, which a sort keeps close to the processor.
BLOCK_ENTRIES = 1 << 20
# Memory bounds what more would win.
_MOST_THREADS = 8


def ratio(part: Any, whole: Any) -> float:
    """part / whole, 0 when whole is 0."""
    return float(part) / float(whole) if whole else 0.0


def ratios(part: IntArray, whole: IntArray) -> FloatArray:
    """Element-wise part / whole, 0 where whole is 0 (part is 0 there too)."""
    return part / np.maximum(whole, 1)


def harmonic(a: float, b: float) -> float:
    """Harmonic mean, 0 when both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def per_cent(fraction: float) -> float | None:
    """100 x fraction; None for NaN, which JSON does not know."""
    return None if math.isnan(fraction) else 100 * fraction


def row_chunks(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) of rows that hold about `BLOCK_ENTRIES` entries of `width` columns."""
    step = max(1, BLOCK_ENTRIES // max(width, 1))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def in_threads(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """What `work` gives for every part, in their order, on as many threads as this process may compute with.

    NumPy lets go of the interpreter in what takes long: sorting, counting, arithmetic. Of several errors the one of the
    first part is raised.
    """
    threads = min(torch.get_num_threads(), len(parts), _MOST_THREADS)
    if threads <= 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UserError` unless the value of the option `what` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{what} is {value!r}; choose one of {', '.join(choices)}")


def _check_dtypes(score: npt.NDArray[Any], code: npt.NDArray[Any]) -> None:
    if score.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"scores must be float32 (or float16, float64), not {score.dtype}")
    if code.dtype.kind not in "iub":
        raise ValueError(f"label codes must be integers 1, 0, -1, not {code.dtype}")


def as_dense(scores: npt.ArrayLike, codes: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Arrays of checked shape and dtype; values are checked chunk by chunk, where they are read."""
    scores_a, codes_a = np.asarray(scores), np.asarray(codes)
    if scores_a.ndim != 2 or scores_a.shape != codes_a.shape:
        raise ValueError(f"scores and codes must both be [N, C], not {scores_a.shape} and {codes_a.shape}")
    if scores_a.shape[1] == 0:
        raise ValueError("there must be at least one class")
    _check_dtypes(scores_a, codes_a)
    return scores_a, codes_a.view(np.int8) if codes_a.dtype == np.bool_ else codes_a


def as_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    row: npt.ArrayLike | None,
    class_names: Sequence[str] | None,
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.floating], npt.NDArray[np.integer], npt.NDArray[np.integer] | None]:
    """Checked one-dimensional arrays of one length.

    Args:
        class_id: integer [M], 0..C-1.
        score: floating [M] without NaN.
        code: integer or bool [M]: 1, 0, -1.
        num_classes: C.
        row: non-negative integer [M], or None.
        class_names: names for error messages.

    Raises:
        UserError: a NaN score, a code outside {1, 0, -1}, or a class outside 0..C-1.
        ValueError: wrong shape or dtype.
    """
    class_a, score_a, code_a = np.asarray(class_id), np.asarray(score), np.asarray(code)
    row_a = None if row is None else np.asarray(row)
    arrays = [class_a, score_a, code_a] + ([] if row_a is None else [row_a])
    if any(a.ndim != 1 or len(a) != len(class_a) for a in arrays):
        raise ValueError(f"class ids, scores, codes (and rows) must be [M], not {[a.shape for a in arrays]}")
    if num_classes < 1:
        raise ValueError("there must be at least one class")
    _check_dtypes(score_a, code_a)
    if class_a.dtype.kind not in "iu" or (row_a is not None and row_a.dtype.kind not in "iu"):
        raise ValueError("class ids and rows must be integers")
    if not len(class_a):
        return class_a, score_a, code_a, row_a
    if class_a.min() < 0 or class_a.max() >= num_classes:
        at = int(np.flatnonzero((class_a < 0) | (class_a >= num_classes))[0])
        raise UserError(f"pair {at} names class {class_a[at]}; the classes are 0..{num_classes - 1}")
    if class_a.dtype == np.uint64:
        # Older NumPy does not count these.
        class_a = class_a.astype(np.int64)
    if row_a is not None and row_a.min() < 0:
        raise ValueError(f"pair {int(row_a.argmin())} has the negative row {row_a.min()}")

    def where(at: int) -> str:
        place = f"pair {at}" if row_a is None else f"row {row_a[at]}"
        return f"of class {_class_text(int(class_a[at]), class_names)} in {place}"

    bad = np.isnan(score_a)
    if bad.any():
        raise UserError(f"the score {where(int(bad.argmax()))} is NaN; {_NAN_ADVICE}")
    if code_a.dtype == np.bool_:
        return class_a, score_a, code_a.view(np.int8), row_a
    if code_a.min() < -1 or code_a.max() > 1:
        at = int(np.flatnonzero((code_a < -1) | (code_a > 1))[0])
        raise UserError(f"the label code {where(at)} is {code_a[at]}; {_CODE_ADVICE}")
    return class_a, score_a, code_a, row_a


_NAN_ADVICE = "the model has diverged or was loaded wrongly, so there is nothing to rank"

_CODE_ADVICE = "codes are 1 (positive), 0 (negative) and -1 (unknown): convert the labels first"


def check_dense(
    scores: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    start: int,
    class_names: Sequence[str] | None,
) -> None:
    """Refuse NaN scores and impossible codes.

    Args:
        scores: floating [n, C].
        codes: integer [n, C].
        start: number of the first of these rows, for error messages.
        class_names: names for error messages.

    Raises:
        UserError: a NaN score or a code outside {1, 0, -1}.
    """
    bad = np.isnan(scores)
    if bad.any():
        r, c = (int(i[0]) for i in np.nonzero(bad))
        raise UserError(f"the score of class {_class_text(c, class_names)} in row {start + r} is NaN; {_NAN_ADVICE}")
    if codes.min(initial=0) < -1 or codes.max(initial=0) > 1:
        r, c = (int(i[0]) for i in np.nonzero((codes < -1) | (codes > 1)))
        text = f"the label code of class {_class_text(c, class_names)} in row {start + r} is {codes[r, c]}"
        raise UserError(f"{text}; {_CODE_ADVICE}")


def _class_text(c: int, class_names: Sequence[str] | None) -> str:
    return str(c) if class_names is None or c >= len(class_names) else f"{c} ({class_names[c]})"


def dense_label_counts(
    scores: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], class_names: Sequence[str] | None
) -> tuple[IntArray, IntArray]:
    """Known positives and known entries of each class, int64 [C]; refuses bad values on the way."""

    def count(rows: tuple[int, int]) -> IntArray:
        code = codes[slice(*rows)]
        check_dense(scores[slice(*rows)], code, rows[0], class_names)
        return np.stack([np.count_nonzero(code == 1, axis=0), np.count_nonzero(code >= 0, axis=0)])

    counts = in_threads(count, list(row_chunks(*codes.shape)))
    positives, known = sum(counts, np.zeros((2, codes.shape[1]), np.int64))
    return positives, known


def as_groups(groups: npt.ArrayLike, num_classes: int) -> IntArray:
    """int64 [C] of integers [C]; raises `ValueError` for another shape or dtype."""
    groups_a = np.asarray(groups)
    if groups_a.shape != (num_classes,) or groups_a.dtype.kind not in "iu":
        raise ValueError(f"groups must be integers [{num_classes}], not {groups_a.dtype} {groups_a.shape}")
    return groups_a.astype(np.int64)
