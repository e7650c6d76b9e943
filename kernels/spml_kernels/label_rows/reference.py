"""CSR rows to dense label codes."""

from __future__ import annotations

import torch
from torch import Tensor


def label_rows_reference(
    indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int, max_row: int
) -> Tensor:
    """As `spml_kernels.label_rows`. A gather of [B, max_row] entries, so that no size has to be read on the host."""
    out = torch.full((len(index), num_classes + 1), default, dtype=torch.int8, device=index.device)
    start = indptr[index][:, None]
    count = indptr[index + 1][:, None] - start
    lane = torch.arange(max_row, device=index.device)[None]
    inside = lane < count
    entry = torch.where(inside, start + lane, 0)
    ids = classes[entry].long()
    # Lanes past a row's end, and ids that are no class, write into one spare column that is cut off.
    column = torch.where(inside & (ids >= 0) & (ids < num_classes), ids, num_classes)
    out.scatter_(1, column, codes[entry])
    return out[:, :num_classes].contiguous()
