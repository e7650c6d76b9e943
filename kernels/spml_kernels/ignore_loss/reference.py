"""IGNORE's statistics, rejection and losses in plain PyTorch. Source: docs/sources.md#ignore."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def _as_float(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _entry_loss(logits: Tensor, positive: Tensor, form: str, eps: float) -> Tensor:
    """Binary cross-entropy of every entry with target 1 where `positive`, else 0."""
    # log(1 - p(z)) is log p(-z): one formula for both targets, and no 1 - p that cancels.
    signed = torch.where(positive, logits, -logits)
    if form == "logits":
        return softplus(-signed)
    if form == "epsilon":
        return -torch.log(torch.sigmoid(signed) + eps)
    raise ValueError(f"unknown loss form {form!r}")


def ignore_statistics_reference(logits_BC: Tensor, masked_BC: Tensor, codes_BC: Tensor) -> Tensor:
    """As `spml_kernels.ignore_statistics`."""
    z, z_masked = _as_float(logits_BC.detach()), _as_float(masked_BC.detach())
    positive = codes_BC == 1
    gap = torch.where(positive, (z - z_masked).abs(), 0.0).sum()
    rows = z.new_full((), float(len(z)))
    return torch.cat([torch.stack([gap, positive.sum().to(z.dtype), rows]), z.sum(0)])


def ignore_loss_reference(
    logits_BC: Tensor,
    strong_BC: Tensor | None,
    masked_BC: Tensor | None,
    codes_BC: Tensor,
    gap_threshold: Tensor,
    average_threshold_C: Tensor | None,
    form: str,
    eps: float,
    strong_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `spml_kernels.ignore_loss`, without the counts: the sums of spbc, ign and reg, and the rejected entries."""
    z = _as_float(logits_BC)
    z_strong = z if strong_BC is None else _as_float(strong_BC)
    positive = codes_BC == 1
    rejected = torch.zeros_like(positive)
    if masked_BC is not None:
        fixed = z.detach()
        rejected = (codes_BC == -1) & ((fixed - _as_float(masked_BC.detach())).abs() > gap_threshold)
        if average_threshold_C is not None:
            rejected = rejected & (fixed > average_threshold_C)
    weak_loss = _entry_loss(z, positive, form, eps)
    target = _entry_loss(z_strong, positive, form, eps) if strong_target and strong_BC is not None else weak_loss
    # torch.where and not a product, so that an infinite loss at a dropped entry cannot turn into a NaN.
    spbc = torch.where(positive, weak_loss, 0.0).sum()
    ign = torch.where(rejected, 0.0, target).sum()
    reg = (z_strong - z).square().sum()
    return spbc, ign, reg, rejected
