"""EM: entropy maximisation.

L = 1/(B C) sum [ -log(p + 1e-5) on observed positives, -alpha H(p) on unknown ],
H(p) = -p log(p + 1e-5) - (1 - p) log(1 - p + 1e-5).
The entropy of unknown entries is maximised, so their loss is negative, and the whole loss may be. The published data
have no observed negatives; here they get -log(1 - p + 1e-5).

alpha: VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01. Learning rate 1e-5 (CUB 1e-4), batch 8 / 16 / 16 / 8, Adam, one
learning rate for backbone and head (train.head_lr_multiplier 1). The authors count a class as predicted from p > 0.75
on (eval.threshold 0.75).
An image without an observed positive, and a class that is never observed, only get the pull towards p = 0.5; that is
the method. It is reported (`rows_without_positive_count`, `classes_without_positives`), not mended.

Source: Zhou et al., "Acknowledging the Unknown for Multi-label Learning with Single Positive Labels", ECCV 2022;
docs/sources.md#em.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import log_terms_jit, sigmoid_jit
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import LogForm, PointMethod, log_terms, require_not_negative


def em_point(logits: Tensor, codes: Tensor, alpha: float, guard: float) -> Tensor:
    """Cross-entropy on known entries, minus alpha times the entropy on unknown ones, 0 on other codes; element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        alpha: weight of the entropy.
        guard: added inside the logarithms; 0 takes them from the logits.
    """
    positive, negative = log_terms(logits, guard)
    entropy = torch.sigmoid(logits) * positive + torch.sigmoid(-logits) * negative
    known = torch.where(codes == POSITIVE, positive, torch.where(codes == NEGATIVE, negative, 0))
    return torch.where(codes == UNKNOWN, -alpha * entropy, known)


@jit
def em_point_jit(z, code, alpha, guard):
    """`em_point` and its derivative, for the fused kernel."""
    positive, d_positive, negative, d_negative = log_terms_jit(z, guard)
    p, q = sigmoid_jit(z)
    entropy = p * positive + q * negative
    d_entropy = p * q * (positive - negative) + p * d_positive + q * d_negative
    loss = tl.where(code == 1, positive, tl.where(code == 0, negative, 0.0))
    slope = tl.where(code == 1, d_positive, tl.where(code == 0, d_negative, 0.0))
    return tl.where(code == -1, -alpha * entropy, loss), tl.where(code == -1, -alpha * d_entropy, slope)


@dataclass(frozen=True)
class EMOptions(MethodOptions):
    """Entropy maximisation.

    Attributes:
        name: the method.
        alpha: weight of the entropy of unknown labels (VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01).
        log_form: released guards the logarithms with 1e-5; logits is exact.
    """

    name: str = "em"
    alpha: float = 0.1
    log_form: LogForm = "released"


@register("em")
class EntropyMaximisation(PointMethod):
    """Observed positives up, unknown labels towards uncertainty."""

    Options: ClassVar[type[MethodOptions]] = EMOptions
    options: EMOptions
    point: ClassVar[PointLoss] = PointLoss("em", em_point, em_point_jit)
    solvable: ClassVar[bool] = True
    examples: ClassVar[tuple[MethodOptions, ...]] = (EMOptions(alpha=0.2), EMOptions(alpha=0.2, log_form="logits"))

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_not_negative(options, "alpha")
        self.classes_without_positives = int((store.class_counts(POSITIVE) == 0).sum())

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Weight of the entropy, guard."""
        return (self.options.alpha, self.log_guard)

    def codes(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels; counts rows that have nothing but entropy."""
        return batch.labels, {"rows_without_positive_count": (batch.labels != POSITIVE).all(1).sum()}

    def on_epoch_end(self, progress: Progress) -> dict[str, float]:
        """How many classes have nothing but entropy."""
        return {"classes_without_positives": float(self.classes_without_positives)}
