"""WAN: weak assume negative.

L = 1/(B C) sum [ l+ on observed positives, gamma l- elsewhere ], gamma = 1 / (C - 1), so that the one observed positive
weighs as much as all assumed negatives of its image together. Logarithms guarded with 1e-5 as released.

Source: Cole et al., CVPR 2021, after Mac Aodha et al., ICCV 2019; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import log_terms_jit
from torch import Tensor

from spml_fast.data.labels import LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import LogForm, PointMethod, log_terms, require_not_negative


def wan_point(logits: Tensor, codes: Tensor, gamma: float, guard: float) -> Tensor:
    """Cross-entropy with unknown as negative of weight gamma, element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        gamma: weight of everything that is no observed positive.
        guard: added inside the logarithms; 0 takes them from the logits.
    """
    positive, negative = log_terms(logits, guard)
    return torch.where(codes == 1, positive, gamma * negative)


@jit
def wan_point_jit(z, code, gamma, guard):
    """`wan_point` and its derivative, for the fused kernel."""
    positive, d_positive, negative, d_negative = log_terms_jit(z, guard)
    observed = code == 1
    return tl.where(observed, positive, gamma * negative), tl.where(observed, d_positive, gamma * d_negative)


@dataclass(frozen=True)
class WANOptions(MethodOptions):
    """Weak assume negative.

    Attributes:
        name: the method.
        gamma: weight of everything that is no observed positive; null takes 1 / (number of classes - 1).
        log_form: released guards the logarithms with 1e-5; logits is exact cross-entropy.
    """

    name: str = "wan"
    gamma: float | None = None
    log_form: LogForm = "released"


@register("wan")
class WeakAssumeNegative(PointMethod):
    """Binary cross-entropy with every unknown label as a negative of small weight."""

    Options: ClassVar[type[MethodOptions]] = WANOptions
    options: WANOptions
    point: ClassVar[PointLoss] = PointLoss("wan", wan_point, wan_point_jit)
    solvable: ClassVar[bool] = True
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        WANOptions(gamma=1 / 80),
        WANOptions(gamma=1 / 80, log_form="logits"),
    )

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        if self.options.gamma is not None:
            require_not_negative(options, "gamma")

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Weight of negatives, guard."""
        gamma = self.options.gamma
        return (1 / max(self.store.num_classes - 1, 1) if gamma is None else gamma, self.log_guard)
