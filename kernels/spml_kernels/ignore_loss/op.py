"""ignore_loss: IGNORE's statistics (pass one), then its rejection and three loss terms (pass two).

Source: IGNORE (ECCV 2024), docs/sources.md#ignore. Between the passes stand an all-reduce of C + 3 numbers and the
update of the thresholds; denominators are global counts, so pass two returns plain sums.

The number of entries that are kept, one of the denominators, is known only after pass two, on all ranks. So pass two
writes no gradient that would have to be read and scaled again: the backward makes both gradients from the logits, with
the exact upstream factor of every term, which it reads on the device. Each tensor is read once a pass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spml_kernels.common.autograd import without_gradient
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import columns_launch, flat_launch
from spml_kernels.common.jit import LAUNCH, cdiv
from spml_kernels.common.ops import define
from spml_kernels.ignore_loss.kernels import (
    _ignore_backward_kernel,
    _ignore_finish_kernel,
    _ignore_loss_kernel,
    _ignore_statistics_kernel,
)
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


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, contiguous, or where there is none one that the kernel does not touch."""
    return other if tensor is None else tensor.contiguous()


@define("spml::ignore_statistics")
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


@define("spml::ignore_loss")
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


@define("spml::ignore_loss_backward")
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
    without_gradient(ctx, *output[1:])
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
