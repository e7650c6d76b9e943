"""ignore_loss: IGNORE's statistics (pass one), then its rejection and three loss terms (pass two).

Source: IGNORE (ECCV 2024) as in spec/ignore.md 1.2 to 1.5. Between the passes stand an all-reduce of C + 3 numbers and
the update of the thresholds; denominators are global counts, so pass two returns plain sums.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from spml_kernels.reference.ignore_loss import ignore_loss_reference, ignore_statistics_reference

LossForm = Literal["logits", "epsilon"]


class IgnoreTerms(NamedTuple):
    """Sums of the three loss terms over this rank's entries, and what was rejected.

    Attributes:
        spbc: over observed positives, weak view; 0-d, differentiable.
        ign: over entries that are not rejected; 0-d, differentiable.
        reg: squared difference of the two views' logits; 0-d, differentiable in both.
        rejected: bool [B, C].
    """

    spbc: Tensor
    ign: Tensor
    reg: Tensor
    rejected: Tensor


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
    """
    return IgnoreTerms(
        *ignore_loss_reference(
            logits, strong, masked, codes, gap_threshold, average_threshold, form, eps, strong_target
        )
    )
