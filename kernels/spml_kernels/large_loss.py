"""large_loss: the k largest unobserved logits of a batch, exact over ranks, and the loss that rejects or corrects them.

Source: Large Loss Matters (CVPR 2022) as in spec/boostlu_large_loss.md 1.4.

The kernels find the k-th largest logit without sorting and without the host. Order-preserving 32-bit keys are counted
by their top 11 bits; the bin in which the k-th lies is known, only its entries are counted by the next 11 bits, then by
the last 10. The three histograms (8 kB each) are summed over ranks, so the threshold is exact over ranks. Each pass
finds the bin of the pass before in its first instructions; one more pass counts entries above and at the threshold per
block, which gives every entry its place in the order of positions, and the last pass writes selection, loss, gradient
and the list of selected entries together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spml_kernels.aot import Case
from spml_kernels.dispatch import use_triton
from spml_kernels.heuristics import flat_launch, histogram_launch
from spml_kernels.jit import LAUNCH, jit, tl
from spml_kernels.label_loss import scale_gradient
from spml_kernels.math import sigmoid_jit, softplus_jit
from spml_kernels.reference.large_loss import large_loss_reference, list_selected_reference, select_large_reference

Ties = Literal["exact", "inclusive"]
Scheme = Literal["reject", "correct"]

# Bins of one pass; keys have 32 bits: 11, 11 and 10 of them.
BINS = 2048
LEVELS = 3
# Words of the state that a pass hands on: bits of the key so far, how many are still to be found, mode.
STATE = 3
_NORMAL, _NONE, _ALL = 0, 1, 2


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
        return _select_triton(logits, codes, k, k_max, ties, gather, rank)[:2]
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
        wanted = logits.requires_grad and torch.is_grad_enabled()
        return large_loss_op(logits, codes, selected, scheme == "correct", wanted)[0]
    return large_loss_reference(logits, codes, selected, scheme)


class LargeLossStep(NamedTuple):
    """Selection and loss of one step.

    Attributes:
        loss: as `large_loss`.
        selected: bool [B, C].
        threshold: 0-d.
        rows, classes: int64 [min(k_max, B * C)], the selected entries by position.
        valid: bool, which of them are there.
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
) -> LargeLossStep:
    """`select_large`, `large_loss` and `list_selected` together; kernels do all three in the selection's last pass."""
    if use_triton(logits):
        selected, threshold, state = _select_triton(logits, codes, k, k_max, ties, gather, rank)
        del selected
        wanted = logits.requires_grad and torch.is_grad_enabled()
        length = min(k_max, logits.numel())
        flags = (ties == "inclusive", scheme == "correct", wanted, length)
        loss, _, selected, entry, valid = large_step_op(logits, codes, *state, *flags)
        return LargeLossStep(
            loss, selected, threshold, entry // logits.shape[1], entry % logits.shape[1], valid
        )
    selected, threshold = select_large(logits, codes, k, k_max, ties, gather, rank)
    listed = list_selected(selected, k_max)
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
