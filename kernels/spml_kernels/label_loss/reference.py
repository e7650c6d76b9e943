"""Point-wise losses: the sum of a point function over all (logit, code) pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def label_loss_reference(
    logits: Tensor, codes: Tensor, point: Callable[..., Tensor], params: tuple[float, ...]
) -> Tensor:
    """As `spml_kernels.label_loss`, with the point function's reference alone."""
    values = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return point(values, codes, *params).sum()
