"""label_rows: the label codes of a batch from CSR arrays, on the device.

One program a row: it fills the row with the default code and writes the listed codes over it, so the dense codes are
written once and nothing but the row's own entries is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import rows_launch
from spml_kernels.common.jit import LAUNCH, jit, tl
from spml_kernels.devtools.aot import Case
from spml_kernels.label_rows.reference import label_rows_reference


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
    if use_triton(index):
        return label_rows_op(indptr, classes, codes, index, num_classes, default)
    return label_rows_reference(indptr, classes, codes, index, num_classes, default, max_row)


@jit
def _label_rows_kernel(
    indptr_ptr,
    classes_ptr,
    codes_ptr,
    index_ptr,
    out_ptr,
    num_classes,
    DEFAULT: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One row of codes.

    Args:
        indptr_ptr: int64 [N + 1]; classes_ptr: int16 or int32 [nnz]; codes_ptr: int8 [nnz]; index_ptr: int64 [B].
        out_ptr: int8 [B, num_classes].
    """
    pid = tl.program_id(0)
    sample = tl.load(index_ptr + pid)
    first = tl.load(indptr_ptr + sample)
    number = (tl.load(indptr_ptr + sample + 1) - first).to(tl.int32)
    row_ptr = out_ptr + pid.to(tl.int64) * num_classes
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + column, tl.full((BLOCK,), DEFAULT, tl.int8), mask=column < num_classes)
    # Threads of this program write over what other threads of it have just written.
    tl.debug_barrier()
    for start in range(0, number, ENTRIES):
        lane = start + tl.arange(0, ENTRIES)
        inside = lane < number
        column = tl.load(classes_ptr + first + lane, mask=inside, other=0).to(tl.int32)
        code = tl.load(codes_ptr + first + lane, mask=inside, other=0)
        tl.store(row_ptr + column, code, mask=inside)


@torch.library.custom_op("spml::label_rows", mutates_args=())
def label_rows_op(
    indptr: Tensor, classes: Tensor, codes: Tensor, index: Tensor, num_classes: int, default: int
) -> Tensor:
    """Codes int8 [B, C]."""
    index = index.contiguous()
    out = torch.empty(len(index), num_classes, dtype=torch.int8, device=index.device)
    if out.numel() == 0:
        return out
    launch = rows_launch(num_classes)
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


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernel for compiles without a GPU."""
    for classes, kind in ((20, "i16"), (80, "i16"), (5000, "i16"), (9605, "i16"), (40000, "i32")):
        launch = rows_launch(classes)
        yield Case(
            "label_rows",
            f"{classes} classes",
            _label_rows_kernel,
            {
                "indptr_ptr": "*i64",
                "classes_ptr": f"*{kind}",
                "codes_ptr": "*i8",
                "index_ptr": "*i64",
                "out_ptr": "*i8",
                "num_classes": "i32",
            },
            {"DEFAULT": -1, "BLOCK": launch.block, "ENTRIES": launch.entries},
            ("indptr_ptr", "classes_ptr", "codes_ptr", "index_ptr", "out_ptr")
            + (("num_classes",) if classes % 16 == 0 else ()),
            launch.warps,
            streamed=False,
        )
