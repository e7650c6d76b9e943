"""label_rows: the label codes of a batch from CSR arrays, on the device.

One program per row: it fills the row with the default code and writes the listed codes over it, so the dense codes are
written once and nothing but the row's own entries is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import label_rows_launch
from spml_kernels.common.jit import LAUNCH
from spml_kernels.common.ops import define
from spml_kernels.label_rows.kernels import _label_rows_kernel
from spml_kernels.label_rows.reference import label_rows_reference


def label_rows(
    indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int, max_row: int
) -> Tensor:
    """Dense label codes of some rows of a CSR label array.

    Args:
        indptr: int64 [N + 1].
        classes: int16 or int32 [nnz], class id of each entry; what is not within 0..C-1 is left out.
        codes: int8 [nnz].
        index: int64 [B], rows wanted.
        num_classes: C.
        default: code of entries that are not listed.
        max_row: the largest number of entries in any row (known when the arrays are made, so nothing is read back).

    Returns:
        int8 [B, C].
    """
    if use_triton(index):
        return label_rows_op(indptr, classes, codes, index, num_classes, default)
    return label_rows_reference(indptr, classes, codes, index, num_classes, default, max_row)


@define("spml::label_rows")
def label_rows_op(
    indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int
) -> Tensor:
    """Codes int8 [B, C]."""
    index = index.contiguous()
    out = torch.empty(len(index), num_classes, dtype=torch.int8, device=index.device)
    if out.numel() == 0:
        return out
    launch = label_rows_launch(num_classes)
    _label_rows_kernel[(len(index),)](
        indptr,
        classes,
        codes,
        index,
        out,
        num_classes,
        DEFAULT=default,
        BLOCK=launch.block,
        ENTRIES=launch.entries,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return out


@label_rows_op.register_fake
def _(indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int) -> Tensor:
    return index.new_empty((len(index), num_classes), dtype=torch.int8)
