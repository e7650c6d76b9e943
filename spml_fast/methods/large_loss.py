"""LL-R, LL-Ct, LL-Cp: Large Loss Matters (CVPR 2022), the losses that BoostLU (CVPR 2023) is trained with.

Of the unobserved entries of a batch, the k with the largest assumed-negative loss are taken for false negatives:
LL-R drops their loss, LL-Ct gives them the target 1 for this step, LL-Cp gives them the target 1 for good.
k = ceil(B C r); r = (epoch - 1) delta_rel / 100 for LL-R and LL-Ct, delta_rel / 100 from epoch 2 on for LL-Cp; epoch 1
changes nothing. The mean is over all B C entries, rejected ones included.

Where the released code differs, and the option that gives its behaviour:
- it takes the threshold over its batch of 16; here over the micro-step of all ranks. batch_semantics: paper.
- it selects every entry equal to the threshold, and observed positives too when the threshold is 0; here exactly k by
  (value, position), observed entries never. ties: inclusive (the hole at 0 stays closed).
- LargeLoss records permanent flips with a strict comparison, so k-1 of k labels flip. ties: strict_flips.
- its k comes from a float64 accumulator, one larger than exact arithmetic now and then. k_rule: accumulator (default).

Source: Large Loss Matters (Kim et al., CVPR 2022), with the rates of BoostLU (Kim et al., CVPR 2023);
docs/sources.md#large-loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

import torch
from spml_kernels import large_loss, large_loss_step, list_selected, select_large
from spml_kernels.large_loss.op import Scheme, Ties
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import POSITIVE, UNKNOWN, LabelStore
from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import EntryLoss, LossOutput, Method, MethodOptions, Progress, global_mean, register
from spml_fast.methods.pointwise import hidden_positives


def clean_rate(delta_percent: float, epoch: int) -> float:
    """Fraction of entries left alone in `epoch` (from 1) by the released float64 accumulator."""
    rate = 1.0
    for _ in range(epoch - 1):
        rate -= delta_percent / 100
    return rate


def selection_size(entries: int, delta_percent: float, epoch: int, ramp: bool, k_rule: str) -> int:
    """k of one batch.

    Args:
        entries: B C of the batch (or the number of its unobserved entries).
        delta_percent: delta_rel, in per cent.
        epoch: from 1.
        ramp: whether the rate grows by delta_rel every epoch (LL-R, LL-Ct) or is constant from epoch 2 on (LL-Cp).
        k_rule: `accumulator` is the released arithmetic, rounding included; `rational` is exact.
    """
    steps = epoch - 1 if ramp else min(epoch - 1, 1)
    if k_rule == "accumulator":
        rate = clean_rate(delta_percent, steps + 1)
        return 0 if rate == 1 else min(math.ceil(entries * (1 - rate)), entries)
    return min(math.ceil(entries * steps * Fraction(str(delta_percent)) / 100), entries)


@dataclass(frozen=True)
class LargeLossOptions(MethodOptions):
    """Large Loss.

    Attributes:
        name: the method.
        delta_rel: growth of the selected fraction of labels per epoch, in per cent of all B x C entries.
        k_rule: accumulator is the released float64 arithmetic; rational is exact.
        base: entries that delta_rel is a fraction of: all B x C (released code) or the unobserved ones (paper's text).
        ties: exact selects exactly k; inclusive every entry equal to the threshold too (BoostLU's release);
            strict_flips also leaves entries equal to the threshold out of LL-Cp's permanent flips (LargeLoss's).
        batch_semantics: global takes the threshold over the micro-step of all ranks; paper over every paper_batch
            images of it, whichever ranks they are on.
        paper_batch: images that share a threshold under batch_semantics paper.
    """

    name: str = "ll_r"
    delta_rel: float = 0.5
    k_rule: Literal["accumulator", "rational"] = "accumulator"
    base: Literal["all", "unobserved"] = "all"
    ties: Literal["exact", "inclusive", "strict_flips"] = "exact"
    batch_semantics: Literal["global", "paper"] = "global"
    paper_batch: int = 16


class ThresholdGroup(NamedTuple):
    """Images that share a threshold.

    Attributes:
        rows: which of this rank's.
        images: how many, over all ranks if `over_ranks`.
        over_ranks: whether all ranks' are meant.
    """

    rows: slice
    images: int
    over_ranks: bool


class SelectionRequest(NamedTuple):
    """What `select_large` is asked for, beside logits and codes."""

    k: Tensor
    k_max: int
    ties: Ties
    gather: Callable[[Tensor], Tensor] | None
    rank: int


class Selection(NamedTuple):
    """A selection that is known before its loss.

    Attributes:
        selected: bool [B, C].
        flips: bool [B, C], the part that flips for good.
        length: upper bound of that part's size, 0 where nothing flips.
    """

    selected: Tensor
    flips: Tensor
    length: int


class LargeLoss(Method[Tensor, Selection]):
    """The three schemes; subclasses say which."""

    Options: ClassVar[type[MethodOptions]] = LargeLossOptions
    options: LargeLossOptions
    batch_statistics: ClassVar[bool] = True
    solvable: ClassVar[bool] = True
    scheme: ClassVar[Scheme]
    permanent: ClassVar[bool] = False

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        if not 0 <= self.options.delta_rel < 100:
            raise UserError(f"method.delta_rel is {self.options.delta_rel}; it is a percentage from 0 to 100")
        if self.options.paper_batch < 1:
            raise UserError(f"method.paper_batch is {self.options.paper_batch}; it must be at least 1")

    def _size(self, entries: int, progress: Progress) -> int:
        """k for a batch of `entries` entries."""
        o = self.options
        return selection_size(entries, o.delta_rel, progress.epoch, not self.permanent, o.k_rule)

    def _request(self, logits: Tensor, labels: Tensor, group: ThresholdGroup, progress: Progress) -> SelectionRequest:
        """What is to be selected among the unknown entries of a group's `logits` and `labels`."""
        k_max = self._size(group.images * logits.shape[1], progress)
        shared = group.over_ranks and distributed.world_size() > 1
        k = torch.full((), k_max, device=logits.device, dtype=torch.int64)
        if self.options.base == "unobserved" and k_max:
            # The number of unobserved entries is known on the device only; k_max bounds it on the host.
            unknown = (labels == UNKNOWN).sum()
            unknown = distributed.all_reduce_sum(unknown) if shared else unknown
            if self.options.k_rule == "rational":
                fraction = self._steps(progress) * Fraction(str(self.options.delta_rel)) / 100
                k = -(-unknown * fraction.numerator // fraction.denominator)
            else:
                rate = 1 - clean_rate(self.options.delta_rel, self._steps(progress) + 1)
                k = torch.ceil(unknown.double() * rate).long()
            k = k.clamp(max=k_max)
        ties: Ties = "exact" if self.options.ties == "exact" else "inclusive"
        return SelectionRequest(k, k_max, ties, distributed.all_gather_equal if shared else None, distributed.rank())

    def _steps(self, progress: Progress) -> int:
        """How many times delta_rel the rate of this epoch is."""
        return min(progress.epoch - 1, 1) if self.permanent else progress.epoch - 1

    def _groups_span_ranks(self, batches: list[Batch]) -> bool:
        """Whether images that share a threshold are on several ranks; elsewhere every rank has whole groups."""
        world, size = distributed.world_size(), self.options.paper_batch
        if world == 1 or self.options.batch_semantics == "global":
            return False
        return any(batch.global_size % (world * size) for batch in batches)

    def _groups(self, logits: Tensor, images: int) -> list[ThresholdGroup]:
        """Parts of a batch that have a threshold each; `images` counts the batch over all ranks."""
        if self.options.batch_semantics == "global":
            return [ThresholdGroup(slice(None), images, True)]
        size, rows = self.options.paper_batch, len(logits)
        starts = range(0, max(rows, 1), size)
        return [ThresholdGroup(slice(s, s + size), min(size, rows - s), False) for s in starts]

    def _idle(self, logits: Tensor, images: int, progress: Progress) -> bool:
        """Whether nothing is selected in this epoch."""
        return self._size(images * logits.shape[1], progress) == 0

    def _list_length(self, request: SelectionRequest, entries: int) -> int:
        """Room for every label that may flip for good; inclusive ties may pass k, then all entries bound them."""
        if not self.permanent:
            return 0
        return entries if self.options.ties == "inclusive" else min(request.k_max, entries)

    def _flip(self, index: Tensor, rows: Tensor, classes: Tensor, valid: Tensor) -> None:
        """Hand listed entries of the images `index` to the label store, as positives from the next epoch on."""
        self.store.correct(index[rows], classes, POSITIVE, valid)

    def update_statistics(self, forwards: list[Tensor], batches: list[Batch], progress: Progress) -> list[Selection]:
        """One threshold for all micro-steps of an update; exactly what one large micro-step would select.

        Positions order ties by (rank, micro-step, row) here, which matters only for exact ties across them.
        """
        sizes = [len(z) for z in forwards]
        images = sum(b.global_size for b in batches)
        values, labels = torch.cat(forwards), torch.cat([b.labels for b in batches])
        if self._idle(values, images, progress):
            none = torch.zeros_like(labels, dtype=torch.bool)
            return [Selection(part, part, 0) for part in none.split(sizes)]
        if self._groups_span_ranks(batches):
            return self._select_over_ranks(forwards, batches, progress)
        whole = self._select(values, labels, images, progress)
        pieces = zip(whole.selected.split(sizes), whole.flips.split(sizes), strict=True)
        return [Selection(s, f, min(whole.length, s.numel())) for s, f in pieces]

    def _select(self, values: Tensor, labels: Tensor, images: int, progress: Progress) -> Selection:
        """The selection in all groups of some images."""
        selected, flips, length = [], [], 0
        for group in self._groups(values, images):
            z, codes = values[group.rows], labels[group.rows]
            request = self._request(z, codes, group, progress)
            part, threshold = select_large(z, codes, *request)
            selected.append(part)
            flips.append(part & (z > threshold) if self.options.ties == "strict_flips" else part)
            length += self._list_length(request, part.numel())
        return Selection(torch.cat(selected), torch.cat(flips), length)

    def _select_over_ranks(self, forwards: list[Tensor], batches: list[Batch], progress: Progress) -> list[Selection]:
        """This rank's part of the selection in groups of the global batch; every rank makes all of it."""
        totals = [batch.global_size for batch in batches]
        values = [distributed.all_gather_parts(z, n) for z, n in zip(forwards, totals, strict=True)]
        labels = [distributed.all_gather_parts(b.labels, n) for b, n in zip(batches, totals, strict=True)]
        whole = self._select(torch.cat(values), torch.cat(labels), sum(totals), progress)
        own = []
        for selected, flips, n in zip(whole.selected.split(totals), whole.flips.split(totals), totals, strict=True):
            rows = distributed.part_of(n, distributed.rank())
            own.append(Selection(selected[rows], flips[rows], min(whole.length, selected[rows].numel())))
        return own

    def _selected_ahead(self, logits: Tensor, batch: Batch, selection: Selection) -> tuple[Tensor, Tensor]:
        """Loss sum and selection where the selection is known."""
        if selection.length:
            self._flip(batch.index, *list_selected(selection.flips, selection.length))
        return large_loss(logits, batch.labels, selection.selected, self.scheme), selection.selected

    def _in_one_pass(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        """Loss sum and selection, made together group by group."""
        steps = []
        for group in self._groups(logits, batch.global_size):
            z, codes = logits[group.rows], batch.labels[group.rows]
            request = self._request(z, codes, group, progress)
            strict = self.options.ties == "strict_flips"
            length = 0 if strict else self._list_length(request, z.numel())
            step = large_loss_step(
                z, codes, request.k, request.k_max, self.scheme, request.ties, request.gather, request.rank, length
            )
            if self.permanent and strict:
                above = step.selected & (z.detach() > step.threshold)
                self._flip(batch.index[group.rows], *list_selected(above, request.k_max))
            elif self.permanent:
                self._flip(batch.index[group.rows], step.rows, step.classes, step.valid)
            steps.append(step)
        if len(steps) == 1:
            return steps[0].loss, steps[0].selected
        return torch.stack([s.loss for s in steps]).sum(), torch.cat([s.selected for s in steps])

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over B x C, selected entries included in the denominator."""
        selection = self.statistics_of(batch)
        if selection is None and self._idle(logits, batch.global_size, progress):
            none = torch.zeros_like(batch.labels, dtype=torch.bool)
            selection = Selection(none, none, 0)
        if selection is None and self._groups_span_ranks([batch]):
            (selection,) = self._select_over_ranks([logits.detach()], [batch], progress)
        if selection is not None:
            total, selected = self._selected_ahead(logits, batch, selection)
        else:
            total, selected = self._in_one_pass(logits, batch, progress)
        return LossOutput(global_mean(total, batch.global_size * logits.shape[1]), hidden_positives(selected, batch))

    def linear_loss(self) -> EntryLoss:
        """That of the first epoch, which selects nothing: assumed negative."""
        return EntryLoss(AssumeNegative.point)

    def on_epoch_end(self, progress: Progress) -> dict[str, float]:
        """Permanent corrections of all ranks take effect."""
        if not self.permanent:
            return {}
        return {"corrected": float(self.store.commit()), "corrected_total": float(self.store.num_corrections)}


@register("ll_r")
class LLR(LargeLoss):
    """LL-R: large losses of unobserved entries are rejected."""

    scheme: ClassVar[Scheme] = "reject"


@dataclass(frozen=True)
class LLCtOptions(LargeLossOptions):
    """Large Loss, temporary correction. Fields as for LL-R."""

    __doc__ = LargeLossOptions.__doc__
    name: str = "ll_ct"
    delta_rel: float = 0.2


@register("ll_ct")
class LLCt(LargeLoss):
    """LL-Ct: they are trained as positives in this step."""

    Options: ClassVar[type[MethodOptions]] = LLCtOptions
    scheme: ClassVar[Scheme] = "correct"
    corrects_labels: ClassVar[bool] = True


@dataclass(frozen=True)
class LLCpOptions(LargeLossOptions):
    """Large Loss, permanent correction. Fields as for LL-R."""

    __doc__ = LargeLossOptions.__doc__
    name: str = "ll_cp"
    delta_rel: float = 0.1


@register("ll_cp")
class LLCp(LargeLoss):
    """LL-Cp: they become positives for good, from the next epoch on."""

    Options: ClassVar[type[MethodOptions]] = LLCpOptions
    scheme: ClassVar[Scheme] = "correct"
    corrects_labels: ClassVar[bool] = True
    permanent: ClassVar[bool] = True
