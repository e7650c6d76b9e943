"""IU: ignore unknown.

L = 1/(B C) sum [ l+ on observed positives, l- on observed negatives, 0 on unknown ], logarithms guarded with 1e-5.
`partial` is the same with the mean over the known entries alone, `durand` with a weight for their fraction.

Where released code differs: it asserts an observed positive and an observed negative in every batch; here a batch
without them is fine, and only a training split without any negative is refused.

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import log_terms_jit
from torch import Tensor

from spml_fast.data.labels import NEGATIVE, POSITIVE, SparseLabels
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import LogForm, PointMethod, log_terms, require_negatives


def iu_point(logits: Tensor, codes: Tensor, guard: float) -> Tensor:
    """Cross-entropy on known entries, 0 elsewhere, element-wise."""
    positive, negative = log_terms(logits, guard)
    return torch.where(codes == POSITIVE, positive, torch.where(codes == NEGATIVE, negative, 0))


@jit
def iu_point_jit(z, code, guard):
    """`iu_point` and its derivative, for the fused kernel."""
    positive, d_positive, negative, d_negative = log_terms_jit(z, guard)
    loss = tl.where(code == 1, positive, tl.where(code == 0, negative, 0.0))
    return loss, tl.where(code == 1, d_positive, tl.where(code == 0, d_negative, 0.0))


@dataclass(frozen=True)
class IUOptions(MethodOptions):
    """Ignore unknown.

    Attributes:
        name: the method.
        log_form: released guards the logarithms with 1e-5; logits is exact cross-entropy.
    """

    name: str = "iu"
    log_form: LogForm = "released"


@register("iu")
class IgnoreUnknown(PointMethod):
    """Binary cross-entropy on known labels, averaged over all B x C entries."""

    Options: ClassVar[type[MethodOptions]] = IUOptions
    options: IUOptions
    point: ClassVar[PointLoss] = PointLoss("iu", iu_point, iu_point_jit)
    solvable: ClassVar[bool] = True
    examples: ClassVar[tuple[MethodOptions, ...]] = (IUOptions(), IUOptions(log_form="logits"))

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """There must be known negatives."""
        require_negatives(labels, options.name)

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Guard."""
        return (self.log_guard,)
