"""ROLE: regularised online label estimation.

Beside the network with predictions F there is a table of one free logit per training image and class, with
Y = sigmoid(table):
    L = 1/2 [ EPR(F; y) + CE(F | stop Y) ] + 1/2 [ EPR(Y; y) + CE(Y | stop F) ]
CE(f | t) = 1/(B C) sum t (-log(f + 1e-5)) + (1 - t) (-log(1 - f + 1e-5)); EPR(f; y) as in epr.py, with its k.
Table at the start: unknown uniform in +-logit(0.6), observed positives logit(0.995), observed negatives logit(0.005).
After a linear phase the estimates are kept, clamped to [1e-5, 1 - 1e-5], with a fresh Adam. The table's learning rate
is 10 times the network's; the published runs use one learning rate for the network (train.head_lr_multiplier 1), batch
8 or 16, and drop the last incomplete batch.

How the table is trained. The released code makes it a dense parameter under the network's Adam, which costs a gradient
of N x C in every step, and moves every row in every step: an image's row keeps its momentum after the one step of an
epoch that shows the image. That momentum is nine tenths of the movement, so an Adam that is simply
confined to the batch's rows trains another model. Here only the batch's rows are touched, and a row that is met first
makes up, in closed form, for the steps without gradient since it was last met: values equal dense Adam's
(betas 0.9 and 0.999, epsilon 1e-8, no weight decay) up to rounding. The rows of the whole micro-step are updated on
the rank that keeps them (state/sample_rows.py), from gathered logits and estimates (2 B C numbers a step), and any
checkpoint can be read by any number of ranks.

Memory: 12 bytes per sample and class over all ranks together (COCO 65,000 x 80: 60 MB; OpenImages about 1 TB), and as
much in every checkpoint, in one file per rank. Under gradient accumulation every micro-step counts as a batch of its
own, in one Adam step.

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE, LabelStore, SparseLabels
from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, global_mean, register
from spml_fast.methods.epr import EPROptions, epr_point, mean_positives, require_expected_positives
from spml_fast.methods.pointwise import COLE_GUARD, log_terms, require_not_negative
from spml_fast.methods.state import sample_rows
from spml_fast.methods.state.memory import require_memory

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
_CHUNK = 2**16


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


class MeanPositives(NamedTuple):
    """Mean number of positives of an image over a whole update, 0-d: the network's and the table's."""

    network: Tensor
    table: Tensor


class Rows(NamedTuple):
    """Value and moments of some rows of a table, [B, C] each."""

    value: Tensor
    first: Tensor
    second: Tensor


class AdamTable(nn.Module):
    """A table whose rows follow dense Adam, though a row is only touched when it is met.

    Between two gradients dense Adam moves an entry in step s by lr_s m beta1^n / (1 - beta1^s) over
    sqrt(v beta2^n / (1 - beta2^s)), n steps after its last gradient: m / sqrt(v) times a number that all entries of the
    row share. The terms fade like 0.9^n, so a window of steps is summed. (Epsilon is added to sqrt(v) as it stands;
    that differs from Adam only where sqrt(v) is as small as epsilon.)

    Args:
        value: fp32 [n, C] initial values of this rank's rows; taken over.

    Attributes:
        value, first, second: fp32 [n, C]; rows stand as of step `visited`.
        visited: int32 [n], step of a row's last gradient, 0 for none.
        rates: fp32 [steps + 1], lr_s sqrt(1 - beta2^s) / (1 - beta1^s).
        done: steps done.
    """

    window: ClassVar[int] = 256
    value: Tensor
    first: Tensor
    second: Tensor
    visited: Tensor
    rates: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)
        self.register_buffer("first", torch.zeros_like(value), persistent=False)
        self.register_buffer("second", torch.zeros_like(value), persistent=False)
        visited = torch.zeros(len(value), dtype=torch.int32, device=value.device)
        self.register_buffer("visited", visited, persistent=False)
        self.register_buffer("rates", torch.zeros(1, dtype=value.dtype, device=value.device), persistent=False)
        self.done = 0

    def reserve(self, steps: int) -> None:
        """Make room for the rates of so many steps."""
        if len(self.rates) <= steps:
            self.rates = torch.cat([self.rates, self.rates.new_zeros(steps + 1 - len(self.rates))])

    def read(self, index: Tensor, done: int) -> Rows:
        """Rows as dense Adam has them after `done` steps."""
        last = self.visited[index].long()
        lane = torch.arange(1, self.window + 1, device=index.device)
        step = last[:, None] + lane
        rates = torch.where(step <= done, self.rates[step.clamp(max=len(self.rates) - 1)], 0)
        ratio = BETA1 / math.sqrt(BETA2)
        factor = (rates * torch.pow(ratio, lane.to(rates.dtype))).sum(1, keepdim=True)
        gap = (done - last).clamp(min=0).to(rates.dtype)[:, None]
        first, second = self.first[index], self.second[index]
        value = self.value[index] - factor * first / (second.sqrt() + EPSILON)
        return Rows(value, first * torch.pow(BETA1, gap), second * torch.pow(BETA2, gap))

    def write(self, index: Tensor, rows: Rows, gradient: Tensor, step: int, lr: float) -> None:
        """One step of Adam.

        Args:
            index: int64 [B] rows of the table.
            rows: these rows as of the step before.
            gradient: fp32 [B, C].
            step: its number, from 1.
            lr: learning rate of this step.
        """
        self.rates[step] = lr * math.sqrt(1 - BETA2**step) / (1 - BETA1**step)
        self.done = step
        first = BETA1 * rows.first + (1 - BETA1) * gradient
        second = BETA2 * rows.second + (1 - BETA2) * gradient**2
        scale = (second / (1 - BETA2**step)).sqrt() + EPSILON
        self.value[index] = rows.value - (lr / (1 - BETA1**step)) * first / scale
        self.first[index], self.second[index] = first, second
        self.visited[index] = step

    def restart(self, limit: float) -> None:
        """Bring all rows up to date, clamp them to +-limit, and forget moments and steps."""
        for index in torch.arange(len(self.value), device=self.value.device).split(_CHUNK):
            self.value[index] = self.read(index, self.done).value.clamp(-limit, limit)
        for state in (self.first, self.second, self.visited, self.rates):
            state.zero_()
        self.done = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Steps and their rates; how many there are changes, so they are no buffer."""
        return {"done": self.done, "rates": self.rates[: self.done + 1].cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.done = int(state["done"])
        self.rates = state["rates"].to(self.value.device)


@dataclass(frozen=True)
class ROLEOptions(EPROptions):
    """Regularised online label estimation.

    Attributes:
        name: the method.
        expected_positives: k, mean number of positives of an image when all labels are known; must be given
            (VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4).
        penalty: lambda, weight of the regularisation.
        log_form: released guards the logarithms with 1e-5; logits is exact cross-entropy.
        table_lr_multiplier: the label estimates' learning rate is the network's times this.
        memory_limit: GiB that the table may take on a rank; null allows half of what is free.
    """

    name: str = "role"
    table_lr_multiplier: float = 10.0
    memory_limit: float | None = None


def initial_table(store: LabelStore) -> Tensor:
    """Label estimates of this rank's samples at the start, and one spare row; fp32 [n + 1, C].

    They follow torch's seed, not what was drawn since, and are the same for any number of ranks.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    table = torch.zeros(sample_rows.owned_count(len(store)) + 1, store.num_classes, device=store.device)
    for index in torch.arange(len(store), device=store.device).split(_CHUNK):
        codes = store.rows(index, corrected=False)
        free = (torch.rand(codes.shape, generator=generator) * 2 - 1).to(store.device) * _logit(0.6)
        known = torch.where(codes == POSITIVE, _logit(0.995), torch.where(codes == NEGATIVE, _logit(0.005), free))
        owned = sample_rows.owned(index)
        table[sample_rows.place(index[owned])] = known[owned]
    return table


@register("role")
class RegularisedLabelEstimation(Method[Tensor, MeanPositives]):
    """Network and label estimates teach each other, both held to k positives an image."""

    Options: ClassVar[type[MethodOptions]] = ROLEOptions
    options: ROLEOptions
    batch_statistics: ClassVar[bool] = True
    one_visit_per_step: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True
    # The table has a learning rate for every update.
    counts_updates: ClassVar[bool] = True

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        self.expected_positives = require_expected_positives(options)
        require_not_negative(options, "penalty", "table_lr_multiplier")
        self.table = AdamTable(initial_table(store))
        self.guard = 0.0 if self.options.log_form == "logits" else COLE_GUARD

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """k must be given, and the table must fit."""
        assert isinstance(options, ROLEOptions)
        require_expected_positives(options)
        size = sample_rows.owned_count(len(labels)) * (12 * labels.num_classes + 4)
        what = f"method role's table of {len(labels):,} samples x {labels.num_classes:,} classes"
        require_memory(what, size, options.memory_limit, "method.memory_limit")

    def _read(self, index: Tensor, done: int) -> Rows:
        """Rows of samples that every rank asks for alike; moments are those of this rank's own rows alone."""
        # Rows that others keep are read from, and written to, the spare one: nothing depends on it, and no step has to
        # wait for the number of own rows.
        rows = self.table.read(self._place(index), done)
        return rows._replace(value=sample_rows.from_owners(rows.value, index))

    def _place(self, index: Tensor) -> Tensor:
        spare = len(self.table.value) - 1
        return torch.where(sample_rows.owned(index), sample_rows.place(index), spare)

    def estimates(self, index: Tensor) -> Tensor:
        """Label estimates of samples, [n, C] in 0..1 (collective; the same samples on every rank)."""
        return torch.sigmoid(self._read(index, self.table.done).value)

    def on_epoch_start(self, progress: Progress) -> None:
        """A phase starts with a fresh Adam on the estimates as they are."""
        if progress.update == 0:
            self.table.restart(_logit(1 - 1e-5))
        self.table.reserve(progress.epochs * progress.updates_per_epoch)

    def update_statistics(
        self, forwards: list[Tensor], batches: list[Batch], progress: Progress
    ) -> list[MeanPositives]:
        """Mean numbers of positives over a whole update, the network's and the table's."""
        index = distributed.all_gather_rows(torch.cat([b.index for b in batches]))
        own = torch.sigmoid(self.table.read(self._place(index), progress.update).value)
        table = torch.where(sample_rows.owned(index)[:, None], own, 0).sum()
        network = torch.stack([torch.sigmoid(z).sum() for z in forwards]).sum()
        total = distributed.all_reduce_sum(torch.stack([network, table])) / sum(b.global_size for b in batches)
        return [MeanPositives(total[0], total[1])] * len(batches)

    def _half(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Sum of the entries of EPR's first term and of CE(sigmoid(logits) | target)."""
        positive, negative = log_terms(logits, self.guard)
        return (epr_point(logits, labels, self.guard) + target * positive + (1 - target) * negative).sum()

    def _penalty(self, mean: Tensor) -> Tensor:
        return self.options.penalty * ((mean - self.expected_positives) / self.store.num_classes) ** 2

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Both halves; in training the table takes its step here, from the network's logits of this step."""
        size, count = batch.global_size, batch.global_size * logits.shape[1]
        ahead = self.statistics_of(batch)
        index, place = sample_rows.gather_batch(batch.index, size)
        scores = logits.new_zeros(len(index), logits.shape[1])
        scores[place] = logits.detach()
        scores = distributed.all_reduce_sum(scores)
        labels = batch.labels if distributed.world_size() == 1 else self.store.rows(index)
        rows = self._read(index, progress.update)
        own = rows.value[place]
        image_side = global_mean(self._half(logits, torch.sigmoid(own), batch.labels), count)
        image_side = image_side + self._penalty(mean_positives(logits, size, None if ahead is None else ahead.network))
        with torch.enable_grad():
            free = rows.value.detach().requires_grad_()
            mean = torch.sigmoid(free).sum() / size
            if ahead is not None:
                mean = ahead.table + mean - mean.detach()
            label_side = self._half(free, torch.sigmoid(scores), labels) / count + self._penalty(mean)
            (gradient,) = torch.autograd.grad(label_side / 2, free)
        if self.training:
            lr = progress.lr * self.options.table_lr_multiplier
            self.table.reserve(progress.update + 1)
            self.table.write(self._place(index), rows, gradient, progress.update + 1, lr)
        metrics = {
            "predicted_positives_count": torch.sigmoid(logits.detach()).sum(),
            "estimated_positives_count": torch.sigmoid(own).sum(),
        }
        return LossOutput((image_side + label_side.detach()) / 2, metrics)

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's rows of the table."""
        table = self.table
        columns = {"value": table.value, "first": table.first, "second": table.second, "visited": table.visited}
        return {name: column[:-1] for name, column in columns.items()}

    def load_rank_state(self, rank_states: list[dict[str, Tensor]]) -> None:
        """Take this rank's rows out of all ranks'."""
        for name in ("value", "first", "second", "visited"):
            rows = sample_rows.reshard([state[name] for state in rank_states], len(self.store))
            getattr(self.table, name)[:-1] = rows.to(self.store.device)
