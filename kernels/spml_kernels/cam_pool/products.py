"""Matrix products by PyTorch that are summed in fp32 and kept so, whatever their operands are."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out = left right, or with `add` out += left right.

    Args:
        left: [n, k].
        right: [k, m], of the same type.
        out: [n, m], of that type or fp32.
        add: whether to add to what `out` holds.
    """
    if left.dtype == out.dtype:
        if add:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
    elif left.device.type == "cpu":
        # PyTorch has products whose result is wider than their operands on GPUs alone.
        wide_product(left.float(), right.float(), out, add)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
