"""The kernels of IGNORE's two passes and of the gradient of the second."""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit


@jit(do_not_specialize=["rows", "turns"])
def _ignore_statistics_kernel(
    logits_ptr,
    masked_ptr,
    codes_ptr,
    partial_ptr,
    gap_ptr,
    count_ptr,
    rows,
    turns,
    CLASSES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over `turns` blocks of rows of one block of classes.

    Args:
        logits_ptr, masked_ptr, codes_ptr: [rows, CLASSES].
        partial_ptr: fp32 [parts, CLASSES], logits summed over the rows of each part.
        gap_ptr, count_ptr: fp32 and int32 [parts, blocks of classes], of observed positives.
    """
    part = tl.program_id(0) // tl.cdiv(CLASSES, BLOCK_C)
    block = tl.program_id(0) % tl.cdiv(CLASSES, BLOCK_C)
    cls = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    gaps = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for turn in range(0, turns):
        row = (part * turns + turn) * BLOCK_R + tl.arange(0, BLOCK_R)
        place = row.to(tl.int64)[:, None] * CLASSES + cls[None, :]
        inside = (row < rows)[:, None] & (cls < CLASSES)[None, :]
        z = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(masked_ptr + place, mask=inside, other=0.0).to(tl.float32)
        positive = tl.load(codes_ptr + place, mask=inside, other=0).to(tl.int32) == 1
        total += z
        gaps += tl.where(positive, tl.abs(z - m), 0.0)
        count += positive.to(tl.int32)
    tl.store(partial_ptr + part.to(tl.int64) * CLASSES + cls, tl.sum(total, 0), mask=cls < CLASSES)
    tl.store(gap_ptr + tl.program_id(0), tl.sum(tl.sum(gaps, 1), 0))
    tl.store(count_ptr + tl.program_id(0), tl.sum(tl.sum(count, 1), 0))


@jit(do_not_specialize=["rows", "parts", "programs"])
def _ignore_finish_kernel(
    partial_ptr, gap_ptr, count_ptr, out_ptr, rows, parts, programs, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds what the parts found, in their order: [sum of gaps, number of positives, rows, sums of the classes]."""
    cls = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = partial_ptr + cls
    for _ in range(0, parts):
        total += tl.load(place, mask=cls < CLASSES, other=0.0)
        place += CLASSES
    tl.store(out_ptr + 3 + cls, total, mask=cls < CLASSES)
    if tl.program_id(0) == 0:
        gaps = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, programs, BLOCK):
            lane = start + tl.arange(0, BLOCK)
            gaps += tl.load(gap_ptr + lane, mask=lane < programs, other=0.0)
            count += tl.load(count_ptr + lane, mask=lane < programs, other=0)
        tl.store(out_ptr, tl.sum(gaps, 0))
        tl.store(out_ptr + 1, tl.sum(count, 0))
        tl.store(out_ptr + 2, rows)


@jit
def _log_loss(z, positive, guard, GUARDED: tl.constexpr):
    """-log of the probability (plus guard) of the target of every entry: one formula for both targets."""
    signed = tl.where(positive, z, -z)
    return -tl.log(sigmoid_jit(signed)[0] + guard) if GUARDED else softplus_jit(-signed)


@jit
def _log_slope(z, positive, guard, GUARDED: tl.constexpr):
    """Derivative of `_log_loss` in z."""
    p, q = sigmoid_jit(tl.where(positive, z, -z))
    slope = p * q / (p + guard) if GUARDED else q
    return tl.where(positive, -slope, slope)


@jit
def _ignore_loss_kernel(
    logits_ptr,
    strong_ptr,
    masked_ptr,
    codes_ptr,
    truth_ptr,
    gap_ptr,
    average_ptr,
    guard,
    rejected_ptr,
    partial_ptr,
    count_ptr,
    elements,
    CLASSES: tl.constexpr,
    STRONG: tl.constexpr,
    TARGET: tl.constexpr,
    REJECT: tl.constexpr,
    AVERAGE: tl.constexpr,
    TRUTH: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rejection of one block of entries, its part of the three sums and of the counts.

    Args:
        logits_ptr, strong_ptr, masked_ptr, codes_ptr, truth_ptr: [elements]; strong, masked and truth are not touched
            without STRONG, REJECT and TRUTH.
        gap_ptr: fp32, the gap threshold; average_ptr: fp32 [CLASSES], not touched without AVERAGE.
        guard: eps of the epsilon form, used with GUARDED.
        rejected_ptr: int8 (bool) [elements].
        partial_ptr: fp32 [programs, 3]; count_ptr: int32 [programs, 3].
        TARGET: the ign term is on the strong view.
    """
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    offsets = start + lane
    inside = offsets < elements
    z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32)
    positive = code == 1
    weak = _log_loss(z, positive, guard, GUARDED)
    term = weak
    difference = tl.zeros((BLOCK,), tl.float32)
    if STRONG:
        s = tl.load(strong_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        difference = s - z
        if TARGET:
            term = _log_loss(s, positive, guard, GUARDED)
    rejected = tl.zeros((BLOCK,), tl.int1)
    if REJECT:
        m = tl.load(masked_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rejected = (code == -1) & (tl.abs(z - m) > tl.load(gap_ptr))
        if AVERAGE:
            # The remainder in 64 bits is taken once, of the block's first entry.
            cls = ((start % CLASSES).to(tl.int32) + lane) % CLASSES
            rejected = rejected & (z > tl.load(average_ptr + cls))
    tl.store(rejected_ptr + offsets, rejected.to(tl.int8), mask=inside)
    # A choice and not a product, so that an infinite loss at a dropped entry cannot turn into a NaN.
    tl.store(partial_ptr + pid * 3, tl.sum(tl.where(inside & positive, weak, 0.0), 0))
    tl.store(partial_ptr + pid * 3 + 1, tl.sum(tl.where(inside & (rejected == 0), term, 0.0), 0))
    tl.store(partial_ptr + pid * 3 + 2, tl.sum(difference * difference, 0))
    tl.store(count_ptr + pid * 3, tl.sum(rejected.to(tl.int32), 0))
    if TRUTH:
        hidden = (code == -1) & (tl.load(truth_ptr + offsets, mask=inside, other=0).to(tl.int32) == 1)
        tl.store(count_ptr + pid * 3 + 1, tl.sum((hidden & rejected).to(tl.int32), 0))
        tl.store(count_ptr + pid * 3 + 2, tl.sum(hidden.to(tl.int32), 0))
    else:
        tl.store(count_ptr + pid * 3 + 1, 0)
        tl.store(count_ptr + pid * 3 + 2, 0)


@jit
def _ignore_backward_kernel(
    upstream_ptr,
    logits_ptr,
    strong_ptr,
    codes_ptr,
    rejected_ptr,
    guard,
    d_logits_ptr,
    d_strong_ptr,
    elements,
    STRONG: tl.constexpr,
    TARGET: tl.constexpr,
    GUARDED: tl.constexpr,
    WEAK_GRAD: tl.constexpr,
    STRONG_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both gradients of one block.

    Args:
        upstream_ptr: fp32 [3], gradients of the three sums.
        d_logits_ptr, d_strong_ptr: [elements], not touched without WEAK_GRAD and STRONG_GRAD.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    spbc = tl.load(upstream_ptr)
    ign = tl.load(upstream_ptr + 1)
    reg = tl.load(upstream_ptr + 2)
    z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    positive = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == 1
    kept = tl.load(rejected_ptr + offsets, mask=inside, other=0).to(tl.int32) == 0
    shift = tl.zeros((BLOCK,), tl.float32)
    if STRONG:
        s = tl.load(strong_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        shift = 2.0 * reg * (s - z)
    if WEAK_GRAD:
        slope = _log_slope(z, positive, guard, GUARDED)
        grad = tl.where(positive, spbc * slope, 0.0) - shift
        if not TARGET:
            grad += tl.where(kept, ign * slope, 0.0)
        tl.store(d_logits_ptr + offsets, grad.to(d_logits_ptr.dtype.element_ty), mask=inside)
    if STRONG_GRAD:
        grad = shift
        if TARGET:
            grad += tl.where(kept, ign * _log_slope(s, positive, guard, GUARDED), 0.0)
        tl.store(d_strong_ptr + offsets, grad.to(d_strong_ptr.dtype.element_ty), mask=inside)
