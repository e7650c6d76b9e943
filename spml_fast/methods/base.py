"""What every method shares: the registry, the options, and the meaning of a loss that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, cast

from spml_kernels import PointLoss
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.config import MethodOptions as MethodOptions
from spml_fast.core.precision import no_autocast
from spml_fast.core.registry import Registry
from spml_fast.data.labels import LabelStore, SparseLabels

if TYPE_CHECKING:
    from spml_fast.models.classifier import Classifier


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        epoch: current epoch, counted from 1.
        epochs: epochs of this phase.
        update: optimizer updates done in this phase.
        updates_per_epoch: updates an epoch.
        phase: `linear` trains the head on a frozen backbone, `finetune` everything.
        lr: learning rate of this update, that of the first parameter group (the backbone; the head in phase linear).
    """

    epoch: int
    epochs: int
    update: int
    updates_per_epoch: int
    phase: str = "finetune"
    lr: float = 0.0

    @property
    def ends_epoch(self) -> bool:
        """Whether this is an epoch's last update."""
        return self.update + 1 == self.epoch * self.updates_per_epoch


@dataclass
class LossOutput:
    """What a method's forward gives.

    Attributes:
        loss: 0-d; its mean over ranks is the loss of the global micro-step, which is what DeepSpeed averages.
        metrics: 0-d device tensors whose sums over ranks are meaningful; names ending in `_count` are counts, summed
            over an epoch. Nobody reads them within a step.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class EntryLoss(NamedTuple):
    """The loss of one (logit, code) pair.

    Attributes:
        point: the function.
        params: its numbers.
    """

    point: PointLoss
    params: tuple[float, ...] = ()


Forward = TypeVar("Forward")
Statistics = TypeVar("Statistics")


class Method(nn.Module, Generic[Forward, Statistics]):
    """A loss with its state. Subclass, set the class attributes, implement `loss`, and decorate with `@register`.

    A method with `batch_statistics` is `Method[Forward, Statistics]`: what `statistics_forward` gives of a micro-step
    (as a rule logits, a `Tensor`), and what `update_statistics` makes of these for each of them. Others are plainly
    `Method`.

    State lives in buffers, so that it is moved and checkpointed like any other; state whose size changes goes through
    `get_extra_state` and `set_extra_state`. Checkpoints hold rank 0's, so state is the same on every rank whenever one
    is saved: after every update for methods that change it in the step, else after `on_epoch_end`. State that grows
    with the samples is spread over ranks (state/sample_rows.py) and goes through `rank_state` and `load_rank_state`.

    Attributes:
        views: views the method needs; the first is the one that `forward` passes through the classifier.
        label_source: `observed`, what training may see, or `known`, everything annotated (the oracle).
        batch_statistics: whether the loss depends on statistics of the whole batch, so that `update_statistics`
            matters.
        uses_truth: whether the loss reads `batch.truth` (oracles alone); `check_labels` then gets the known labels.
        one_visit_per_step: whether an image must not come twice in a micro-step, because the step writes its row.
        needs_samples: whether the loss reads state that is kept for single samples, so that logits and codes alone do
            not tell it.
        corrects_labels: whether unknown labels that it selects are taken for positive rather than left out.
        counts_updates: whether its state is numbered by updates, so that the batch size cannot change on a resume.
        solvable: whether logit and code alone tell the loss of an entry in the linear phase, or in its first epoch, by
            a differentiable function that never changes there, so that `train.linear solve` can solve for the head;
            `linear_loss` gives it. A subclass whose loss takes more says False.
        options: an instance of `Options`; a subclass with options of its own declares their type.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    views: ClassVar[tuple[str, ...]] = ("weak",)
    label_source: ClassVar[str] = "observed"
    batch_statistics: ClassVar[bool] = False
    uses_truth: ClassVar[bool] = False
    one_visit_per_step: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    corrects_labels: ClassVar[bool] = False
    counts_updates: ClassVar[bool] = False
    solvable: ClassVar[bool] = False
    options: MethodOptions

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__()
        self.options = options
        self.store = store

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """Raise `UserError` when the training labels do not suit the method."""

    @property
    def sums_over_batch(self) -> bool:
        """Whether the loss is a sum over the batch (ASL, SPLC, Hill, CSL as published) rather than a mean."""
        return getattr(self.options, "reduction", "mean") == "sum"

    def fraction_of_update(self, micro_size: int, update_size: int) -> float:
        """Factor of a micro-step's loss, such that the factors' losses add up to the loss of the whole update.

        Args:
            micro_size: samples of the micro-step over all ranks.
            update_size: samples of the update over all ranks.
        """
        return 1.0 if self.sums_over_batch else micro_size / update_size

    def forward(self, classifier: Classifier, batch: Batch, progress: Progress) -> LossOutput:
        """One forward through the classifier and the loss of its logits. Methods with several views override this."""
        output = classifier(batch.views[self.views[0]], alpha=classifier.alpha_train)
        with no_autocast(output.logits.device):
            return self.loss(output.logits, batch, progress)

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Loss of logits [B, C] fp32 of this rank's part of the micro-step."""
        raise NotImplementedError

    def statistics_forward(self, classifier: Classifier, batch: Batch, progress: Progress) -> Forward:
        """What `update_statistics` needs of one micro-step, from a pass without gradient: the first view's logits."""
        return cast("Forward", classifier(batch.views[self.views[0]], alpha=classifier.alpha_train).logits)

    def update_statistics(
        self, forwards: list[Forward], batches: list[Batch], progress: Progress
    ) -> Sequence[Statistics | None]:
        """Batch statistics of a whole update ahead of its micro-steps (exact accumulation).

        Args:
            forwards: per micro-step, what `statistics_forward` gave on this rank.
            batches: the micro-steps.
            progress: where training stands.

        Returns:
            Per micro-step, what `statistics_of` gives the loss.
        """
        return [None] * len(batches)

    def statistics_of(self, batch: Batch) -> Statistics | None:
        """The statistics made ahead for this micro-step; None where it is an update of its own."""
        return cast("Statistics | None", batch.update_statistics)

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's part of state that grows with the samples; saved by every rank in a file of its own."""
        return {}

    def load_rank_state(self, rank_states: list[dict[str, Tensor]]) -> None:
        """Restore it from what every rank of the run that saved it gave, in rank order, on the CPU."""

    def linear_loss(self) -> EntryLoss:
        """The loss of an entry in the linear phase of a method that is `solvable`."""
        raise NotImplementedError

    def on_epoch_start(self, progress: Progress) -> None:
        """Called on every rank before an epoch."""

    def needs_train_scores(self, progress: Progress) -> bool:
        """Whether, at the end of this epoch, the training split is to be scored for `on_train_scores`."""
        return False

    def on_train_scores(self, index: Tensor, logits: Tensor) -> None:
        """One batch of that pass, before `on_epoch_end`: every sample once over all ranks, network in evaluation mode.

        Args:
            index: int64 [n] samples.
            logits: [n, C] fp32 at the training alpha, of the evaluation view (no flip, no crop).
        """

    def on_epoch_end(self, progress: Progress) -> dict[str, Any]:
        """Called on every rank after an epoch (collective); returns figures for the log (numbers also go to the
        monitor, anything else that JSON can hold to metrics.jsonl alone)."""
        return {}


M = TypeVar("M", bound="type[Method[Any, Any]]")
METHODS: Registry[Method[Any, Any]] = Registry("method")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by `name`."""
    return METHODS.register(name)


def method_names() -> list[str]:
    """Names of all methods."""
    return METHODS.names()


def get_method(name: str) -> type[Method[Any, Any]]:
    """The method class called `name`; `UserError` lists the names that exist."""
    return METHODS.get(name)


def global_mean(local_sum: Tensor, count: Tensor | float) -> Tensor:
    """This rank's part of sum / count over all ranks, such that the mean over ranks is the global mean.

    Args:
        local_sum: 0-d sum over this rank's entries, differentiable.
        count: number of entries over all ranks.
    """
    return local_sum * distributed.world_size() / count


def global_sum(local_sum: Tensor) -> Tensor:
    """This rank's part of a sum over all ranks, such that the mean over ranks is the global sum."""
    return local_sum * distributed.world_size()


def attached_global_sum(local_sum: Tensor) -> Tensor:
    """The sum over ranks itself, on every rank, for losses that are not linear in it.

    Its gradient reaches this rank's part alone, scaled so that the mean over ranks of the parameter gradients is that
    of the global loss.
    """
    total = distributed.all_reduce_sum(local_sum.detach())
    return total + distributed.world_size() * (local_sum - local_sum.detach())
