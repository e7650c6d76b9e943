"""The kernel of label_rows: one program per row."""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl


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
        # An id that is no class would be written into another image's row, or outside of all.
        tl.store(row_ptr + column, code, mask=inside & (column >= 0) & (column < num_classes))
