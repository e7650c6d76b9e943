"""What the point-wise methods share: both forms of the logarithms, the reduction, one `loss` for all of them.

A method in one file: a point function in PyTorch, the same in Triton if it is to be fused, options, and `examples`,
from which the kernel tests, the compiles without a GPU and the benchmark take their parameter sets.

The Cole line of code (AN-LS, WAN, EPR, ROLE, EM, IU) writes -log(p + 1e-5), GR guards with 1e-7, the ASL line clamps p
at 1e-8. A guard caps one entry's loss (11.5 for 1e-5) and bends gradients where p is small, so it belongs to the
published method: `log_form: released` keeps it, `log_form: logits` is exact cross-entropy.
Source: docs/sources.md#cole, #gr and #asl.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from spml_kernels import PointLoss, label_loss
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.methods.base import (
    METHODS,
    EntryLoss,
    LossOutput,
    Method,
    MethodOptions,
    Progress,
    global_mean,
    global_sum,
)

LogForm = Literal["released", "logits"]
Reduction = Literal["mean", "sum"]

COLE_GUARD = 1e-5
GR_GUARD = 1e-7
ASL_CLAMP = 1e-8


def log_terms(logits: Tensor, guard: float) -> tuple[Tensor, Tensor]:
    """-log(p + guard) and -log(1 - p + guard); from the logits, without loss of digits, when guard is 0."""
    if guard == 0:
        return -logsigmoid(logits), -logsigmoid(-logits)
    return -torch.log(torch.sigmoid(logits) + guard), -torch.log(torch.sigmoid(-logits) + guard)


def power_p(logits: Tensor, exponent: float) -> Tensor:
    """p ** exponent; value and gradient stay finite where p underflows."""
    return torch.exp(exponent * logsigmoid(logits))


def power_q(logits: Tensor, exponent: float) -> Tensor:
    """(1 - p) ** exponent; value and gradient stay finite where 1 - p underflows."""
    return torch.exp(exponent * logsigmoid(-logits))


def has_negatives(labels: SparseLabels) -> bool:
    """Whether any entry is a known negative."""
    if labels.default == NEGATIVE:
        return int(labels.indptr[-1]) < len(labels) * labels.num_classes or bool((labels.codes == NEGATIVE).any())
    return bool((labels.codes == NEGATIVE).any())


def require_negatives(labels: SparseLabels, name: str) -> None:
    """Raise `UserError` when a method that learns from known labels alone would only ever see positives."""
    if not has_negatives(labels):
        raise UserError(
            f"method {name} learns from known labels only, and the training split has no known negative: "
            "everything would be predicted positive; use an, em or ll_r"
        )


class PointMethod(Method[Tensor, Tensor]):
    """A method whose loss is a sum over (logit, code) pairs. Subclasses give the point function and its numbers.

    `options.log_form` chooses the guard and `options.reduction` mean or sum, where a method has these options.

    Attributes:
        point: loss of one entry; without a Triton kernel it runs in PyTorch on every device.
        examples: parameter sets worth testing, every branch of the point function among them, the most usual one first;
            empty takes the options' defaults.
        guard: guard of the released code's logarithms.
    """

    point: ClassVar[PointLoss]
    examples: ClassVar[tuple[MethodOptions, ...]] = ()
    guard: ClassVar[float] = COLE_GUARD

    @property
    def log_guard(self) -> float:
        """The guard in use."""
        return 0.0 if getattr(self.options, "log_form", None) == "logits" else self.guard

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Numbers handed to the point function."""
        return ()

    def linear_loss(self) -> EntryLoss:
        """The point function with its numbers in the linear phase."""
        return EntryLoss(self.point, self.params(Progress(1, 1, 0, 1, phase="linear")))

    def codes(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes handed to the point function, and metrics."""
        return batch.labels, {}

    def reduce(self, total: Tensor, batch: Batch) -> Tensor:
        """This rank's loss from the sum over its entries: the mean over B x C of all ranks, or the sum over them."""
        if self.sums_over_batch:
            return global_sum(total)
        return global_mean(total, batch.global_size * self.store.num_classes)

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """The reduced point loss."""
        codes, metrics = self.codes(logits, batch, progress)
        total = label_loss(logits, codes, self.point, self.params(progress))
        return LossOutput(self.reduce(total, batch), metrics)


class PointExample(NamedTuple):
    """A point function with one set of numbers.

    Attributes:
        method: the method's name.
        point: loss of one entry.
        params: what the method hands to it with these options, 80 classes, in epoch 2 of 3.
    """

    method: str
    point: PointLoss
    params: tuple[float, ...]

    @property
    def name(self) -> str:
        """Point function and numbers."""
        return f"{self.point.name}-{'-'.join(f'{value:g}' for value in self.params)}"


def point_examples() -> list[PointExample]:
    """The examples of every registered point method.

    A method that inherits its point function from a registered one and lists no examples has none of its own.
    """
    store = LabelStore(SparseLabels.from_positives([[0], [1]], 80, UNKNOWN))
    progress = Progress(epoch=2, epochs=3, update=1, updates_per_epoch=1)
    registered = METHODS.items()
    classes = {method_class for _, method_class in registered}
    examples = []
    for name, method_class in registered:
        if not issubclass(method_class, PointMethod):
            continue
        parents = [parent for parent in method_class.__mro__[1:] if parent in classes]
        inherited = any(getattr(parent, "point", None) is method_class.point for parent in parents)
        if inherited and "examples" not in vars(method_class):
            continue
        for options in method_class.examples or (method_class.Options(name=name),):
            params = method_class(options, store).params(progress)
            examples.append(PointExample(name, method_class.point, params))
    return examples


def hidden_positives(selected: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Metrics of a selection of unknown entries: how many, and where the truth is known how many were positives.

    The selection is noted on the batch.
    """
    batch.selected = selected
    metrics = {"selected_count": selected.sum()}
    if batch.truth is not None:
        hidden = (batch.labels == UNKNOWN) & (batch.truth == 1)
        metrics |= {"selected_true_count": (selected & hidden).sum(), "hidden_positive_count": hidden.sum()}
    return metrics


def require_fraction(options: MethodOptions, *names: str) -> None:
    """Raise `UserError` unless these options lie between 0 and 1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"method.{name} is {getattr(options, name)}; it must lie between 0 and 1")


def require_not_negative(options: MethodOptions, *names: str) -> None:
    """Raise `UserError` unless these options are 0 or more."""
    for name in names:
        if not getattr(options, name) >= 0:
            raise UserError(f"method.{name} is {getattr(options, name)}; it must not be negative")
