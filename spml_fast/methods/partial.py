"""Partial BCE: binary cross-entropy on the known labels only ("ignore unknown"; spec/baselines.md 2).

L = 1/(number of known entries) sum over observed positives and negatives of -log p, -log(1 - p).
The released IU of the Cole line averages over B C instead and asserts one positive and one negative a batch; here a
batch without known labels gives 0. With single positives and no negatives the loss only pulls everything up, which
`check_labels` refuses.
"""

from __future__ import annotations

import torch
from spml_kernels import PointLoss, label_loss
from torch import Tensor
from torch.nn.functional import softplus

from spml_fast import distributed
from spml_fast.batch import Batch
from spml_fast.errors import UserError
from spml_fast.labels import UNKNOWN, SparseLabels
from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, global_mean, register


def partial_point(logits: Tensor, codes: Tensor) -> Tensor:
    """Binary cross-entropy on known entries, 0 on unknown ones, element-wise."""
    return torch.where(codes == UNKNOWN, 0, softplus(logits) - logits * (codes == 1))


PARTIAL_POINT = PointLoss("partial", partial_point)


@register("partial")
class PartialBCE(Method):
    """Binary cross-entropy over known entries, averaged over their number in the global batch."""

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """There must be observed negatives."""
        if labels.default == UNKNOWN and not (labels.codes == 0).any():
            raise UserError(
                "method partial learns from known labels only, and the training split has no observed negative: "
                "everything would be predicted positive; use an or ll_r"
            )

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over the known entries of the global micro-step."""
        known = distributed.all_reduce_sum((batch.labels != UNKNOWN).sum().to(torch.float32))
        return LossOutput(global_mean(label_loss(logits, batch.labels, PARTIAL_POINT), known.clamp(min=1)), {})
