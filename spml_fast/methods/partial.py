"""Partial BCE: binary cross-entropy on the known labels only ("ignore unknown").

L = 1/(number of known entries) sum over observed positives and negatives of -log p, -log(1 - p).
The released IU of the Cole line averages over B C instead and asserts one positive and one negative a batch; here a
batch without known labels gives 0. With single positives and no negatives the loss only pulls everything up, which
`check_labels` refuses. Source: docs/sources.md#cole.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import UNKNOWN, SparseLabels
from spml_fast.methods.base import MethodOptions, Progress, global_mean, register
from spml_fast.methods.pointwise import PointMethod


def partial_point(logits: Tensor, codes: Tensor) -> Tensor:
    """Binary cross-entropy on known entries, 0 on unknown ones, element-wise."""
    return torch.where(codes == UNKNOWN, 0, -logsigmoid(torch.where(codes == 1, logits, -logits)))


@jit
def partial_point_jit(z, code):
    """`partial_point` and its derivative, for the fused kernel."""
    sign = tl.where(code == 1, -1.0, 1.0)
    known = code != -1
    return tl.where(known, softplus_jit(sign * z), 0.0), tl.where(known, sign * sigmoid_jit(sign * z)[0], 0.0)


def count_known(batches: list[Batch]) -> Tensor:
    """Known entries over all ranks, at least 1, fp32 0-d."""
    own = torch.stack([(b.labels != UNKNOWN).sum() for b in batches]).sum()
    return distributed.all_reduce_sum(own.to(torch.float32)).clamp(min=1)


@register("partial")
class PartialBCE(PointMethod):
    """Binary cross-entropy over known entries, averaged over their number in the global batch."""

    batch_statistics: ClassVar[bool] = True
    point: ClassVar[PointLoss] = PointLoss("partial", partial_point, partial_point_jit)
    solvable: ClassVar[bool] = True

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """There must be observed negatives."""
        if labels.default == UNKNOWN and not (labels.codes == 0).any():
            raise UserError(
                "method partial learns from known labels only, and the training split has no observed negative: "
                "everything would be predicted positive; use an or ll_r"
            )

    def update_statistics(self, forwards: list[Tensor], batches: list[Batch], progress: Progress) -> list[Tensor]:
        """Known entries of the whole update, times each micro-step's fraction of its images."""
        known = count_known(batches)
        images = sum(b.global_size for b in batches)
        return [known * (b.global_size / images) for b in batches]

    def reduce(self, total: Tensor, batch: Batch) -> Tensor:
        """The mean over the known entries of the global micro-step."""
        known: Tensor | None = self.statistics_of(batch)
        return global_mean(total, count_known([batch]) if known is None else known)
