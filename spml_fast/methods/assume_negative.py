"""AN: assume that every unknown label is negative (baseline of Cole et al., CVPR 2021; spec/baselines.md 2).

L = 1/(B C) sum [ -log p on observed positives, -log(1 - p) elsewhere ], in the with-logits form.
The released code of the Cole line writes -log(p + 1e-5); LargeLoss and BoostLU use the with-logits form, as here.
"""

from __future__ import annotations

import torch
from spml_kernels import PointLoss, label_loss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core.batch import Batch
from spml_fast.methods.base import LossOutput, Method, Progress, global_mean, register


def an_point(logits: Tensor, codes: Tensor) -> Tensor:
    """Binary cross-entropy with unknown as negative, element-wise; one log p, so that nothing cancels."""
    return -logsigmoid(torch.where(codes == 1, logits, -logits))


@jit
def an_point_jit(z, code):
    """`an_point` and its derivative, for the fused kernel."""
    sign = tl.where(code == 1, -1.0, 1.0)
    return softplus_jit(sign * z), sign * sigmoid_jit(sign * z)[0]


AN_POINT = PointLoss("an", an_point, an_point_jit)


@register("an")
class AssumeNegative(Method):
    """Binary cross-entropy with every unknown label as a negative."""

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over B x C."""
        total = label_loss(logits, batch.labels, AN_POINT)
        return LossOutput(global_mean(total, batch.global_size * logits.shape[1]), {})
