"""Hill: a loss that turns down confident "negatives".

L = sum [ (1 - pm)^g (-log pm) on observed positives, (lambda - p) p^2 elsewhere ], pm = sigmoid(z - m);
lambda = 1.5, m = 1, g = 2; a sum over B C; the focal weight carries gradient. The negative term's slope is 0 at p = 1,
so an unknown label that the model is sure of is left alone.

Where released code differs: it takes log(sigmoid) without guard (infinite below z = -100 or so), here from the logits.
GR's repository has a Hill without margin and with a mean: margin 0, gamma 0, reduction mean. Recipe as for SPLC.

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

from spml_fast.data.labels import POSITIVE, LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import PointMethod, Reduction, power_q, require_not_negative


def hill_point(logits: Tensor, codes: Tensor, lam: float, margin: float, gamma: float, attached: float) -> Tensor:
    """Focal margin loss on observed positives, the hill elsewhere; element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        lam: where the hill has its top, p = 2/3 lam.
        margin: taken off the logits of observed positives.
        gamma: focal exponent of observed positives.
        attached: 0 takes no gradient through the focal weight.
    """
    shifted = logits - margin
    weight = power_q(shifted, gamma)
    p = torch.sigmoid(logits)
    positive = (weight if attached else weight.detach()) * -logsigmoid(shifted)
    return torch.where(codes == POSITIVE, positive, (lam - p) * p**2)


@jit
def hill_point_jit(z, code, lam, margin, gamma, attached):
    """`hill_point` and its derivative, for the fused kernel."""
    p, q = sigmoid_jit(z)
    x = margin - z
    wrong, right = sigmoid_jit(x)
    log = softplus_jit(x)
    weight = tl.exp(-gamma * softplus_jit(-x))
    d_positive = -weight * (wrong + attached * gamma * right * log)
    d_hill = (2.0 * lam - 3.0 * p) * p * p * q
    return tl.where(code == 1, weight * log, (lam - p) * p * p), tl.where(code == 1, d_positive, d_hill)


@dataclass(frozen=True)
class HillOptions(MethodOptions):
    """Hill loss.

    Attributes:
        name: the method.
        lam: where the hill of the negative term has its top, p = 2/3 lam.
        margin: taken off the logits of observed positives.
        gamma: focal exponent of observed positives.
        focal_weight: attached (released) takes gradient through the focal weight; detached does not.
        reduction: sum over all B x C entries of the update (released), or their mean.
    """

    name: str = "hill"
    lam: float = 1.5
    margin: float = 1.0
    gamma: float = 2.0
    focal_weight: Literal["attached", "detached"] = "attached"
    reduction: Reduction = "sum"


@register("hill")
class Hill(PointMethod):
    """Assume negative with a loss that flattens out on confident predictions."""

    Options: ClassVar[type[MethodOptions]] = HillOptions
    options: HillOptions
    point: ClassVar[PointLoss] = PointLoss("hill", hill_point, hill_point_jit)
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        HillOptions(),
        HillOptions(margin=0.0, gamma=0.0, focal_weight="detached"),
    )

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_not_negative(options, "gamma")

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Top of the hill, margin, exponent, whether the weight carries gradient."""
        o = self.options
        return (o.lam, o.margin, o.gamma, float(o.focal_weight == "attached"))
