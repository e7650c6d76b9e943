"""ignore_loss: IGNORE's statistics (pass one), then its rejection and three loss terms (pass two).

Source: IGNORE (ECCV 2024) as in spec/ignore.md 1.2 to 1.5. Between the passes stand an all-reduce of C + 3 numbers and
the update of the thresholds; denominators are global counts, so pass two returns plain sums.

The number of entries that are kept, one of the denominators, is known only after pass two, on all ranks. So pass two
writes no gradient that would have to be read and scaled again: the backward makes both gradients from the logits, with
the exact upstream factor of every term, which it reads on the device. Each tensor is read once a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import columns_launch, flat_launch
from spml_kernels.common.jit import LAUNCH, cdiv, jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from spml_kernels.devtools.aot import Case
from spml_kernels.ignore_loss.reference import ignore_loss_reference, ignore_statistics_reference

LossForm = Literal["logits", "epsilon"]


class IgnoreTerms(NamedTuple):
    """Sums of the three loss terms over this rank's entries, and what was rejected.

    Attributes:
        spbc: over observed positives, weak view; 0-d, differentiable.
        ign: over entries that are not rejected; 0-d, differentiable.
        reg: squared difference of the two views' logits; 0-d, differentiable in both.
        rejected: bool [B, C].
        counts: int64 [3], how many entries are rejected, how many of these are positive in truth, and how many unknown
            entries are positive in truth; the last two are 0 without `truth`.
    """

    spbc: Tensor
    ign: Tensor
    reg: Tensor
    rejected: Tensor
    counts: Tensor


def ignore_statistics(logits: Tensor, masked: Tensor, codes: Tensor) -> Tensor:
    """Pass one: what the thresholds are made of, summed over this rank's rows and ready for an all-reduce.

    Args:
        logits: [B, C] of the weak view.
        masked: [B, C] of the masked view.
        codes: int8 [B, C].

    Returns:
        [C + 3], fp32 (fp64 for fp64 logits), without gradient: sum of the gap |logits - masked| over observed
        positives, number of observed positives, B, and the sum of `logits` over rows for each class.
    """
    if use_triton(logits):
        return ignore_statistics_op(logits.detach(), masked.detach(), codes)
    return ignore_statistics_reference(logits, masked, codes)


def ignore_loss(
    logits: Tensor,
    strong: Tensor | None,
    masked: Tensor | None,
    codes: Tensor,
    gap_threshold: Tensor,
    average_threshold: Tensor | None,
    form: LossForm = "logits",
    eps: float = 1e-5,
    strong_target: bool = True,
    truth: Tensor | None = None,
) -> IgnoreTerms:
    """Pass two: rejection with strict inequalities, and the loss terms with gradients to `logits` and `strong`.

    An entry is rejected iff its code is -1, its gap |logits - masked| is greater than `gap_threshold` and its logit is
    greater than its class's `average_threshold`.

    Args:
        logits: [B, C] of the weak view.
        strong: [B, C] of the strong view; None drops the reg term and takes the ign term on the weak view.
        masked: [B, C] of the masked view, a constant; None rejects nothing.
        codes: int8 [B, C]; 1 positive, everything else is trained as negative unless rejected.
        gap_threshold: 0-d.
        average_threshold: [C]; None drops that condition.
        form: `logits` is exact binary cross-entropy; `epsilon` is -log(p + eps), as the released code.
        eps: of the epsilon form.
        strong_target: take the ign term on the strong view (else on the weak one).
        truth: int8 [B, C], known labels for the counts alone.

    Raises:
        ValueError: an unknown `form`.
    """
    if form not in ("logits", "epsilon"):
        raise ValueError(f"unknown loss form {form!r}")
    if use_triton(logits):
        # -log(p + 0) is what the logits give exactly.
        guard = float(eps) if form == "epsilon" else 0.0
        masked = None if masked is None else masked.detach()
        thresholds = (gap_threshold, average_threshold)
        sums, rejected, counts = ignore_loss_op(
            logits, strong, masked, codes, *thresholds, truth, guard, strong_target and strong is not None
        )
        spbc, ign, reg = sums.unbind()
        return IgnoreTerms(spbc, ign, reg, rejected, counts)
    spbc, ign, reg, rejected = ignore_loss_reference(
        logits, strong, masked, codes, gap_threshold, average_threshold, form, eps, strong_target
    )
    hidden = torch.zeros_like(rejected) if truth is None else (codes == -1) & (truth == 1)
    counts = torch.stack([rejected.sum(), (rejected & hidden).sum(), hidden.sum()])
    return IgnoreTerms(spbc, ign, reg, rejected, counts)


@jit
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


@jit
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


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, contiguous, or where there is none one that the kernel does not touch."""
    return other if tensor is None else tensor.contiguous()


@torch.library.custom_op("spml::ignore_statistics", mutates_args=())
def ignore_statistics_op(logits: Tensor, masked: Tensor, codes: Tensor) -> Tensor:
    """See `ignore_statistics`."""
    logits, masked, codes = logits.contiguous(), masked.contiguous(), codes.contiguous()
    rows, classes = logits.shape
    make: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    if logits.numel() == 0:
        out = torch.zeros(classes + 3, **make)
        out[2] = rows
        return out
    launch = columns_launch(rows, classes)
    across = cdiv(classes, launch.classes)
    parts = cdiv(rows, launch.rows * launch.turns)
    out = torch.empty(classes + 3, **make)
    partial, gaps = torch.empty(parts, classes, **make), torch.empty(parts, across, **make)
    count = torch.empty(parts, across, dtype=torch.int32, device=logits.device)
    _ignore_statistics_kernel[(parts * across,)](
        logits,
        masked,
        codes,
        partial,
        gaps,
        count,
        rows,
        launch.turns,
        CLASSES=classes,
        BLOCK_R=launch.rows,
        BLOCK_C=launch.classes,
        num_warps=launch.warps,
        **LAUNCH,
    )
    _ignore_finish_kernel[(cdiv(classes, FINISH),)](
        partial, gaps, count, out, rows, parts, parts * across, CLASSES=classes, BLOCK=FINISH, num_warps=4, **LAUNCH
    )
    return out


# Classes of one program that adds parts up.
FINISH = 256


@ignore_statistics_op.register_fake
def _(logits: Tensor, masked: Tensor, codes: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1] + 3, dtype=torch.float32)


@torch.library.custom_op("spml::ignore_loss", mutates_args=())
def ignore_loss_op(
    logits: Tensor,
    strong: Tensor | None,
    masked: Tensor | None,
    codes: Tensor,
    gap_threshold: Tensor,
    average_threshold: Tensor | None,
    truth: Tensor | None,
    guard: float,
    strong_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums fp32 [3] of spbc, ign and reg, rejected bool [B, C], counts int64 [3]. `guard` 0 is the exact form."""
    logits, codes = logits.contiguous(), codes.contiguous()
    rejected = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    elements = logits.numel()
    if elements == 0:
        device = logits.device
        return torch.zeros(3, device=device), rejected, torch.zeros(3, dtype=torch.int64, device=device)
    launch = flat_launch(elements)
    partial = torch.empty(launch.programs, 3, dtype=torch.float32, device=logits.device)
    count = torch.empty(launch.programs, 3, dtype=torch.int32, device=logits.device)
    _ignore_loss_kernel[(launch.programs,)](
        logits,
        _or(strong, logits),
        _or(masked, logits),
        codes,
        _or(truth, codes),
        gap_threshold.float(),
        _or(average_threshold, gap_threshold).float(),
        guard,
        rejected.view(torch.int8),
        partial,
        count,
        elements,
        CLASSES=logits.shape[1],
        STRONG=strong is not None,
        TARGET=strong_target,
        REJECT=masked is not None,
        AVERAGE=average_threshold is not None,
        TRUTH=truth is not None,
        GUARDED=guard > 0,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return partial.sum(0), rejected, count.sum(0)


@ignore_loss_op.register_fake
def _(
    logits: Tensor,
    strong: Tensor | None,
    masked: Tensor | None,
    codes: Tensor,
    gap_threshold: Tensor,
    average_threshold: Tensor | None,
    truth: Tensor | None,
    guard: float,
    strong_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rejected = logits.new_empty(logits.shape, dtype=torch.bool)
    return logits.new_empty(3, dtype=torch.float32), rejected, logits.new_empty(3, dtype=torch.int64)


@torch.library.custom_op("spml::ignore_loss_backward", mutates_args=())
def ignore_loss_backward_op(
    upstream: Tensor,
    logits: Tensor,
    strong: Tensor | None,
    codes: Tensor,
    rejected: Tensor,
    guard: float,
    strong_target: bool,
    want_weak: bool,
    want_strong: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weak and the strong logits; empty where unwanted."""
    logits, codes, rejected = logits.contiguous(), codes.contiguous(), rejected.contiguous()
    view = _or(strong, logits)
    d_logits = torch.empty_like(logits) if want_weak else logits.new_empty(0)
    d_strong = torch.empty_like(view) if want_strong else logits.new_empty(0)
    elements = logits.numel()
    if elements == 0:
        return d_logits, d_strong
    launch = flat_launch(elements)
    _ignore_backward_kernel[(launch.programs,)](
        upstream.float().contiguous(),
        logits,
        view,
        codes,
        rejected.view(torch.int8),
        guard,
        d_logits,
        d_strong,
        elements,
        STRONG=strong is not None,
        TARGET=strong_target,
        GUARDED=guard > 0,
        WEAK_GRAD=want_weak,
        STRONG_GRAD=want_strong,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return d_logits, d_strong


@ignore_loss_backward_op.register_fake
def _(
    upstream: Tensor,
    logits: Tensor,
    strong: Tensor | None,
    codes: Tensor,
    rejected: Tensor,
    guard: float,
    strong_target: bool,
    want_weak: bool,
    want_strong: bool,
) -> tuple[Tensor, Tensor]:
    view = logits if strong is None else strong
    d_logits = logits.new_empty(logits.shape if want_weak else 0)
    return d_logits, view.new_empty(view.shape) if want_strong else logits.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, strong, _, codes, _, _, _, ctx.guard, ctx.strong_target = inputs
    ctx.mark_non_differentiable(*output[1:])
    # Else zeros of the rejection's size would be written for a gradient that nobody reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, strong, codes, output[1])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    logits, strong, codes, rejected = ctx.saved_tensors
    weak_wanted, strong_wanted = ctx.needs_input_grad[:2]
    d_logits, d_strong = ignore_loss_backward_op(
        upstream, logits, strong, codes, rejected, ctx.guard, ctx.strong_target, weak_wanted, strong_wanted
    )
    return d_logits if weak_wanted else None, d_strong if strong_wanted else None, *[None] * 7


ignore_loss_op.register_autograd(_backward, setup_context=_setup)


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for rows, classes in ((16, 80), (128, 81), (128, 5000)):
        for dtype in ("fp32", "bf16"):
            elements, shape = rows * classes, f"{dtype} {rows} x {classes}"
            flat, columns = flat_launch(elements), columns_launch(rows, classes)
            data = f"*{dtype}"
            views: dict[str, str | tuple[str, ...]] = {"logits_ptr": data, "strong_ptr": data}
            yield Case(
                "ignore_statistics",
                shape,
                _ignore_statistics_kernel,
                {
                    "logits_ptr": data,
                    "masked_ptr": data,
                    "codes_ptr": "*i8",
                    "partial_ptr": "*fp32",
                    "gap_ptr": "*fp32",
                    "count_ptr": "*i32",
                    "rows": "i32",
                    "turns": "i32",
                },
                {"CLASSES": classes, "BLOCK_R": columns.rows, "BLOCK_C": columns.classes},
                ("logits_ptr", "masked_ptr", "codes_ptr", "partial_ptr", "gap_ptr", "count_ptr", "rows"),
                columns.warps,
                # Rows of an odd number of classes begin at odd addresses.
                streamed=classes % 8 == 0,
            )
            yield Case(
                "ignore_statistics end",
                shape,
                _ignore_finish_kernel,
                {
                    "partial_ptr": "*fp32",
                    "gap_ptr": "*fp32",
                    "count_ptr": "*i32",
                    "out_ptr": "*fp32",
                    "rows": "i32",
                    "parts": "i32",
                    "programs": "i32",
                },
                {"CLASSES": classes, "BLOCK": FINISH},
                ("partial_ptr", "gap_ptr", "count_ptr", "out_ptr", "rows"),
                streamed=False,
            )
            for form in ("logits", "epsilon"):
                flags = {"STRONG": True, "TARGET": True, "GUARDED": form == "epsilon", "BLOCK": flat.block}
                yield Case(
                    "ignore_loss",
                    f"{shape} {form}",
                    _ignore_loss_kernel,
                    {
                        **views,
                        "masked_ptr": data,
                        "codes_ptr": "*i8",
                        "truth_ptr": "*i8",
                        "gap_ptr": "*fp32",
                        "average_ptr": "*fp32",
                        "guard": "fp32",
                        "rejected_ptr": "*i8",
                        "partial_ptr": "*fp32",
                        "count_ptr": "*i32",
                        "elements": "i32",
                    },
                    {"CLASSES": classes, "REJECT": True, "AVERAGE": True, "TRUTH": True, **flags},
                    (*views, "masked_ptr", "codes_ptr", "truth_ptr", "average_ptr", "rejected_ptr", "elements"),
                    flat.warps,
                )
                yield Case(
                    "ignore_loss backward",
                    f"{shape} {form}",
                    _ignore_backward_kernel,
                    {
                        "upstream_ptr": "*fp32",
                        **views,
                        "codes_ptr": "*i8",
                        "rejected_ptr": "*i8",
                        "guard": "fp32",
                        "d_logits_ptr": data,
                        "d_strong_ptr": data,
                        "elements": "i32",
                    },
                    {"WEAK_GRAD": True, "STRONG_GRAD": True, **flags},
                    (*views, "codes_ptr", "rejected_ptr", "d_logits_ptr", "d_strong_ptr", "elements"),
                    flat.warps,
                )
