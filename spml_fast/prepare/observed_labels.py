"""Which labels training may see: the published single-positive draw, random fractions, and the published split.

All draws take known labels (`SparseLabels`) and give observed labels (`SparseLabels`) of the same rows; labels that are
not observed become unknown. They run over *all* official rows in file order, before a validation split is cut off
and before unreadable images are dropped, so that neither changes the labels of any other image.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021;
docs/sources.md#protocol, docs/sources.md#golden-values.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype

PUBLISHED_SEED = 1200

# Entries drawn at a time where a fully annotated set has to be drawn densely (int8 and bool temporaries).
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class ObservationScheme:
    """How observed labels are drawn.

    Attributes:
        kind: "all" shows all known labels, "single" the published draw, "keep" a random fraction.
        positives: positives per row that "single" keeps.
        negatives: negatives per row that "single" keeps.
        fraction: probability that "keep" keeps a known label.
    """

    kind: Literal["all", "single", "keep"]
    positives: int = 1
    fraction: float = 1.0
    negatives: int = 0

    @classmethod
    def parse(cls, text: str) -> ObservationScheme:
        """Read `all`, `single`, `single=K`, `single=K,negatives=L` or `keep=P`. Raises `UserError` on anything else."""
        text_of_scheme, comma, more = text.partition(",")
        kind, equals, value = text_of_scheme.partition("=")
        negatives = 0
        if comma:
            name, _, number = more.partition("=")
            if kind != "single" or name != "negatives" or not (number.isascii() and number.isdigit()):
                raise UserError(f"--observe {text}: what follows a comma is negatives=L, as in single=1,negatives=1")
            negatives = int(number)
        if kind == "all" and not equals:
            return cls("all")
        if kind == "single":
            if not equals:
                return cls("single", negatives=negatives)
            if value.isascii() and value.isdigit() and int(value) >= 1:
                return cls("single", positives=int(value), negatives=negatives)
            raise UserError(f"--observe {text}: single=K needs a whole number K of at least 1")
        if kind == "keep":
            try:
                fraction = float(value)
            except ValueError:
                raise UserError(f"--observe {text}: keep=P needs a probability P, such as keep=0.3") from None
            # Written so that nan fails too.
            if not 0 < fraction <= 1:
                raise UserError(f"--observe {text}: the probability must be above 0 and at most 1")
            return cls("keep", fraction=fraction)
        raise UserError(f"--observe {text}: choose all, single, single=K, single=K,negatives=L or keep=P")

    def draw(self, known: SparseLabels, seed: int, phase: str) -> SparseLabels | None:
        """Observed labels of one phase, such as the official train rows; None for "all"."""
        if self.kind == "single":
            return draw_published(known, seed, self.positives, self.negatives)
        if self.kind == "keep":
            return draw_fraction(known, self.fraction, seed, phase)
        return None


def draw_published(
    known: SparseLabels, seed: int = PUBLISHED_SEED, positives: int = 1, negatives: int = 0
) -> SparseLabels:
    """The observed labels that the single-positive literature uses, bit for bit.

    Legacy MT19937, one fresh generator per phase; for every row in file order the positives (ascending) are shuffled
    and the first `positives` kept; then the negatives are shuffled as well and the first `negatives` kept. With none
    kept the second shuffle has no result, but it advances the generator, and leaving it out changes a large part of
    the drawn labels.

    Rows without a positive observe no positive. In partly annotated sets only known negatives are shuffled.

    Args:
        known: labels of one phase.
        seed: 1200 is the published one.
        positives: positives per row that are kept.
        negatives: negatives per row that are kept; the papers' benchmarks have none.

    Returns:
        Labels with default -1 that list nothing but observed ones.
    """
    rng = np.random.RandomState(seed)
    num_negatives = known.row_counts(NEGATIVE)
    if known.default == NEGATIVE:
        num_negatives = num_negatives + known.num_classes - np.diff(known.indptr)
    indptr = np.zeros(len(known) + 1, np.int64)
    kept_counts = np.minimum(known.row_counts(POSITIVE), positives) + np.minimum(num_negatives, negatives)
    np.cumsum(kept_counts, out=indptr[1:])
    kept = np.empty(indptr[-1], class_dtype(known.num_classes))
    codes = np.full(indptr[-1], POSITIVE, np.int8)
    # `shuffle` draws by length alone, so where none is kept the content of the negatives' array does not matter.
    shuffled = np.zeros(known.num_classes, np.int64)
    for row in range(len(known)):
        entries = slice(int(known.indptr[row]), int(known.indptr[row + 1]))
        listed, listed_codes = known.classes[entries], known.codes[entries]
        classes = np.array(listed[listed_codes == POSITIVE], dtype=np.int64)
        rng.shuffle(classes)
        chosen = classes[:positives]
        of_row = slice(int(indptr[row]), int(indptr[row + 1]))
        if not negatives:
            rng.shuffle(shuffled[: num_negatives[row]])
            kept[of_row] = np.sort(chosen)
            continue
        absent = _negatives_of_row(known, listed, listed_codes)
        rng.shuffle(absent)
        drawn = np.concatenate([chosen, absent[:negatives]])
        order = np.argsort(drawn)
        kept[of_row] = drawn[order]
        codes[of_row][order >= len(chosen)] = NEGATIVE
    return SparseLabels(indptr, kept, codes, known.num_classes, UNKNOWN)


def _negatives_of_row(
    known: SparseLabels, listed: npt.NDArray[np.integer], codes: npt.NDArray[np.int8]
) -> npt.NDArray[np.int64]:
    """Ids of a row's negatives, ascending, int64."""
    if known.default != NEGATIVE:
        return np.array(listed[codes == NEGATIVE], dtype=np.int64)
    negative = np.ones(known.num_classes, np.bool_)
    negative[listed[codes != NEGATIVE]] = False
    return np.flatnonzero(negative)


def draw_fraction(known: SparseLabels, fraction: float, seed: int, phase: str = "train") -> SparseLabels:
    """Keep every known label, positive or negative, independently with probability `fraction`.

    A pure function of (known labels, fraction, seed, phase name). Work and memory follow the listed entries for
    partly annotated sets; a fully annotated set is drawn in blocks of rows, and the result lists either the kept or the
    hidden labels, whichever are fewer.

    Args:
        known: labels of one phase.
        fraction: probability, 0 to 1.
        seed: of the draw.
        phase: name of the phase; each has its own random numbers.

    Raises:
        ValueError: `fraction` is not in 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not a probability")
    rng = np.random.default_rng([seed, zlib.crc32(phase.encode())])
    if known.default == UNKNOWN:
        keep = (np.asarray(known.codes) != UNKNOWN) & (rng.random(len(known.codes)) < fraction)
        counts = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        indptr = counts[np.asarray(known.indptr)]
        return SparseLabels(indptr, known.classes[keep], known.codes[keep], known.num_classes, UNKNOWN)

    default = NEGATIVE if fraction > 0.5 else UNKNOWN
    step = max(1, CHUNK_ENTRIES // known.num_classes)
    row_counts = [np.zeros(1, np.int64)]
    classes = [np.empty(0, class_dtype(known.num_classes))]
    codes = [np.empty(0, np.int8)]
    for start in range(0, len(known), step):
        dense = _dense_rows(known, start, min(start + step, len(known)))
        dense[rng.random(dense.shape, dtype=np.float32) >= fraction] = UNKNOWN
        rows, columns = np.nonzero(dense != default)
        row_counts.append(np.bincount(rows, minlength=len(dense)))
        classes.append(columns.astype(class_dtype(known.num_classes)))
        codes.append(dense[rows, columns])
    indptr = np.cumsum(np.concatenate(row_counts), dtype=np.int64)
    return SparseLabels(indptr, np.concatenate(classes), np.concatenate(codes), known.num_classes, default)


def _dense_rows(labels: SparseLabels, start: int, stop: int) -> npt.NDArray[np.int8]:
    """Codes int8 [stop - start, C] of a run of rows, without a loop over rows."""
    first, last = int(labels.indptr[start]), int(labels.indptr[stop])
    out = np.full((stop - start, labels.num_classes), labels.default, np.int8)
    rows = np.repeat(np.arange(stop - start), np.diff(labels.indptr[start : stop + 1]))
    out[rows, labels.classes[first:last]] = labels.codes[first:last]
    return out


def published_split(
    num_rows: int, seed: int = PUBLISHED_SEED, fraction: float = 0.2
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The published cut of the official training rows into train and validation.

    Legacy `permutation(num_rows)`; the last round(fraction * num_rows) are validation; both sides in file order.

    Returns:
        (train rows, validation rows), int64, ascending.
    """
    num_val = round(fraction * num_rows)
    order = np.random.RandomState(seed).permutation(num_rows)
    return np.sort(order[: num_rows - num_val]).astype(np.int64), np.sort(order[num_rows - num_val :]).astype(np.int64)
