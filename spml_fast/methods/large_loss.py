"""LL-R, LL-Ct, LL-Cp: Large Loss Matters (CVPR 2022), the losses that BoostLU (CVPR 2023) is trained with.

Of the unobserved entries of a batch, the k with the largest assumed-negative loss are taken for false negatives:
LL-R drops their loss, LL-Ct gives them the target 1 for this step, LL-Cp gives them the target 1 for good.
k = ceil(B C r); r = (epoch - 1) delta_rel / 100 for LL-R and LL-Ct, delta_rel / 100 from epoch 2 on for LL-Cp; epoch 1
changes nothing. The mean is over all B C entries, rejected ones included. Source: spec/boostlu_large_loss.md 1.4.

Where the released code differs, and the option that gives its behaviour:
- it takes the threshold over its batch of 16; here over the micro-step of all ranks. batch_semantics: paper.
- it selects every entry equal to the threshold, and observed positives too when the threshold is 0; here exactly k by
  (value, position), observed entries never. ties: inclusive (the hole at 0 stays closed).
- LargeLoss records permanent flips with a strict comparison, so k-1 of k labels flip. ties: strict_flips.
- its k comes from a float64 accumulator, one larger than exact arithmetic now and then. k_rule: accumulator (default).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from spml_kernels import large_loss, list_selected, select_large
from spml_kernels.large_loss import Scheme
from torch import Tensor

from spml_fast import distributed
from spml_fast.batch import Batch
from spml_fast.errors import UserError
from spml_fast.labels import POSITIVE, UNKNOWN, LabelStore
from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, global_mean, register
from spml_fast.methods.pointwise import hidden_positives


def clean_rate(delta_percent: float, epoch: int) -> float:
    """Share of entries left alone in `epoch` (from 1) by the released float64 accumulator."""
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
        ramp: rate grows by delta_rel every epoch (LL-R, LL-Ct), or is constant from epoch 2 on (LL-Cp).
        k_rule: `accumulator` is the released arithmetic, rounding included; `rational` is exact.
    """
    steps = epoch - 1 if ramp else min(epoch - 1, 1)
    if k_rule == "accumulator":
        rate = clean_rate(delta_percent, steps + 1)
        return 0 if rate == 1 else min(math.ceil(entries * (1 - rate)), entries)
    return min(math.ceil(entries * steps * Fraction(str(delta_percent)) / 100), entries)


@dataclass
class LargeLossOptions(MethodOptions):
    """Large Loss.

    Attributes:
        name: the method.
        delta_rel: growth of the selected share of labels per epoch, in per cent of all B x C entries.
        k_rule: accumulator is the released float64 arithmetic; rational is exact.
        base: entries that delta_rel is a share of: all B x C (released code) or the unobserved ones (paper's text).
        ties: exact selects exactly k; inclusive every entry equal to the threshold too (BoostLU's release);
            strict_flips also leaves entries equal to the threshold out of LL-Cp's permanent flips (LargeLoss's).
        batch_semantics: global takes the threshold over the micro-step of all ranks; paper over every paper_batch
            pictures of a rank.
        paper_batch: pictures that share a threshold under batch_semantics paper.
    """

    name: str = "ll_r"
    delta_rel: float = 0.5
    k_rule: Literal["accumulator", "rational"] = "accumulator"
    base: Literal["all", "unobserved"] = "all"
    ties: Literal["exact", "inclusive", "strict_flips"] = "exact"
    batch_semantics: Literal["global", "paper"] = "global"
    paper_batch: int = 16


class LargeLoss(Method):
    """The three schemes; subclasses say which."""

    Options: ClassVar[type[MethodOptions]] = LargeLossOptions
    batch_statistics: ClassVar[bool] = True
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

    def _select_group(
        self, logits: Tensor, labels: Tensor, rows: int, progress: Progress, over_ranks: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Selection [B, C] among `labels`' unknown entries, the threshold, and the host-side bound of k.

        Args:
            rows: pictures that share the threshold, over all ranks if `over_ranks`.
        """
        k_max = self._size(rows * logits.shape[1], progress)
        shared = over_ranks and distributed.world_size() > 1
        k = torch.full((), k_max, device=logits.device, dtype=torch.int64)
        if self.options.base == "unobserved" and k_max:
            # The share of unobserved entries is known on the device only; k_max bounds it on the host.
            unknown = (labels == UNKNOWN).sum()
            unknown = distributed.all_reduce_sum(unknown) if shared else unknown
            if self.options.k_rule == "rational":
                share = self._steps(progress) * Fraction(str(self.options.delta_rel)) / 100
                k = -(-unknown * share.numerator // share.denominator)
            else:
                rate = 1 - clean_rate(self.options.delta_rel, self._steps(progress) + 1)
                k = torch.ceil(unknown.double() * rate).long()
            k = k.clamp(max=k_max)
        ties: Literal["exact", "inclusive"] = "exact" if self.options.ties == "exact" else "inclusive"
        gather = distributed.all_gather_equal if shared else None
        selected, threshold = select_large(logits, labels, k, k_max, ties, gather, distributed.rank())
        return selected, threshold, k_max

    def _steps(self, progress: Progress) -> int:
        """How many times delta_rel the rate of this epoch is."""
        return min(progress.epoch - 1, 1) if self.permanent else progress.epoch - 1

    def select(self, logits: Tensor, labels: Tensor, rows: int, progress: Progress) -> tuple[Tensor, Tensor, int]:
        """Selection bool [B, C], the part of it that flips for good, and an upper bound of that part's size here."""
        logits = logits.detach()
        if self._size(rows * logits.shape[1], progress) == 0:
            none = torch.zeros_like(labels, dtype=torch.bool)
            return none, none, 0
        if self.options.batch_semantics == "global":
            groups = [(slice(None), rows, True)]
        else:
            size = self.options.paper_batch
            starts = range(0, len(logits), size)
            groups = [(slice(s, s + size), min(size, len(logits) - s), False) for s in starts]
        parts = [
            self._select_group(logits[part], labels[part], number, progress, over_ranks)
            for part, number, over_ranks in groups
        ]
        selected = torch.cat([p[0] for p in parts])
        flips = selected
        if self.options.ties == "strict_flips":
            flips = torch.cat([p[0] & (logits[part] > p[1]) for p, (part, *_) in zip(parts, groups, strict=True)])
        # Inclusive ties may select more than k: then only the number of entries bounds the list.
        bound = sum(p[2] for p in parts) if self.options.ties != "inclusive" else selected.numel()
        return selected, flips, min(bound, selected.numel())

    def plan(self, logits: list[Tensor], batches: list[Batch], progress: Progress) -> list[Any]:
        """One threshold for all micro-steps of an update; exactly what one large micro-step would select.

        Positions order ties by (rank, micro-step, row) here, which matters only for exact ties across them.
        """
        sizes = [len(z) for z in logits]
        rows = sum(b.global_size for b in batches)
        labels = torch.cat([b.labels for b in batches])
        selected, flips, bound = self.select(torch.cat(logits), labels, rows, progress)
        pieces = zip(selected.split(sizes), flips.split(sizes), strict=True)
        return [(s, f, min(bound, s.numel())) for s, f in pieces]

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over B x C, selected entries included in the denominator."""
        if batch.plan is not None:
            selected, flips, bound = batch.plan
        else:
            selected, flips, bound = self.select(logits, batch.labels, batch.global_size, progress)
        total = large_loss(logits, batch.labels, selected, self.scheme)
        if self.permanent and bound:
            rows, classes, valid = list_selected(flips, bound)
            self.store.correct(batch.index[rows], classes, POSITIVE, valid)
        return LossOutput(global_mean(total, batch.global_size * logits.shape[1]), hidden_positives(selected, batch))

    def on_epoch_end(self, progress: Progress) -> dict[str, float]:
        """Permanent corrections of all ranks take effect."""
        if not self.permanent:
            return {}
        return {"corrected": float(self.store.commit()), "corrected_total": float(self.store.num_corrections)}


@register("ll_r")
class LLR(LargeLoss):
    """LL-R: large losses of unobserved entries are rejected."""

    scheme: ClassVar[Scheme] = "reject"


@dataclass
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


@dataclass
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
    permanent: ClassVar[bool] = True
