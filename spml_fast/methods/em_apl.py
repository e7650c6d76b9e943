"""EM + APL: entropy maximisation with asymmetric pseudo-labels.

EM (see em.py), and after every epoch from `warm_up` on a pass over the training images in evaluation mode: of every
class the floor(theta U_c / (T - warm_up)) unknown entries of lowest p that are not yet pseudo-labelled get the soft
label s = p for good (U_c unknown entries of the class at the start, T epochs). Their loss is then
beta [ s (-log(p + 1e-5)) + (1 - s) (-log(1 - p + 1e-5)) ] instead of the entropy. Pseudo-negatives only.
theta = 0.9 and
                VOC    COCO   NUS-WIDE  CUB
    alpha       0.2    0.1    0.1       0.01
    warm_up     5      5      4         3
    beta        0.02   0.9    0.2       0.4
    lr          1e-5   1e-5   1e-5      1e-4
    batch       8      16     16        8          and T = 10, one learning rate for all parameters.

Where released code differs: its pass goes through the training loader with random flips, here through the evaluation
view; it also labels after the last epoch, which nothing uses; it stores -s in the label matrix. In the linear phase of
a linear-init run nothing is labelled.

The selection is exact over all ranks: of equal scores the lower sample index comes first. State: the frozen entries in
CSR form, 6 to 8 bytes each (theta N C of them in the end, COCO about 30 MB), spread over the ranks
(state/sample_rows.py; a step gathers those of its samples, B C numbers) and in the checkpoint, in one file per rank.
The pass holds N C / ranks scores of 4 bytes on the host until the epoch's end.

Source: Zhou et al., "Acknowledging the Unknown for Multi-label Learning with Single Positive Labels", ECCV 2022;
docs/sources.md#em.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from spml_kernels import IGNORED, label_loss
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels, class_dtype
from spml_fast.methods.base import LossOutput, MethodOptions, Progress, register
from spml_fast.methods.em import EMOptions, EntropyMaximisation
from spml_fast.methods.pointwise import log_terms, require_fraction, require_not_negative
from spml_fast.methods.state import sample_rows
from spml_fast.methods.state.memory import require_memory

# Scores of all samples that are looked at together when a class's lowest are chosen.
_SELECTION_ELEMENTS = 2**24


@dataclass(frozen=True)
class EMAPLOptions(EMOptions):
    """Entropy maximisation with asymmetric pseudo-labels.

    Attributes:
        name: the method.
        alpha: weight of the entropy of unknown labels (VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01).
        log_form: released guards the logarithms with 1e-5; logits is exact.
        theta: fraction of every class's unknown labels that are pseudo-labelled by the end.
        warm_up: first epoch after which labels are made (VOC 5, COCO 5, NUS-WIDE 4, CUB 3).
        beta: weight of pseudo-labels (VOC 0.02, COCO 0.9, NUS-WIDE 0.2, CUB 0.4).
        memory_limit: GiB that the pseudo-labels may take on a rank; null allows half of what is free.
    """

    name: str = "em_apl"
    theta: float = 0.9
    warm_up: int = 5
    beta: float = 0.9
    memory_limit: float | None = None


def apl_quota(unknown: int, theta: float, epochs: int, warm_up: int) -> int:
    """Entries of one class that are labelled after one epoch.

    Args:
        unknown: unknown entries of the class at the start.
        theta: fraction of them that is labelled by the end.
        epochs: T.
        warm_up: first epoch after which labels are made.
    """
    return math.floor(Fraction(str(theta)) * unknown / (epochs - warm_up))


class SoftLabels:
    """Soft labels of single entries in CSR form on a device.

    Args:
        num_rows: number of rows.
        num_classes: C.
        device: where rows are made.
    """

    def __init__(self, num_rows: int, num_classes: int, device: torch.device) -> None:
        self.num_rows, self.num_classes, self.device = num_rows, num_classes, device
        kind = torch.int16 if class_dtype(num_classes).itemsize == 2 else torch.int32
        self.classes = torch.empty(0, dtype=kind, device=device)
        self.values = torch.empty(0, dtype=torch.float32, device=device)
        self.indptr = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.max_row = 0

    def __len__(self) -> int:
        return len(self.values)

    def add(self, rows: Tensor, classes: Tensor, values: Tensor) -> None:
        """Merge entries in (int64, int64, fp32, on the device); none may be there already."""
        counts = torch.diff(self.indptr)
        old, old_classes, _ = self.entries()
        keys = torch.cat([old * self.num_classes + old_classes, rows * self.num_classes + classes])
        order = torch.argsort(keys)
        self.values = torch.cat([self.values, values])[order]
        self.classes = (keys[order] % self.num_classes).to(self.classes.dtype)
        counts += torch.bincount(rows, minlength=self.num_rows)
        self.indptr = torch.cat([self.indptr[:1], counts.cumsum(0)])
        self.max_row = int(counts.max()) if self.num_rows else 0

    def rows(self, index: Tensor) -> Tensor:
        """Soft labels fp32 [len(index), C], NaN where there is none; nothing is read back from the device."""
        # Lanes past a row's end write into one spare column that is cut off.
        out = torch.full((len(index), self.num_classes + 1), torch.nan, device=self.device)
        if self.max_row:
            start = self.indptr[index][:, None]
            lane = torch.arange(self.max_row, device=self.device)
            inside = lane < self.indptr[index + 1][:, None] - start
            entry = torch.where(inside, start + lane, 0)
            out.scatter_(1, torch.where(inside, self.classes[entry].long(), self.num_classes), self.values[entry])
        return out[:, : self.num_classes]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, classes, values of all entries, int64, int64, fp32."""
        rows = torch.repeat_interleave(torch.arange(self.num_rows, device=self.device), torch.diff(self.indptr))
        return rows, self.classes.long(), self.values


@register("em_apl")
class AsymmetricPseudoLabels(EntropyMaximisation):
    """Entropy maximisation, with the least likely unknown labels frozen as soft negatives epoch by epoch."""

    Options: ClassVar[type[MethodOptions]] = EMAPLOptions
    options: EMAPLOptions
    needs_samples: ClassVar[bool] = True

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_fraction(options, "theta")
        require_not_negative(options, "beta", "warm_up")
        self.soft = SoftLabels(sample_rows.owned_count(len(store)), store.num_classes, store.device)
        # Soft labels of all ranks.
        self.total = 0
        self.unknown_counts = store.class_counts(UNKNOWN).tolist()
        self._scores: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """The pseudo-labels must fit, twice over while new ones are merged in with their 8-byte keys."""
        assert isinstance(options, EMAPLOptions)
        unknown = len(labels) * labels.num_classes - int(labels.indptr[-1]) if labels.default == UNKNOWN else 0
        unknown += int((labels.codes == UNKNOWN).sum())
        entry = class_dtype(labels.num_classes).itemsize + 4
        size = options.theta * unknown * (2 * entry + 16) / distributed.world_size()
        what = f"method em_apl's soft labels of {options.theta:g} of {len(labels):,} x {labels.num_classes:,} entries"
        require_memory(what, size, options.memory_limit, "method.memory_limit")

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """EM where there is no soft label, beta times cross-entropy against it where there is one; mean over B x C."""
        codes, metrics = self.codes(logits, batch, progress)
        if self.total == 0:
            return LossOutput(self.reduce(label_loss(logits, codes, self.point, self.params(progress)), batch), metrics)
        index, place = sample_rows.gather_batch(batch.index, batch.global_size)
        soft = self.soft_rows(index)[place]
        frozen = ~soft.isnan() & (codes == UNKNOWN)
        total = label_loss(logits, torch.where(frozen, IGNORED, codes), self.point, self.params(progress))
        target = torch.where(frozen, soft, 0).to(logits.dtype)
        positive, negative = log_terms(logits, self.log_guard)
        cross = torch.where(frozen, target * positive + (1 - target) * negative, 0).sum()
        metrics["soft_label_count"] = frozen.sum()
        if batch.truth is not None:
            metrics["soft_label_right_count"] = (frozen & (batch.truth == NEGATIVE)).sum()
            metrics["soft_label_wrong_count"] = (frozen & (batch.truth == POSITIVE)).sum()
        return LossOutput(self.reduce(total + self.options.beta * cross, batch), metrics)

    def add(self, index: Tensor, classes: Tensor, values: Tensor) -> None:
        """Freeze entries (sample, class, soft label), the same list on every rank; each keeps those of its samples."""
        owned = sample_rows.owned(index)
        self.soft.add(sample_rows.place(index[owned]), classes[owned], values[owned])
        self.total += len(index)

    def soft_rows(self, index: Tensor) -> Tensor:
        """Soft labels fp32 [n, C], NaN where there is none (collective; the same samples on every rank)."""
        # Rows of other ranks are looked up anywhere and dropped, so that no step waits for the number of own ones.
        place = torch.where(sample_rows.owned(index), sample_rows.place(index), 0)
        own = self.soft.rows(place)
        if distributed.world_size() == 1:
            return own
        # Exact and in one sum over ranks: bits of -s for a soft label s (never 0, for -0.0 has its sign), 0 for none.
        bits = torch.where(own.isnan(), 0, (-own).view(torch.int32))
        bits = sample_rows.from_owners(bits, index)
        return torch.where(bits == 0, torch.nan, -bits.view(torch.float32))

    def needs_train_scores(self, progress: Progress) -> bool:
        """From the warm-up epoch on, but not after the last epoch, which nothing follows."""
        return progress.phase == "finetune" and self.options.warm_up <= progress.epoch < progress.epochs

    def on_train_scores(self, index: Tensor, logits: Tensor) -> None:
        """Keep the scores of unknown entries; the others become plus infinity."""
        unknown = self.store.rows(index) == UNKNOWN
        self._scores.append((index.cpu(), torch.where(unknown, logits.float(), torch.inf).cpu()))

    def on_epoch_end(self, progress: Progress) -> dict[str, float]:
        """Freeze the lowest scores of every class."""
        figures = super().on_epoch_end(progress)
        before = self.total
        if self.needs_train_scores(progress):
            self._freeze(progress)
        return figures | {"soft_labels_new": float(self.total - before), "soft_labels": float(self.total)}

    def _freeze(self, progress: Progress) -> None:
        """Choose over all ranks (collective); every rank comes to the same list and keeps its part."""
        device, width = self.store.device, self.store.num_classes
        own_index = torch.cat([torch.empty(0, dtype=torch.int64), *(i for i, _ in self._scores)])
        own_scores = torch.cat([torch.empty(0, width), *(s for _, s in self._scores)])
        self._scores.clear()
        index, order = distributed.all_gather_rows(own_index.to(device)).sort()
        quota = [
            apl_quota(unknown, self.options.theta, progress.epochs, self.options.warm_up)
            for unknown in self.unknown_counts
        ]
        wanted = torch.tensor(quota, device=device)
        step = max(1, _SELECTION_ELEMENTS // max(len(index), 1))
        own_rows, own_classes, _ = self.soft.entries()
        own_samples = own_rows * distributed.world_size() + distributed.rank()
        frozen: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, width, step):
            part = own_scores[:, first : first + step].contiguous().to(device)
            # Rows in sample order and a stable sort: of equal scores the lower index first, whatever the ranks were.
            gathered = distributed.all_gather_rows(part)[order]
            # What is frozen already is no candidate; its owner says so.
            taken = torch.zeros(gathered.shape, dtype=torch.int8, device=device)
            within = (own_classes >= first) & (own_classes < first + step)
            taken[torch.searchsorted(index, own_samples[within]), own_classes[within] - first] = 1
            gathered[distributed.all_reduce_sum(taken) != 0] = torch.inf
            scores, place = gathered.sort(dim=0, stable=True)
            longest = max(quota[first : first + step])
            lane = torch.arange(len(scores), device=device)[:longest, None]
            chosen = (lane < wanted[first : first + step]) & (scores[:longest] < torch.inf)
            row, column = torch.nonzero(chosen, as_tuple=True)
            frozen.append((index[place[row, column]], column + first, torch.sigmoid(scores[row, column])))
        rows, classes, values = (torch.cat(columns) for columns in zip(*frozen, strict=True))
        self.add(rows, classes, values)

    def rank_state(self) -> dict[str, Tensor]:
        """Sample, class and soft label of this rank's entries."""
        rows, classes, values = self.soft.entries()
        index = rows * distributed.world_size() + distributed.rank()
        # Class ids in their narrow type: this is all that a checkpoint holds of them.
        return {"index": index, "classes": classes.to(self.soft.classes.dtype), "values": values}

    def load_rank_state(self, rank_states: list[dict[str, Tensor]]) -> None:
        """Take this rank's entries out of all ranks'."""
        self.soft = SoftLabels(self.soft.num_rows, self.soft.num_classes, self.soft.device)
        self.total = 0
        for state in rank_states:
            index, classes, values = (state[name].to(self.soft.device) for name in ("index", "classes", "values"))
            self.add(index, classes.long(), values)
