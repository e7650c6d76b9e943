"""AN: assume that every unknown label is negative (baseline of Cole et al., CVPR 2021).

L = 1/(B C) sum [ -log p on observed positives, -log(1 - p) elsewhere ], in the with-logits form.
The released code of the Cole line writes -log(p + 1e-5); LargeLoss and BoostLU use the with-logits form, as here.
Source: docs/sources.md#cole.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.methods.base import register
from spml_fast.methods.pointwise import PointMethod


def an_point(logits: Tensor, codes: Tensor) -> Tensor:
    """Binary cross-entropy with unknown as negative, element-wise; one log p, so that nothing cancels."""
    return -logsigmoid(torch.where(codes == 1, logits, -logits))


@jit
def an_point_jit(z, code):
    """`an_point` and its derivative, for the fused kernel."""
    sign = tl.where(code == 1, -1.0, 1.0)
    return softplus_jit(sign * z), sign * sigmoid_jit(sign * z)[0]


@register("an")
class AssumeNegative(PointMethod):
    """Binary cross-entropy with every unknown label as a negative, mean over B x C."""

    point: ClassVar[PointLoss] = PointLoss("an", an_point, an_point_jit)
    solvable: ClassVar[bool] = True
