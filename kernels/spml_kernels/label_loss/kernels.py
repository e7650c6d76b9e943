"""The kernels of label_loss, into which a method's point function is compiled."""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl


@jit
def _points(logits_ptr, codes_ptr, offsets, numbers, mask, POINT: tl.constexpr):
    """Losses and derivatives of one block. `mask` is None where the whole block is inside."""
    # Without a mask on whole blocks loads stay 128 bits wide whatever the number of entries is.
    if mask is None:
        z = tl.load(logits_ptr + offsets).to(tl.float32)
        code = tl.load(codes_ptr + offsets).to(tl.int32)
    else:
        z = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        code = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    return POINT(z, code, *numbers)


@jit
def _label_loss_kernel(
    logits_ptr,
    codes_ptr,
    partial_ptr,
    numbers,
    elements,
    POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of entries per program: its part of the loss.

    Args:
        logits_ptr, codes_ptr: [elements].
        partial_ptr: fp32 [programs].
        numbers: the point function's. (A kernel's parameter cannot be called `params`: the code that Triton makes for
            its launch has a variable of that name.)
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= elements:
        loss, _ = _points(logits_ptr, codes_ptr, offsets, numbers, None, POINT)
        total = tl.sum(loss, 0)
    else:
        loss, _ = _points(logits_ptr, codes_ptr, offsets, numbers, offsets < elements, POINT)
        total = tl.sum(tl.where(offsets < elements, loss, 0.0), 0)
    tl.store(partial_ptr + tl.program_id(0), total)


@jit
def _label_loss_backward_kernel(
    upstream_ptr,
    logits_ptr,
    codes_ptr,
    grad_ptr,
    numbers,
    elements,
    POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of entries per program: the gradient of the sum, times what comes from above.

    Args:
        upstream_ptr: fp32 [].
        logits_ptr, codes_ptr, grad_ptr: [elements].
        numbers: the point function's.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    upstream = tl.load(upstream_ptr)
    if start + BLOCK <= elements:
        _, slope = _points(logits_ptr, codes_ptr, offsets, numbers, None, POINT)
        tl.store(grad_ptr + offsets, (slope * upstream).to(grad_ptr.dtype.element_ty))
    else:
        mask = offsets < elements
        _, slope = _points(logits_ptr, codes_ptr, offsets, numbers, mask, POINT)
        tl.store(grad_ptr + offsets, (slope * upstream).to(grad_ptr.dtype.element_ty), mask=mask)
