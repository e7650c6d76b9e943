"""label_rows: the label codes of a batch from CSR arrays, on the device."""

from __future__ import annotations

from torch import Tensor

from spml_kernels.reference.label_rows import label_rows_reference


def label_rows(
    indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int, max_row: int
) -> Tensor:
    """Dense label codes of some rows of a CSR label array.

    Args:
        indptr: int64 [N + 1].
        classes: int16 or int32 [nnz], class id of each entry.
        codes: int8 [nnz].
        index: int64 [B], rows wanted.
        num_classes: C.
        default: code of entries that are not listed.
        max_row: the largest number of entries in any row (known when the arrays are made, so nothing is read back).

    Returns:
        int8 [B, C].
    """
    return label_rows_reference(indptr, classes, codes, index, num_classes, default, max_row)
