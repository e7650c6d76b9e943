"""large_loss: the k largest unobserved logits of a batch, exact over ranks, and the loss that rejects or corrects them.

Source: Large Loss Matters (CVPR 2022) as in spec/boostlu_large_loss.md 1.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from spml_kernels.reference.large_loss import large_loss_reference, list_selected_reference, select_large_reference

Ties = Literal["exact", "inclusive"]
Scheme = Literal["reject", "correct"]


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
    return large_loss_reference(logits, codes, selected, scheme)


def list_selected(selected: Tensor, k_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """The selection as a list of fixed length, without reading a size back from the device.

    Args:
        selected: bool [B, C] with at most `k_max` entries set (further ones are cut off).
        k_max: length wanted; shorter when B * C is.

    Returns:
        int64 rows, int64 classes and bool `valid`, each [min(k_max, B * C)].
    """
    return list_selected_reference(selected, k_max)
