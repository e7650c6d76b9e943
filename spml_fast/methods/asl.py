"""ASL: asymmetric loss.

L = sum [ (1 - p)^g+ l+ on observed positives, pm^g- (-log(1 - pm)) elsewhere ], pm = max(p - m, 0);
g+ = 0, g- = 4, m = 0.05; logarithms of values clamped at 1e-8; a sum over B C, not a mean.

Where released code differs, and the option that gives its behaviour:
- its training script detaches the focal weights, its loss class by default does not. focal_weight: attached.
- the class's own default is g+ = 1, the training scripts set 0. gamma_positive: 1.
- BCE and focal loss of the SPLC code are this with (g-, g+, m) = (0, 0, 0) and (2, 2, 0).
- its images are not normalised beyond 0..1. data.mean: [0, 0, 0], data.std: [1, 1, 1].
Published recipe: Adam 1e-4, one-cycle with warmup_share 0.2, weight decay 1e-4, EMA 0.9997, batch 128, 448 px, Cutout
and RandAugment, the one-cycle of 80 epochs stopped at 40. The authors advise to step BCE -> focal -> ASL.

Source: Ridnik et al., "Asymmetric Loss for Multi-Label Classification", ICCV 2021; docs/sources.md#asl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import at_least_jit, clamped_terms_jit, sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.data.labels import LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import (
    ASL_CLAMP,
    LogForm,
    PointMethod,
    Reduction,
    power_p,
    power_q,
    require_fraction,
    require_not_negative,
)


def focal_positive(logits: Tensor, gamma: float, clamp: float, attached: bool) -> Tensor:
    """(1 - p)^gamma (-log p), element-wise.

    Args:
        logits: floating, any shape.
        gamma: focal exponent.
        clamp: lower end of p inside the logarithm; 0 takes it from the logits.
        attached: whether the focal weight carries gradient.
    """
    log = -torch.log(torch.sigmoid(logits).clamp(min=clamp)) if clamp else -logsigmoid(logits)
    weight = power_q(logits, gamma)
    return (weight if attached else weight.detach()) * log


def focal_negative(logits: Tensor, gamma: float, margin: float, clamp: float, attached: bool) -> Tensor:
    """pm^gamma (-log(1 - pm)) with pm = max(p - margin, 0), element-wise; exactly 0 for p <= margin.

    Args:
        logits: floating, any shape.
        gamma: focal exponent.
        margin: probability up to which nothing is lost.
        clamp: lower end of 1 - pm inside the logarithm; 0 takes it from the logits where there is no margin.
        attached: whether the focal weight carries gradient.
    """
    if margin == 0:
        log = -torch.log(torch.sigmoid(-logits).clamp(min=clamp)) if clamp else -logsigmoid(-logits)
        weight = power_p(logits, gamma)
    else:
        shifted = torch.sigmoid(logits) - margin
        # Said so, a NaN is inside and stays one.
        inside = ~(shifted <= 0)
        # Powers of 0 have no gradient worth having; such entries are cut off below.
        shifted = torch.where(inside, shifted, margin)
        log = torch.where(inside, -torch.log(torch.clamp(torch.sigmoid(-logits) + margin, min=clamp)), 0)
        weight = shifted**gamma
    return (weight if attached else weight.detach()) * log


def asl_point(
    logits: Tensor,
    codes: Tensor,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    clamp: float,
    attached: float,
) -> Tensor:
    """The asymmetric loss with unknown as negative, element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        gamma_positive: focal exponent of observed positives.
        gamma_negative: focal exponent of everything else.
        margin: probability up to which a negative costs nothing.
        clamp: lower end of probabilities inside the logarithms; 0 takes them from the logits.
        attached: 0 takes no gradient through the focal weights.
    """
    positive = focal_positive(logits, gamma_positive, clamp, attached != 0)
    negative = focal_negative(logits, gamma_negative, margin, clamp, attached != 0)
    return torch.where(codes == 1, positive, negative)


@jit
def focal_positive_jit(z, gamma, clamp, attached):
    """`focal_positive` and its derivative, for fused kernels."""
    log, d_log, _, _ = clamped_terms_jit(z, clamp)
    p, _ = sigmoid_jit(z)
    weight = tl.exp(-gamma * softplus_jit(z))
    return weight * log, weight * (d_log - attached * gamma * p * log)


@jit
def focal_negative_jit(z, gamma, margin, clamp, attached):
    """`focal_negative` and its derivative, for fused kernels."""
    _, _, plain, d_plain = clamped_terms_jit(z, clamp)
    p, q = sigmoid_jit(z)
    weight = tl.exp(-gamma * softplus_jit(-z))
    whole, d_whole = weight * plain, weight * (d_plain + attached * gamma * q * plain)
    inside = (p <= margin) == 0
    shifted = tl.where(inside, p - margin, 1.0)
    rest = tl.where(inside, q + margin, 1.0)
    log = -tl.log(at_least_jit(rest, tl.where(clamp > 0, clamp, 1e-38)))
    d_log = tl.where(rest < clamp, 0.0, p * q / rest)
    weight = tl.exp(gamma * tl.log(shifted))
    slope = weight * (d_log + attached * gamma * p * q / shifted * log)
    cut = margin > 0
    return (
        tl.where(cut, tl.where(inside, weight * log, 0.0), whole),
        tl.where(cut, tl.where(inside, slope, 0.0), d_whole),
    )


@jit
def asl_point_jit(z, code, gamma_positive, gamma_negative, margin, clamp, attached):
    """`asl_point` and its derivative, for the fused kernel."""
    positive, d_positive = focal_positive_jit(z, gamma_positive, clamp, attached)
    negative, d_negative = focal_negative_jit(z, gamma_negative, margin, clamp, attached)
    return tl.where(code == 1, positive, negative), tl.where(code == 1, d_positive, d_negative)


@dataclass(frozen=True)
class ASLOptions(MethodOptions):
    """Asymmetric loss.

    Attributes:
        name: the method.
        gamma_positive: focal exponent of observed positives (0 in the training scripts, 1 in the loss class).
        gamma_negative: focal exponent of everything else.
        margin: probability below which a negative costs nothing.
        focal_weight: detached, as the training script has it, takes no gradient through the focal weights; attached
            does.
        log_form: released clamps at 1e-8 before the logarithm; logits takes it from the logits where there is no
            margin.
        reduction: sum over all B x C entries of the update (released), or their mean.
    """

    name: str = "asl"
    gamma_positive: float = 0.0
    gamma_negative: float = 4.0
    margin: float = 0.05
    focal_weight: Literal["detached", "attached"] = "detached"
    log_form: LogForm = "released"
    reduction: Reduction = "sum"


@register("asl")
class AsymmetricLoss(PointMethod):
    """Assume negative, with easy negatives turned down and a probability margin."""

    Options: ClassVar[type[MethodOptions]] = ASLOptions
    options: ASLOptions
    point: ClassVar[PointLoss] = PointLoss("asl", asl_point, asl_point_jit)
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        ASLOptions(),
        ASLOptions(gamma_positive=1.0, focal_weight="attached"),
        ASLOptions(gamma_positive=2.0, gamma_negative=2.0, margin=0.0, log_form="logits", focal_weight="attached"),
        ASLOptions(gamma_negative=0.0, margin=0.0),
    )
    guard: ClassVar[float] = ASL_CLAMP

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_not_negative(options, "gamma_positive", "gamma_negative")
        require_fraction(options, "margin")

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Exponents, margin, clamp, whether the weights carry gradient."""
        o = self.options
        attached = float(o.focal_weight == "attached")
        return (o.gamma_positive, o.gamma_negative, o.margin, self.log_guard, attached)
