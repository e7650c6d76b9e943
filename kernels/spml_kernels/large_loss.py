"""large_loss: the k largest unobserved logits of a batch, exact over ranks, and the loss that rejects or corrects them.

Source: Large Loss Matters (CVPR 2022) as in spec/boostlu_large_loss.md 1.4.

The kernels find the k-th largest logit without sorting and without the host. Order-preserving 32-bit keys are counted
by their top 11 bits; the bin in which the k-th lies is known, only its entries are counted by the next 11 bits, then by
the last 10. The three histograms (8 kB each) are summed over ranks, so the threshold is exact over ranks. Each pass
finds the bin of the pass before in its first instructions; one more pass counts entries above and at the threshold per
block, which gives every entry its place in the order of positions, and the last pass writes selection, loss, gradient
and the list of selected entries together. That is `large_loss_step`; where the selection must be known before its loss
can be (one threshold for several micro-steps), `select_large`, `large_loss` and `list_selected` do the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spml_kernels.aot import Case
from spml_kernels.dispatch import use_triton
from spml_kernels.heuristics import flat_launch, histogram_launch
from spml_kernels.jit import LAUNCH, cdiv, jit, tl
from spml_kernels.label_loss import PointLoss, label_loss, scale_gradient
from spml_kernels.math import sigmoid_jit, softplus_jit
from spml_kernels.reference.large_loss import (
    large_loss_reference,
    list_selected_reference,
    select_large_reference,
    unpack_entries,
)

Ties = Literal["exact", "inclusive"]
Scheme = Literal["reject", "correct"]

# Bins of one pass; keys have 32 bits: 11, 11 and 10 of them.
BINS = 2048
LEVELS = 3
# Words of the state that a pass hands on: bits of the key so far, how many are still to be found, mode.
STATE = 3


def _alone(tensor: Tensor) -> Tensor:
    return tensor[None]


def select_large(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    ties: Ties = "exact",
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Select the k largest logits among the unobserved entries of a batch that is spread over ranks.

    Args:
        logits: [B, C] of this rank.
        codes: int8 [B, C]; only entries with code -1 can be selected.
        k: 0-d int64 tensor, how many over all ranks; 0 selects nothing.
        k_max: host-side upper bound of k, so that no size is read back from the device.
        ties: `exact` selects exactly k (or all candidates if fewer), of entries equal to the threshold the first by
            position; `inclusive` selects every entry that is at least the threshold, as the released code.
        gather: stacks equal-shaped tensors of all ranks to [world, ...]; None for one rank.
        rank: this rank's place in that stack. Rank order is position order: ranks hold consecutive slices.

    Returns:
        bool [B, C] selection and the 0-d threshold.
    """
    if use_triton(logits):
        counts, threshold, room = _find_threshold(logits.detach(), codes, k, k_max, gather, rank)
        flags = (ties == "inclusive", False, False, False, 0)
        return large_select_op(logits.detach(), codes, counts, threshold, room, *flags)[1], threshold
    return select_large_reference(logits, codes, k, k_max, ties, gather or _alone, rank if gather else 0)


def large_loss(logits: Tensor, codes: Tensor, selected: Tensor, scheme: Scheme) -> Tensor:
    """Sum of binary cross-entropy with unknown entries as negatives, changed on the selection.

    Args:
        logits: [B, C].
        codes: int8 [B, C].
        selected: bool [B, C] from `select_large`.
        scheme: `reject` drops the loss of selected entries, `correct` gives them the target 1.

    Returns:
        0-d sum, fp32 (fp64 for fp64 logits), differentiable in the logits. The published loss divides by B * C,
        rejected entries included.
    """
    if use_triton(logits):
        return label_loss(logits, torch.where(selected, 1 if scheme == "correct" else LEFT_OUT, codes), _KEPT)
    return large_loss_reference(logits, codes, selected, scheme)


class LargeLossStep(NamedTuple):
    """Selection and loss of one step.

    Attributes:
        loss: as `large_loss`.
        selected: bool [B, C].
        threshold: 0-d.
        rows, classes: int64 [length], the selected entries by position.
        valid: bool [length], which of them are there.
    """

    loss: Tensor
    selected: Tensor
    threshold: Tensor
    rows: Tensor
    classes: Tensor
    valid: Tensor


def large_loss_step(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    scheme: Scheme,
    ties: Ties = "exact",
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    length: int | None = None,
) -> LargeLossStep:
    """`select_large`, `large_loss` and `list_selected` together; kernels do all three in the selection's last pass.

    Args:
        logits, codes, k, k_max, ties, gather, rank: as for `select_large`.
        scheme: as for `large_loss`.
        length: of the list, at most B * C; None takes k_max, which inclusive ties may pass. 0 makes no list.
    """
    length = min(k_max if length is None else length, logits.numel())
    if use_triton(logits):
        wanted = logits.requires_grad and torch.is_grad_enabled()
        counts, threshold, room = _find_threshold(logits, codes, k, k_max, gather, rank)
        flags = (ties == "inclusive", True, scheme == "correct", wanted, length)
        loss, selected, _, entry = large_select_op(logits, codes, counts, threshold, room, *flags)
        return LargeLossStep(loss, selected, threshold, *unpack_entries(entry, logits.shape[1]))
    selected, threshold = select_large(logits, codes, k, k_max, ties, gather, rank)
    listed = list_selected(selected, length)
    return LargeLossStep(large_loss(logits, codes, selected, scheme), selected, threshold, *listed)


def list_selected(selected: Tensor, k_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """The selection as a list of fixed length, without reading a size back from the device.

    Args:
        selected: bool [B, C] with at most `k_max` entries set (further ones are cut off).
        k_max: length wanted; shorter when B * C is.

    Returns:
        int64 rows, int64 classes and bool `valid`, each [min(k_max, B * C)].
    """
    return list_selected_reference(selected, k_max)


def _find_threshold(
    logits: Tensor, codes: Tensor, k: Tensor, k_max: int, gather: Callable[[Tensor], Tensor] | None, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries above and at the threshold by block, the threshold, and how many at the threshold this rank may take."""
    logits = logits.detach()
    # The first pass reads neither of the two; any tensors do.
    hist, state = k, k
    for level in range(LEVELS):
        hist, state = large_histogram_op(logits, codes, k, hist, state, k_max, level)
        if gather is not None:
            hist = gather(hist).sum(0)
    counts, threshold, room = large_threshold_op(logits, codes, hist, state)
    if gather is not None:
        # Entries at the threshold are taken rank after rank.
        room = room - gather(counts[1].sum())[:rank].sum()
    return counts, threshold, room


@jit
def order_key_jit(z):
    """int32 that orders as the logits do; both zeros have one key."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _advance(hist_ptr, state_ptr, k_ptr, k_max, LEVEL: tl.constexpr, BINS: tl.constexpr):
    """The state after pass LEVEL - 1: the bin that holds the k-th largest is found and its bits are appended.

    Returns:
        The key's bits so far, how many entries are to be taken from that bin, and the mode: 0 ordinary, 1 for k = 0,
        2 for fewer candidates than k.
    """
    counts = tl.load(hist_ptr + tl.arange(0, BINS)).to(tl.int32)
    if LEVEL == 1:
        bits = 0
        left = tl.minimum(tl.load(k_ptr), k_max).to(tl.int32)
    else:
        bits = tl.load(state_ptr)
        left = tl.load(state_ptr + 1)
    total = tl.sum(counts, 0)
    # Entries in this bin and all higher ones: falls with the bin, so the bins that reach `left` are the lowest ones.
    reach = total - tl.cumsum(counts, 0) + counts
    enough = reach >= left
    digit = tl.sum(enough.to(tl.int32), 0) - 1
    taken = tl.max(tl.where(enough, 0, reach), 0)
    if LEVEL == 1:
        mode = tl.where(left <= 0, 1, tl.where(total < left, 2, 0))
        bits = digit
    else:
        mode = tl.load(state_ptr + 2)
        bits = (bits << (11 if LEVEL == 2 else 10)) | digit
    return bits, left - taken, mode


@jit
def _large_histogram_kernel(
    logits_ptr,
    codes_ptr,
    k_ptr,
    hist_ptr,
    state_ptr,
    out_ptr,
    next_ptr,
    elements,
    rounds,
    k_max,
    LEVEL: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count candidates that agree with the key so far by the next bits of their key.

    Args:
        logits_ptr, codes_ptr: [elements].
        k_ptr: int64, read by pass 1.
        hist_ptr: counts of the pass before, summed over ranks; state_ptr: its state (from pass 2 on).
        out_ptr: int32 [BINS], zero.
        next_ptr: int32 [3], the state that belongs to these counts (from pass 1 on).
    """
    pid = tl.program_id(0)
    bits = 0
    if LEVEL > 0:
        bits, left, mode = _advance(hist_ptr, state_ptr, k_ptr, k_max, LEVEL, BINS)
        if pid == 0:
            tl.store(next_ptr, bits)
            tl.store(next_ptr + 1, left)
            tl.store(next_ptr + 2, mode)
    found = tl.zeros((BINS,), tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for turn in range(0, rounds):
        offsets = pid.to(tl.int64) * BLOCK + turn * stride + tl.arange(0, BLOCK)
        inside = offsets < elements
        z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        wanted = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == -1
        key = order_key_jit(z)
        if LEVEL == 0:
            digit = (key >> 21) + 1024
        elif LEVEL == 1:
            digit = (key >> 10) & 2047
            wanted = wanted & ((key >> 21) + 1024 == bits)
        else:
            digit = key & 1023
            wanted = wanted & ((key >> 10) + 2097152 == bits)
        found += tl.histogram(digit, BINS, mask=wanted)
    # Sums of integers are the same in every order.
    tl.atomic_add(out_ptr + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@jit
def _large_threshold_kernel(
    logits_ptr,
    codes_ptr,
    hist_ptr,
    state_ptr,
    counts_ptr,
    threshold_ptr,
    room_ptr,
    elements,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold from the last counts, and by block how many candidates are above and at it.

    Args:
        counts_ptr: int32 [2, programs].
        threshold_ptr: fp32; infinity for k = 0, minus infinity where all candidates are taken.
        room_ptr: int64, how many entries at the threshold are to be taken over all ranks.
    """
    pid = tl.program_id(0)
    bits, left, mode = _advance(hist_ptr, state_ptr, hist_ptr, 0, 3, BINS)
    key = bits ^ -2147483648
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(mode == 1, float("inf"), tl.where(mode == 2, float("-inf"), value))
    room = tl.where(mode == 1, 0, tl.where(mode == 2, 2147483647, left))
    if pid == 0:
        tl.store(threshold_ptr, value)
        tl.store(room_ptr, room.to(tl.int64))
    offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    candidate = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == -1
    tl.store(counts_ptr + pid, tl.sum((candidate & (z > value)).to(tl.int32), 0))
    tl.store(counts_ptr + tl.num_programs(0) + pid, tl.sum((candidate & (z == value)).to(tl.int32), 0))


@jit
def _sum_before(counts_ptr, number, CHUNK: tl.constexpr):
    """Sum of the first `number` int32 counts."""
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, number, CHUNK):
        lane = start + tl.arange(0, CHUNK)
        total += tl.load(counts_ptr + lane, mask=lane < number, other=0)
    return tl.sum(total, 0)


@jit
def _large_entry_jit(z, code, selected, CORRECT: tl.constexpr):
    """Loss and derivative of an entry."""
    positive = code == 1
    if CORRECT:
        positive = positive | selected
    sign = tl.where(positive, -1.0, 1.0)
    loss = softplus_jit(sign * z)
    slope = sign * sigmoid_jit(sign * z)[0]
    if not CORRECT:
        loss = tl.where(selected, 0.0, loss)
        slope = tl.where(selected, 0.0, slope)
    return loss, slope


@jit
def _large_select_kernel(
    logits_ptr,
    codes_ptr,
    counts_ptr,
    threshold_ptr,
    room_ptr,
    selected_ptr,
    grad_ptr,
    partial_ptr,
    entry_ptr,
    elements,
    length,
    INCLUSIVE: tl.constexpr,
    LOSS: tl.constexpr,
    CORRECT: tl.constexpr,
    GRAD: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Selection of one block; with LOSS its part of the loss and the gradient; with LIST its entries of the list.

    Args:
        counts_ptr, threshold_ptr, room_ptr: from `_large_threshold_kernel`.
        selected_ptr: int8 (bool) [elements]; grad_ptr: [elements]; partial_ptr: fp32 [programs].
        entry_ptr: int64 [length], flat positions of selected entries in order.
    """
    pid = tl.program_id(0)
    value = tl.load(threshold_ptr)
    room = tl.load(room_ptr)
    offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32)
    above = (code == -1) & (z > value)
    tied = (code == -1) & (z == value)
    tied_before = 0
    if not INCLUSIVE or LIST:
        tied_before = _sum_before(counts_ptr + tl.num_programs(0), pid, 1024)
    if not INCLUSIVE:
        tied = tied & (tied_before + tl.cumsum(tied.to(tl.int32), 0) <= room)
    selected = above | tied
    tl.store(selected_ptr + offsets, selected.to(tl.int8), mask=inside)
    if LIST:
        before = _sum_before(counts_ptr, pid, 1024)
        if INCLUSIVE:
            before += tied_before
        else:
            before += tl.maximum(tl.minimum(room, tied_before), 0).to(tl.int32)
        place = before + tl.cumsum(selected.to(tl.int32), 0) - 1
        tl.store(entry_ptr + place, offsets, mask=selected & (place < length))
    if LOSS:
        loss, slope = _large_entry_jit(z, code, selected, CORRECT)
        tl.store(partial_ptr + pid, tl.sum(tl.where(inside, loss, 0.0), 0))
        if GRAD:
            tl.store(grad_ptr + offsets, slope.to(grad_ptr.dtype.element_ty), mask=inside)


# The code of a rejected entry, whose loss is 0.
LEFT_OUT = 2


@jit
def _kept_point_jit(z, code):
    """Cross-entropy with unknown as negative, of entries that are not left out."""
    return _large_entry_jit(z, code, code == 2, False)


def _kept_point(logits: Tensor, codes: Tensor) -> Tensor:
    return torch.where(codes == LEFT_OUT, 0, -torch.nn.functional.logsigmoid(torch.where(codes == 1, logits, -logits)))


_KEPT = PointLoss("large_loss", _kept_point, _kept_point_jit)


@torch.library.custom_op("spml::large_histogram", mutates_args=())
def large_histogram_op(
    logits: Tensor, codes: Tensor, k: Tensor, hist: Tensor, state: Tensor, k_max: int, level: int
) -> tuple[Tensor, Tensor]:
    """Counts int32 [2048] of pass `level` from counts and state of the pass before, and their state int32 [3]."""
    logits, codes = logits.contiguous(), codes.contiguous()
    out = torch.zeros(BINS, dtype=torch.int32, device=logits.device)
    # Pass 0 has no state, and pass 1 reads none.
    following = torch.empty(STATE, dtype=torch.int32, device=logits.device)
    launch = histogram_launch(logits.numel())
    _large_histogram_kernel[(launch.programs,)](
        logits,
        codes,
        k,
        hist,
        state,
        out,
        following,
        logits.numel(),
        cdiv(logits.numel(), launch.programs * launch.block),
        k_max,
        LEVEL=level,
        BINS=BINS,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return out, following


@large_histogram_op.register_fake
def _(
    logits: Tensor, codes: Tensor, k: Tensor, hist: Tensor, state: Tensor, k_max: int, level: int
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(BINS, dtype=torch.int32), logits.new_empty(STATE, dtype=torch.int32)


@torch.library.custom_op("spml::large_threshold", mutates_args=())
def large_threshold_op(logits: Tensor, codes: Tensor, hist: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int32 [2, blocks] above and at the threshold, the threshold fp32 [], room at the threshold int64 []."""
    logits, codes = logits.contiguous(), codes.contiguous()
    # One program at least, since the threshold is wanted of an empty batch too.
    launch = flat_launch(max(logits.numel(), 1))
    counts = torch.empty(2, launch.programs, dtype=torch.int32, device=logits.device)
    threshold = torch.empty((), dtype=torch.float32, device=logits.device)
    room = torch.empty((), dtype=torch.int64, device=logits.device)
    _large_threshold_kernel[(launch.programs,)](
        logits,
        codes,
        hist,
        state,
        counts,
        threshold,
        room,
        logits.numel(),
        BINS=BINS,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return counts, threshold, room


@large_threshold_op.register_fake
def _(logits: Tensor, codes: Tensor, hist: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = logits.new_empty((2, flat_launch(max(logits.numel(), 1)).programs), dtype=torch.int32)
    return counts, logits.new_empty((), dtype=torch.float32), logits.new_empty((), dtype=torch.int64)


@torch.library.custom_op("spml::large_select", mutates_args=())
def large_select_op(
    logits: Tensor,
    codes: Tensor,
    counts: Tensor,
    threshold: Tensor,
    room: Tensor,
    inclusive: bool,
    loss: bool,
    correct: bool,
    gradient: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """0-d loss (0 without `loss`), selection bool [B, C], gradient (or empty), list int64 [length] padded with -1."""
    logits, codes = logits.contiguous(), codes.contiguous()
    elements, launch = logits.numel(), flat_launch(max(logits.numel(), 1))
    gradient = gradient and loss
    selected = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    grad = torch.empty_like(logits) if gradient else logits.new_empty(0)
    partial = torch.empty(launch.programs if loss else 0, dtype=torch.float32, device=logits.device)
    entry = torch.full((length,), -1, dtype=torch.int64, device=logits.device)
    _large_select_kernel[(launch.programs,)](
        logits,
        codes,
        counts,
        threshold,
        room,
        selected.view(torch.int8),
        grad,
        partial,
        entry,
        elements,
        length,
        INCLUSIVE=inclusive,
        LOSS=loss,
        CORRECT=correct,
        GRAD=gradient,
        LIST=length > 0,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return partial.sum(), selected, grad, entry


@large_select_op.register_fake
def _(
    logits: Tensor,
    codes: Tensor,
    counts: Tensor,
    threshold: Tensor,
    room: Tensor,
    inclusive: bool,
    loss: bool,
    correct: bool,
    gradient: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient and loss else logits.new_empty(0)
    selected = logits.new_empty(logits.shape, dtype=torch.bool)
    return logits.new_empty((), dtype=torch.float32), selected, grad, logits.new_empty(length, dtype=torch.int64)


def _setup_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, selected, grad, entry = output
    ctx.mark_non_differentiable(selected, grad, entry)
    # Else zeros of their sizes would be written for gradients that nobody reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)


def _backward_select(ctx: Any, upstream: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return (scale_gradient(ctx.saved_tensors[0], upstream), *[None] * 9)


large_select_op.register_autograd(_backward_select, setup_context=_setup_select)


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for rows, classes in ((16, 80), (128, 5000)):
        for dtype in ("fp32", "bf16"):
            elements, shape = rows * classes, f"{dtype} {rows} x {classes}"
            flat, histogram = flat_launch(elements), histogram_launch(elements)
            pointers: dict[str, str | tuple[str, ...]] = {"logits_ptr": f"*{dtype}", "codes_ptr": "*i8"}
            state: dict[str, str | tuple[str, ...]] = {"hist_ptr": "*i32", "state_ptr": "*i32"}
            for level in range(LEVELS):
                yield Case(
                    "large_histogram",
                    f"{shape} pass {level}",
                    _large_histogram_kernel,
                    {
                        **pointers,
                        "k_ptr": "*i64",
                        **state,
                        "out_ptr": "*i32",
                        "next_ptr": "*i32",
                        "elements": "i32",
                        "rounds": "i32",
                        "k_max": "i32",
                    },
                    {"LEVEL": level, "BINS": BINS, "BLOCK": histogram.block},
                    ("logits_ptr", "codes_ptr", "hist_ptr", "out_ptr", "elements"),
                    histogram.warps,
                )
            found: dict[str, str | tuple[str, ...]] = {
                "counts_ptr": "*i32",
                "threshold_ptr": "*fp32",
                "room_ptr": "*i64",
            }
            yield Case(
                "large_threshold",
                shape,
                _large_threshold_kernel,
                {**pointers, **state, **found, "elements": "i32"},
                {"BINS": BINS, "BLOCK": flat.block},
                ("logits_ptr", "codes_ptr", "hist_ptr", "counts_ptr", "elements"),
                flat.warps,
            )
            yield Case(
                "large_select",
                f"{shape} with loss and list",
                _large_select_kernel,
                {
                    **pointers,
                    **found,
                    "selected_ptr": "*i8",
                    "grad_ptr": f"*{dtype}",
                    "partial_ptr": "*fp32",
                    "entry_ptr": "*i64",
                    "elements": "i32",
                    "length": "i32",
                },
                {
                    "INCLUSIVE": False,
                    "LOSS": True,
                    "CORRECT": True,
                    "GRAD": True,
                    "LIST": True,
                    "BLOCK": flat.block,
                },
                ("logits_ptr", "codes_ptr", "counts_ptr", "selected_ptr", "grad_ptr", "entry_ptr", "elements"),
                flat.warps,
            )
