"""large_loss: the k largest unobserved logits of a batch, exact over ranks, and the loss that rejects or corrects them.

Source: Large Loss Matters (CVPR 2022), docs/sources.md#large-loss.

The kernels find the k-th largest logit without sorting and without the host. Order-preserving 32-bit keys are counted
by their top bits; the bin in which the k-th lies is known, only its entries are counted by the next bits, and so on:
three histograms of 11, 11 and 10 bits, or eight counts of 4 bits where the compiler's histogram is slow
(`heuristics.large_loss_way`; the variable SPML_LARGE_LOSS takes one of them). How many entries above and at
the threshold lie before an entry gives its place in the order of positions; selection, loss, gradient and the list of
selected entries are then written together.

A batch that one program can hold, on one rank, takes one launch: its keys stay in registers while the threshold's bits
are found one by one. Others take five, or ten. The counts (8 kB or 64 bytes a pass) are summed over ranks, so the
threshold is exact over ranks; each pass finds the bin of the pass before in its first instructions. The last but one
counts entries above and at the threshold per block, where somebody has to know, and the last writes.

All of that is `large_loss_step`; where the selection must be known before its loss can be (one threshold for several
micro-steps), `select_large`, `large_loss` and `list_selected` do the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spml_kernels.common.autograd import register_computed_gradient
from spml_kernels.common.codes import IGNORED
from spml_kernels.common.dispatch import large_loss_override, use_triton
from spml_kernels.common.heuristics import (
    LARGE_LOSS_SELECTS,
    flat_launch,
    histogram_launch,
    large_loss_single_launch,
    large_loss_way,
)
from spml_kernels.common.jit import LAUNCH, VERSION, cdiv
from spml_kernels.common.ops import define
from spml_kernels.label_loss.op import PointLoss, label_loss
from spml_kernels.large_loss.kernels import (
    _large_histogram_kernel,
    _large_select_kernel,
    _large_single_kernel,
    _large_threshold_kernel,
    kept_point_jit,
)
from spml_kernels.large_loss.reference import large_loss_reference, list_selected_reference, select_large_reference

Ties = Literal["exact", "inclusive"]
Scheme = Literal["reject", "correct"]

# Words of the state that a pass hands on: bits of the key so far, how many are still to be found, mode.
STATE = 3


def way_of(elements: int, alone: bool = True) -> str:
    """How to count: what SPML_LARGE_LOSS says, else what is chosen."""
    return large_loss_override() or large_loss_way(elements, alone, VERSION)


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
        step = _select(logits.detach(), codes, k, k_max, gather, rank, (ties == "inclusive", False, False, False, 0))
        return step.selected, step.threshold
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
        return label_loss(logits, torch.where(selected, 1 if scheme == "correct" else IGNORED, codes), _KEPT)
    return large_loss_reference(logits, codes, selected, scheme)


class LargeLossStep(NamedTuple):
    """Selection and loss of one step.

    Attributes:
        loss: as `large_loss`.
        selected: bool [B, C].
        threshold: 0-d.
        rows, classes: int64 [length], the selected entries by position.
        valid: bool [length], which of them exist.
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
    """`select_large`, `large_loss` and `list_selected` together; kernels write all three at once.

    Args:
        logits, codes, k, k_max, ties, gather, rank: as for `select_large`.
        scheme: as for `large_loss`.
        length: of the list, at most B * C; None takes k_max, which inclusive ties may pass. 0 makes no list.
    """
    length = min(k_max if length is None else length, logits.numel())
    if use_triton(logits):
        wanted = logits.requires_grad and torch.is_grad_enabled()
        flags = (ties == "inclusive", True, scheme == "correct", wanted, length)
        return _select(logits, codes, k, k_max, gather, rank, flags)
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


# Inclusive ties, loss wanted, selection corrected (else rejected), gradient wanted, length of the list (0 for none).
Flags = tuple[bool, bool, bool, bool, int]


def _select(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    gather: Callable[[Tensor], Tensor] | None,
    rank: int,
    flags: Flags,
) -> LargeLossStep:
    """Threshold, selection, and of loss and list what `flags` ask for; what they do not is empty."""
    if gather is None:
        loss, selected, _, rows, classes, valid, threshold = large_step_op(logits, codes, k, k_max, *flags)
        return LargeLossStep(loss, selected, threshold, rows, classes, valid)
    # The threshold has no gradient. The first pass reads neither histogram nor state; any tensors do.
    plain, hist, state = logits.detach(), k, k
    way = way_of(logits.numel(), alone=False)
    for level in range(len(LARGE_LOSS_SELECTS[way].widths)):
        hist, state = large_histogram_op(plain, codes, k, hist, state, k_max, level, way)
        hist = gather(hist).sum(0)
    inclusive, listed = flags[0], flags[4] > 0
    counts, threshold, room = large_threshold_op(plain, codes, hist, state, inclusive, listed, way)
    if not inclusive:
        # Entries at the threshold are taken rank after rank. Where all of them are, counts may be 0 on every rank.
        room = room - gather(counts[1].sum())[:rank].sum()
    loss, selected, _, *listing = large_select_op(logits, codes, counts, threshold, room, *flags)
    return LargeLossStep(loss, selected, threshold, *listing)


def _kept_point(logits: Tensor, codes: Tensor) -> Tensor:
    return torch.where(codes == IGNORED, 0, -torch.nn.functional.logsigmoid(torch.where(codes == 1, logits, -logits)))


_KEPT = PointLoss("large_loss", _kept_point, kept_point_jit)


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _new_results(logits: Tensor, loss: bool, gradient: bool, length: int) -> Results:
    """Room for loss, selection, gradient, rows, classes and validity; what is not asked for is empty."""
    return (
        logits.new_empty(() if loss else 0, dtype=torch.float32),
        logits.new_empty(logits.shape, dtype=torch.bool),
        torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient and loss else logits.new_empty(0),
        logits.new_empty(length, dtype=torch.int64),
        logits.new_empty(length, dtype=torch.int64),
        logits.new_empty(length, dtype=torch.bool),
    )


def _launch_histogram(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    hist: Tensor,
    state: Tensor,
    out: Tensor,
    following: Tensor,
    k_max: int,
    level: int,
    way: str,
) -> None:
    launch, select = histogram_launch(logits.numel(), way), LARGE_LOSS_SELECTS[way]
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
        DONE=sum(select.widths[:level]),
        WIDTH=select.widths[level],
        BEFORE=select.widths[max(level - 1, 0)],
        BINS=select.bins,
        TURNS=select.turns,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )


def _new_counts(logits: Tensor, inclusive: bool, listed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for counts, threshold and room; there are no counts where nobody needs them."""
    # One program at least, since the threshold is wanted of an empty batch too.
    programs = flat_launch(max(logits.numel(), 1)).programs if listed or not inclusive else 0
    return (
        logits.new_empty((2, programs), dtype=torch.int32),
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((), dtype=torch.int64),
    )


def _launch_threshold(
    logits: Tensor, codes: Tensor, hist: Tensor, state: Tensor, inclusive: bool, listed: bool, way: str
) -> tuple[Tensor, Tensor, Tensor]:
    launch = flat_launch(max(logits.numel(), 1))
    counts, threshold, room = _new_counts(logits, inclusive, listed)
    _large_threshold_kernel[(max(counts.shape[1], 1),)](
        logits,
        codes,
        hist,
        state,
        counts,
        threshold,
        room,
        logits.numel(),
        INCLUSIVE=inclusive,
        LIST=listed,
        WIDTH=LARGE_LOSS_SELECTS[way].widths[-1],
        BINS=LARGE_LOSS_SELECTS[way].bins,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return counts, threshold, room


def _launch_select(
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
) -> Results:
    launch = flat_launch(max(logits.numel(), 1))
    total, selected, grad, rows, classes, valid = _new_results(logits, loss, gradient, length)
    partial = logits.new_empty(launch.programs if loss else 0, dtype=torch.float32)
    _large_select_kernel[(launch.programs,)](
        logits,
        codes,
        counts,
        threshold,
        room,
        selected.view(torch.int8),
        grad,
        partial,
        rows,
        classes,
        valid.view(torch.int8),
        logits.numel(),
        length,
        INCLUSIVE=inclusive,
        LOSS=loss,
        CORRECT=correct,
        GRAD=gradient and loss,
        LIST=length > 0,
        # Compiled anew for every number of classes, so only where rows are told from classes.
        CLASSES=max(logits.shape[1], 1) if length else 1,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return partial.sum() if loss else total, selected, grad, rows, classes, valid


@define("spml::large_histogram")
def large_histogram_op(
    logits: Tensor, codes: Tensor, k: Tensor, hist: Tensor, state: Tensor, k_max: int, level: int, way: str
) -> tuple[Tensor, Tensor]:
    """Counts int32 [bins] of pass `level` from counts and state of the pass before, and their state int32 [3]."""
    out = torch.zeros(LARGE_LOSS_SELECTS[way].bins, dtype=torch.int32, device=logits.device)
    # Pass 0 has no state, and pass 1 reads none.
    following = torch.empty(STATE, dtype=torch.int32, device=logits.device)
    _launch_histogram(logits.contiguous(), codes.contiguous(), k, hist, state, out, following, k_max, level, way)
    return out, following


@large_histogram_op.register_fake
def _(
    logits: Tensor, codes: Tensor, k: Tensor, hist: Tensor, state: Tensor, k_max: int, level: int, way: str
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(LARGE_LOSS_SELECTS[way].bins, dtype=torch.int32), logits.new_empty(STATE, dtype=torch.int32)


@define("spml::large_threshold")
def large_threshold_op(
    logits: Tensor, codes: Tensor, hist: Tensor, state: Tensor, inclusive: bool, listed: bool, way: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int32 [2, blocks] above and at the threshold, the threshold fp32 [], room at the threshold int64 [].

    Counts are [2, 0] with inclusive ties and without a list, since nobody needs them there.
    """
    return _launch_threshold(logits.contiguous(), codes.contiguous(), hist, state, inclusive, listed, way)


@large_threshold_op.register_fake
def _(
    logits: Tensor, codes: Tensor, hist: Tensor, state: Tensor, inclusive: bool, listed: bool, way: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_counts(logits, inclusive, listed)


@define("spml::large_select")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """0-d loss, selection bool [B, C], gradient, and the list: rows and classes int64, validity bool, each [length].

    Loss and gradient are empty unless asked for. `length` is at most B * C; rows and classes are 0 where not valid.
    """
    logits, codes = logits.contiguous(), codes.contiguous()
    return _launch_select(logits, codes, counts, threshold, room, inclusive, loss, correct, gradient, length)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_results(logits, loss, gradient, length)


@define("spml::large_step")
def large_step_op(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    inclusive: bool,
    loss: bool,
    correct: bool,
    gradient: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All passes on one rank: the six results of `large_select_op` and the threshold, fp32 []."""
    logits, codes = logits.contiguous(), codes.contiguous()
    launch = large_loss_single_launch(logits.numel())
    if launch is None:
        # Counts of all passes are cleared together; a pass keeps its state in the row of its number.
        way = way_of(logits.numel())
        levels = len(LARGE_LOSS_SELECTS[way].widths)
        hist = torch.zeros(levels, LARGE_LOSS_SELECTS[way].bins, dtype=torch.int32, device=logits.device)
        state = torch.empty(levels, STATE, dtype=torch.int32, device=logits.device)
        for level in range(levels):
            # The first pass reads neither of the two.
            before = hist[max(level - 1, 0)], state[max(level - 1, 0)]
            _launch_histogram(logits, codes, k, *before, hist[level], state[level], k_max, level, way)
        counts, threshold, room = _launch_threshold(logits, codes, hist[-1], state[-1], inclusive, length > 0, way)
        flags = (inclusive, loss, correct, gradient, length)
        return *_launch_select(logits, codes, counts, threshold, room, *flags), threshold
    total, selected, grad, rows, classes, valid = _new_results(logits, loss, gradient, length)
    threshold = torch.empty((), dtype=torch.float32, device=logits.device)
    _large_single_kernel[(1,)](
        logits,
        codes,
        k,
        threshold,
        selected.view(torch.int8),
        grad,
        total,
        rows,
        classes,
        valid.view(torch.int8),
        logits.numel(),
        length,
        k_max,
        INCLUSIVE=inclusive,
        LOSS=loss,
        CORRECT=correct,
        GRAD=gradient and loss,
        LIST=length > 0,
        CLASSES=max(logits.shape[1], 1) if length else 1,
        BLOCK=launch.block,
        PART=launch.part,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return total, selected, grad, rows, classes, valid, threshold


@large_step_op.register_fake
def _(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    inclusive: bool,
    loss: bool,
    correct: bool,
    gradient: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_new_results(logits, loss, gradient, length), logits.new_empty((), dtype=torch.float32)


register_computed_gradient(large_select_op, 2)
register_computed_gradient(large_step_op, 2)
