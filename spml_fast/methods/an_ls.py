"""AN-LS: assume negative, with label smoothing.

L = 1/(B C) sum [ (1 - e) l+ + e l- on observed positives, (1 - e) l- + e l+ elsewhere ], e = 0.1, l+ = -log(p + 1e-5),
l- = -log(1 - p + 1e-5).

Where released code differs: Cole's code gives the wrong label the weight e, the line of L48 e / 2 (form: half). With
smoothing 0 and the released logarithms this is the AN of Cole's code.

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import log_terms_jit
from torch import Tensor

from spml_fast.data.labels import LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import LogForm, PointMethod, log_terms, require_fraction


def an_ls_point(logits: Tensor, codes: Tensor, smoothing: float, guard: float) -> Tensor:
    """Smoothed cross-entropy with unknown as negative, element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        smoothing: weight of the wrong label.
        guard: added inside the logarithms; 0 takes them from the logits.
    """
    positive, negative = log_terms(logits, guard)
    right, wrong = 1 - smoothing, smoothing
    return torch.where(codes == 1, right * positive + wrong * negative, right * negative + wrong * positive)


@jit
def an_ls_point_jit(z, code, smoothing, guard):
    """`an_ls_point` and its derivative, for the fused kernel."""
    positive, d_positive, negative, d_negative = log_terms_jit(z, guard)
    target = tl.where(code == 1, 1.0 - smoothing, smoothing)
    return target * positive + (1.0 - target) * negative, target * d_positive + (1.0 - target) * d_negative


@dataclass(frozen=True)
class ANLSOptions(MethodOptions):
    """Assume negative with label smoothing.

    Attributes:
        name: the method.
        smoothing: e of the label smoothing.
        form: cole gives the wrong label the weight e; half gives it e / 2.
        log_form: released guards the logarithms with 1e-5; logits is exact cross-entropy.
    """

    name: str = "an_ls"
    smoothing: float = 0.1
    form: Literal["cole", "half"] = "cole"
    log_form: LogForm = "released"


@register("an_ls")
class AssumeNegativeSmoothed(PointMethod):
    """Smoothed binary cross-entropy with every unknown label as a negative."""

    Options: ClassVar[type[MethodOptions]] = ANLSOptions
    options: ANLSOptions
    point: ClassVar[PointLoss] = PointLoss("an_ls", an_ls_point, an_ls_point_jit)
    solvable: ClassVar[bool] = True
    examples: ClassVar[tuple[MethodOptions, ...]] = (ANLSOptions(), ANLSOptions(log_form="logits"))

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        require_fraction(options, "smoothing")

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Weight of the wrong label, guard."""
        return (self.options.smoothing / (2 if self.options.form == "half" else 1), self.log_guard)
