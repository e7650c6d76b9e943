"""The kernel of label_loss, into which a method's point function is compiled."""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl


@jit
def _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, params, mask, POINT: tl.constexpr, GRAD: tl.constexpr):
    """Loss of one block, summed; its gradient stored. `mask` is None where the whole block is inside."""
    if mask is None:
        z = tl.load(logits_ptr + offsets).to(tl.float32)
        code = tl.load(codes_ptr + offsets).to(tl.int32)
        loss, slope = POINT(z, code, *params)
    else:
        z = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        code = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
        loss, slope = POINT(z, code, *params)
        loss = tl.where(mask, loss, 0.0)
    if GRAD:
        tl.store(grad_ptr + offsets, slope.to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(loss, 0)


@jit(do_not_specialize=["elements"])
def _label_loss_kernel(
    logits_ptr,
    codes_ptr,
    grad_ptr,
    partial_ptr,
    numbers,
    elements,
    POINT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of entries per program: its part of the loss, and the gradient.

    Args:
        logits_ptr, codes_ptr, grad_ptr: [elements]; grad is not touched without GRAD.
        partial_ptr: fp32 [programs].
        numbers: the point function's. (A kernel's parameter cannot be called `params`: the code that Triton makes for
            its launch has a variable of that name.)
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # Without a mask on whole blocks loads stay 128 bits wide whatever the number of entries is.
    if start + BLOCK <= elements:
        total = _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, numbers, None, POINT, GRAD)
    else:
        total = _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, numbers, offsets < elements, POINT, GRAD)
    tl.store(partial_ptr + tl.program_id(0), total)
