"""label_loss: one op for all point-wise losses; a method hands in its point function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spml_kernels.reference.label_loss import label_loss_reference


@dataclass(frozen=True)
class PointLoss:
    """The loss of one (logit, code) pair.

    Attributes:
        name: the method's name, for messages and benchmarks.
        reference: (logits, int8 codes, *params) -> element-wise loss of the logits' shape, in PyTorch.
    """

    name: str
    reference: Callable[..., Tensor]


def label_loss(logits: Tensor, codes: Tensor, point: PointLoss, params: tuple[float, ...] = ()) -> Tensor:
    """Sum of a point-wise loss.

    Args:
        logits: [B, C], any floating dtype.
        codes: int8 [B, C], 1 positive, 0 negative, -1 unknown.
        point: the loss of one entry.
        params: the point function's numbers.

    Returns:
        0-d sum, fp32 (fp64 for fp64 logits), differentiable in the logits. Reduction to a mean is the caller's, because
        denominators are counts over all ranks.
    """
    return label_loss_reference(logits, codes, point.reference, params)
