"""SPLC: self-paced loss correction with focal margin.

z' = z - m on observed positives, z elsewhere; p' = sigmoid(z'). From the second epoch on every unknown entry with
p' > tau gets the target 1 (no margin); all other unknown entries are negatives.
L = sum (1 - pt)^g (-log pt), pt = p' for target 1 and 1 - p' for target 0; tau = 0.6 (0.65 when 75 per cent of the
labels are there), m = 1, g = 2; a sum over B C, the focal weight carries gradient. With correction off this is the
focal margin loss of the same paper (change_epoch beyond the last one).

Where released code differs: it knows no observed negatives; here they stay negatives whatever p is. It trains Adam
1e-4, batch 128, the one-cycle of 80 epochs stopped after 31, EMA 0.9997, weight decay 1e-4, images in 0..1.

Source: Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels", 2021;
docs/sources.md#hill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core.batch import Batch
from spml_fast.data.labels import POSITIVE, UNKNOWN, LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import (
    PointMethod,
    Reduction,
    hidden_positives,
    power_p,
    power_q,
    require_fraction,
    require_not_negative,
)


def splc_point(
    logits: Tensor, codes: Tensor, tau: float, margin: float, gamma: float, correct: float, attached: float
) -> Tensor:
    """Focal loss with margin and, when `correct`, with confident unknown entries as positives; element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        tau: probability above which an unknown entry is corrected.
        margin: taken off the logits of observed positives.
        gamma: focal exponent.
        correct: 0 corrects nothing.
        attached: 0 takes no gradient through the focal weight.
    """
    observed = codes == POSITIVE
    shifted = torch.where(observed, logits - margin, logits)
    corrected = (codes == UNKNOWN) & (torch.sigmoid(logits) > tau) if correct else torch.zeros_like(observed)
    target = observed | corrected
    weight = torch.where(target, power_q(shifted, gamma), power_p(shifted, gamma))
    log = torch.where(target, -logsigmoid(shifted), -logsigmoid(-shifted))
    return (weight if attached else weight.detach()) * log


@jit
def splc_point_jit(z, code, tau, margin, gamma, correct, attached):
    """`splc_point` and its derivative, for the fused kernel."""
    observed = code == 1
    corrected = (code == -1) & (sigmoid_jit(z)[0] > tau) & (correct != 0)
    # Both targets by one formula: x is the logit against the target, sigmoid(x) the probability of being wrong.
    sign = tl.where(observed | corrected, -1.0, 1.0)
    x = sign * tl.where(observed, z - margin, z)
    wrong, right = sigmoid_jit(x)
    log = softplus_jit(x)
    weight = tl.exp(-gamma * softplus_jit(-x))
    return weight * log, sign * weight * (wrong + attached * gamma * right * log)


@dataclass(frozen=True)
class SPLCOptions(MethodOptions):
    """Self-paced loss correction.

    Attributes:
        name: the method.
        tau: probability above which an unknown label counts as positive (0.65 where 75 per cent of labels are there).
        margin: taken off the logits of observed positives.
        gamma: focal exponent.
        change_epoch: epochs before correction begins.
        focal_weight: attached (released) takes gradient through the focal weight; detached does not.
        reduction: sum over all B x C entries of the update (released), or their mean.
    """

    name: str = "splc"
    tau: float = 0.6
    margin: float = 1.0
    gamma: float = 2.0
    change_epoch: int = 1
    focal_weight: Literal["attached", "detached"] = "attached"
    reduction: Reduction = "sum"


@register("splc")
class SelfPacedLossCorrection(PointMethod):
    """Assume negative with focal margin, confident unknown labels corrected to positives."""

    Options: ClassVar[type[MethodOptions]] = SPLCOptions
    options: SPLCOptions
    point: ClassVar[PointLoss] = PointLoss("splc", splc_point, splc_point_jit)
    corrects_labels: ClassVar[bool] = True
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        SPLCOptions(),
        SPLCOptions(change_epoch=3),
        SPLCOptions(margin=0.0, focal_weight="detached"),
    )

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_fraction(options, "tau")
        require_not_negative(options, "gamma", "change_epoch")

    def corrects(self, progress: Progress) -> bool:
        """Whether correction is on in this epoch."""
        return progress.epoch > self.options.change_epoch

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Threshold, margin, exponent, whether to correct, whether the weight carries gradient."""
        o = self.options
        return (o.tau, o.margin, o.gamma, float(self.corrects(progress)), float(o.focal_weight == "attached"))

    def codes(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels; counts what is corrected."""
        confident = (batch.labels == UNKNOWN) & (torch.sigmoid(logits.detach()) > self.options.tau)
        return batch.labels, hidden_positives(confident & self.corrects(progress), batch)
