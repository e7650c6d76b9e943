"""Labels that are probably missing or wrong, as a trained run sees them.

One pass over a split; of every batch's [B, C] logits those pairs (image, class) are kept that a bounded list still
has room for, so memory grows with the lists and with a batch, never with images x classes. Three lists:

    missing          unknown pairs that the model is most sure are positive
    doubtful         observed positives that it is most sure are negative
    doubtful absent  observed negatives that it is most sure are positive

Training sees `Split.observed` and so do the lists; where `Split.known` holds more (a simulation that hides labels, or
extra labels of a user), the suggestions are compared with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spml_fast.analysis.predict import check_numbers
from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_csv
from spml_fast.core.outputs import SUGGESTION_COLUMNS
from spml_fast.core.precision import autocast, inference_dtype
from spml_fast.core.text import formula_safe_path
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Split
from spml_fast.evaluation.thresholds import logit_threshold
from spml_fast.models.classifier import Classifier

NAMES = {UNKNOWN: "unknown", POSITIVE: "positive", NEGATIVE: "negative"}
# Order in which lists are printed and written; the code is that of the observed label.
KINDS = (UNKNOWN, POSITIVE, NEGATIVE)
DEPTHS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)


class BestPairs:
    """The `size` pairs of highest score over many batches; of equals the earlier image, then the smaller class id.

    Args:
        size: pairs that are kept, of each class or in all.
        num_classes: C.
        per_class: keep `size` pairs of each class.
        device: where scores are.
    """

    def __init__(self, size: int, num_classes: int, per_class: bool, device: torch.device) -> None:
        self.size, self.num_classes, self.per_class = size, num_classes, per_class
        self.key = torch.empty(0, dtype=torch.int64, device=device)
        self.score = torch.empty(0, dtype=torch.float32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        # A later pair must reach this to be among the best.
        self._floor = torch.full((num_classes if per_class else 1,), -torch.inf, device=device)

    def add(self, index: Tensor, scores: Tensor, wanted: Tensor) -> None:
        """Take pairs of a batch; batches come in ascending order of `index`.

        Args:
            index: int64 [B] samples.
            scores: fp32 [B, C], not NaN.
            wanted: bool [B, C], which pairs count.
        """
        self.seen += wanted.sum()
        masked = torch.where(wanted, scores, -torch.inf)
        ranked = masked if self.per_class else masked.reshape(-1, 1)
        if len(ranked) >= self.size:
            # With -inf where fewer pairs are wanted, which raises no floor.
            self._floor = torch.maximum(self._floor, ranked.topk(self.size, dim=0).values[-1])
        row, column = torch.nonzero(wanted & (scores >= self._floor), as_tuple=True)
        self.key = torch.cat([self.key, index[row] * self.num_classes + column])
        self.score = torch.cat([self.score, scores[row, column]])
        self._cut()

    def _cut(self) -> None:
        """Drop what is not among the best. Entries stand in ascending order of key among equal scores."""
        order = torch.sort(self.score, descending=True, stable=True).indices
        if self.per_class:
            order = order[torch.sort(self.key[order] % self.num_classes, stable=True).indices]
            count = torch.bincount(self.key % self.num_classes, minlength=self.num_classes)
            start = torch.repeat_interleave(count.cumsum(0) - count, count)
            place = torch.arange(len(order), device=order.device) - start
            order = order[place < self.size]
        else:
            order = order[: self.size]
        self.key, self.score = self.key[order], self.score[order]

    def gather(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
        """Keys (index * C + class) and scores of all ranks, the best first, and how many pairs were seen (collective).

        Ranks other than 0 get what they have.
        """
        self.key, self.score = distributed.gather_rows(self.key), distributed.gather_rows(self.score)
        order = torch.argsort(self.key)
        self.key, self.score = self.key[order], self.score[order]
        self._cut()
        order = torch.argsort(self.key)
        self.key, self.score = self.key[order], self.score[order]
        order = torch.sort(self.score, descending=True, stable=True).indices
        seen = int(distributed.all_reduce_sum(self.seen))
        return self.key[order].cpu().numpy(), self.score[order].cpu().numpy(), seen


@dataclass(frozen=True)
class Suggestions:
    """One ranked list, the surest first.

    Attributes:
        code: the observed label of all its pairs: UNKNOWN, POSITIVE or NEGATIVE.
        index: int64 [n] samples.
        class_id: int64 [n].
        probability: float64 [n] of the class, by the model.
        reach: pairs of the split with this label that the model is sure enough about, listed or not.
        runs: run directories that judged.
        run_of: which of `runs` judged each pair, int64 [n]; None where there is one.
    """

    code: int
    index: npt.NDArray[np.int64]
    class_id: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    reach: int
    runs: tuple[str, ...] = ("",)
    run_of: npt.NDArray[np.int64] | None = None

    @property
    def suggestion(self) -> int:
        """The label that the model would give: NEGATIVE for observed positives, else POSITIVE."""
        return NEGATIVE if self.code == POSITIVE else POSITIVE

    @property
    def run_places(self) -> npt.NDArray[np.int64]:
        """Which of `runs` judged each pair, int64 [n]."""
        return np.zeros(len(self), np.int64) if self.run_of is None else self.run_of

    def __len__(self) -> int:
        return len(self.index)


def _place_of(split: Split, index: Tensor, row: int) -> str:
    return split.place(int(index[row]))


@torch.no_grad()
def find_suggestions(
    classifier: Classifier,
    loader: EvalLoader,
    labels: SparseLabels,
    *,
    alpha: float,
    precision: str,
    classes: Sequence[str],
    top: int | None,
    per_class: int | None = None,
    min_probability: float = 0.5,
    codes: Sequence[int] = KINDS,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Suggestions] | None:
    """Run the model over a split and rank what contradicts or completes its labels (collective).

    Args:
        classifier: in eval mode.
        loader: this rank's batches.
        labels: of the split, which the suggestions complete or contradict.
        alpha: BoostLU factor of the probabilities, 1 for heads without a map.
        precision: as `train.precision`.
        classes: names for error messages.
        top: pairs of each list in all, or None for no limit but `per_class`.
        per_class: pairs of each list and class, or None for no such limit; one of the two must be given.
        min_probability: how sure the model must be of the label that it suggests.
        codes: observed labels whose lists are made.
        advance: called with the number of images of each batch.

    Returns:
        A list for each of `codes` on rank 0, None elsewhere.

    Raises:
        UserError: a logit is not a number.
    """
    dtype, device = inference_dtype(precision, loader.device), loader.device
    store = LabelStore(labels, device)
    size = per_class if per_class is not None else top
    if size is None:
        raise ValueError("give top, per_class or both")
    best = {code: BestPairs(size, labels.num_classes, per_class is not None, device) for code in codes}
    floor = logit_threshold(min_probability) if min_probability > 0 else -np.inf
    for batch in loader:
        with autocast(device, dtype):
            output = classifier(batch.views["eval"], boost=alpha != 1)
        if batch.real == 0:
            continue
        index, logits = batch.index[: batch.real], output.at_alpha(alpha)[: batch.real].float()
        check_numbers(logits, classes, functools.partial(_place_of, loader.split, index))
        known = store.rows(index)
        for code, pairs in best.items():
            scores = -logits if code == POSITIVE else logits
            pairs.add(index, scores, (known == code) & (scores >= floor))
        advance(batch.real)
    lists = []
    for code, pairs in best.items():
        key, score, seen = pairs.gather()
        key, score = (key, score) if top is None else (key[:top], score[:top])
        logit = score.astype(np.float64) * (-1 if code == POSITIVE else 1)
        probability = torch.sigmoid(torch.from_numpy(logit)).numpy()
        lists.append(Suggestions(code, key // labels.num_classes, key % labels.num_classes, probability, seen))
    return lists if distributed.is_main() else None


def merge_lists(
    parts: Sequence[Sequence[Suggestions]],
    rows: Sequence[npt.NDArray[np.int64]],
    runs: Sequence[str],
    top: int | None,
    per_class: int | None,
) -> list[Suggestions]:
    """The lists of several models, each about images of its own, as lists of all images.

    Args:
        parts: of each model, its lists in the same order of codes.
        rows: of each model, the samples that its lists count, int64 [n].
        runs: of each model, its run directory.
        top: pairs of each list in all; None for no limit.
        per_class: pairs of each list and class; None for no limit.

    Returns:
        The lists, the surest pair first; of equals the earlier image, then the smaller class.
    """
    merged = []
    for lists in zip(*parts, strict=True):
        index = np.concatenate([rows[k][found.index] for k, found in enumerate(lists)])
        class_id = np.concatenate([found.class_id for found in lists])
        probability = np.concatenate([found.probability for found in lists])
        run_of = np.repeat(np.arange(len(lists)), [len(found) for found in lists])
        code = lists[0].code
        order = np.lexsort((class_id, index, probability if code == POSITIVE else -probability))
        if per_class is not None:
            # Place of each pair among those of its class.
            by_class = order[np.argsort(class_id[order], kind="stable")]
            first = np.searchsorted(class_id[by_class], class_id[by_class], "left")
            place = np.empty(len(order), np.int64)
            place[by_class] = np.arange(len(order)) - first
            order = order[place[order] < per_class]
        order = order[:top]
        reach = sum(found.reach for found in lists)
        found = Suggestions(code, index[order], class_id[order], probability[order], reach, tuple(runs), run_of[order])
        merged.append(found)
    return merged


def precision_at(
    right: npt.NDArray[np.bool_], judged: npt.NDArray[np.bool_], depths: Sequence[int] = DEPTHS
) -> list[tuple[int, int, int]]:
    """How many of the first suggestions are right: (depth, right, judged) at each depth up to the whole list.

    Args:
        right: bool [n], best first; only counted where `judged`.
        judged: bool [n], whether the ground truth of the pair is known.
        depths: lengths of the list's beginning; those beyond its end are dropped.
    """
    count = len(right)
    hits, known = np.cumsum(right & judged), np.cumsum(judged)
    ends = sorted({d for d in depths if d < count} | ({count} if count else set()))
    return [(d, int(hits[d - 1]), int(known[d - 1])) for d in ends]


def hidden_positives(split: Split) -> tuple[int, int]:
    """(positives that `known` has beyond `observed`, pairs that are unknown in `observed` and known): the base rate.

    Positives and negatives that are observed are taken to be known too, as every preparation writes them.
    """

    def total(labels: SparseLabels, code: int) -> int:
        listed = int(np.count_nonzero(np.asarray(labels.codes) == code))
        rest = len(labels) * labels.num_classes - len(labels.codes) if code == labels.default else 0
        return listed + rest

    counts = {code: total(split.known, code) - total(split.observed, code) for code in (POSITIVE, NEGATIVE)}
    return counts[POSITIVE], counts[POSITIVE] + counts[NEGATIVE]


def truth_rows(suggestions: Suggestions, split: Split) -> list[tuple[str, str]]:
    """The list's precision against `split.known` at a few depths, for people: (name, value) pairs of a table."""
    truth = split.known.codes_at(suggestions.index, suggestions.class_id)
    right, judged = truth == suggestions.suggestion, truth != UNKNOWN
    rows = []
    for depth, hits, known in precision_at(right, judged):
        text = f"{100 * hits / known:.1f}% ({hits} of {known})" if known else "no ground truth"
        left = f"; {depth - known} without ground truth" if known and known < depth else ""
        rows.append((f"precision of the first {depth}", text + left))
    if suggestions.code == UNKNOWN:
        hidden, pairs = hidden_positives(split)
        if pairs > 0:
            rows.append(("precision of a guess", f"{100 * hidden / pairs:.1f}% ({hidden} of {pairs} hidden labels)"))
        if hidden > 0:
            correct = int((right & judged).sum())
            rows.append(("hidden positives found", f"{100 * correct / hidden:.1f}% ({correct} of {hidden})"))
    return rows


def write_suggestions(out: Path, lists: Sequence[Suggestions], split: Split, classes: Sequence[str]) -> int:
    """Write lists as CSV beside the final place, and move the file there when it is whole.

    UTF-8 with a header; columns: path (relative to the image root, byte for byte; `./` before what looks like a
    formula), class, known (unknown, positive, negative: the observed label), probability (all digits of a float64),
    suggestion (positive or negative), split, run (the run directory whose weights judged the image).

    Args:
        out: the CSV file; an older one is replaced.
        lists: in the order in which they are written.
        split: that they are about.
        classes: class names in class-id order.

    Returns:
        Number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        return write_csv(
            out, SUGGESTION_COLUMNS, (row for ranked in lists for row in suggestion_rows(ranked, split, classes))
        )
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error


def suggestion_rows(suggestions: Suggestions, split: Split, classes: Sequence[str]) -> list[tuple[Any, ...]]:
    """The values of `SUGGESTION_COLUMNS` for every pair of a list."""
    pairs = zip(
        suggestions.index.tolist(), suggestions.class_id.tolist(), suggestions.probability.tolist(), strict=True
    )
    known, label = NAMES[suggestions.code], NAMES[suggestions.suggestion]
    runs = [formula_safe_path(run) for run in suggestions.runs]
    return [
        (formula_safe_path(split.relative_path(i)), classes[c], known, p, label, split.name, runs[r])
        for (i, c, p), r in zip(pairs, suggestions.run_places.tolist(), strict=True)
    ]


def title(suggestions: Suggestions, split: Split) -> str:
    """What a list holds, for the head of its table."""
    what = {
        UNKNOWN: "unknown labels that look positive",
        POSITIVE: "observed positives that look negative",
        NEGATIVE: "observed negatives that look positive",
    }[suggestions.code]
    return f"{split.name}: {what}, {len(suggestions)} of {suggestions.reach}"
