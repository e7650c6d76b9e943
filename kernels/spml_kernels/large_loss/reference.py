"""Large Loss in plain PyTorch. Source: docs/sources.md#large-loss.

For an unobserved entry the assumed target is 0, its loss softplus(z) grows strictly with z, so the k largest losses are
the k largest unobserved logits. Observed entries are never candidates: they are left out by minus infinity, not by
multiplying their loss with 0, so they cannot be selected even when k exceeds the number of unobserved entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _as_float(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def select_large_reference(
    logits: Tensor,
    codes: Tensor,
    k: Tensor,
    k_max: int,
    ties: str,
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> tuple[Tensor, Tensor]:
    """As `spml_kernels.select_large`."""
    values = _as_float(logits.detach())
    candidate = codes == -1
    score = torch.where(candidate, values, -torch.inf).flatten()
    top = score.new_full((k_max,), -torch.inf)
    within = min(k_max, len(score))
    top[:within] = score.topk(within).values
    pooled = gather(top).flatten().sort(descending=True).values
    # k = 0 selects nothing: a threshold above everything. Fewer candidates than k: minus infinity, all are selected.
    padded = torch.cat([pooled.new_full((1,), torch.inf), pooled])
    # A list of one place: the place alone would be read back from the device.
    threshold = padded[k.clamp(max=k_max)[None]][0]
    above = candidate & (values > threshold)
    tied = candidate & (values == threshold)
    if ties == "inclusive":
        return above | tied, threshold
    # Exactly k: of those equal to the threshold the first ones by position in the global batch, rank after rank.
    counts = gather(torch.stack([above.sum(), tied.sum()])[None]).reshape(-1, 2)
    room = k - counts[:, 0].sum() - counts[:rank, 1].sum()
    position = tied.flatten().cumsum(0).reshape(tied.shape)
    return above | (tied & (position <= room)), threshold


def large_loss_reference(logits: Tensor, codes: Tensor, selected: Tensor, scheme: str) -> Tensor:
    """As `spml_kernels.large_loss`."""
    values = _as_float(logits)
    positive = codes == 1 if scheme == "reject" else (codes == 1) | selected
    loss = -logsigmoid(torch.where(positive, values, -values))
    return (torch.where(selected, 0, loss) if scheme == "reject" else loss).sum()


def list_selected_reference(selected: Tensor, k_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `spml_kernels.list_selected`."""
    entry = torch.nonzero_static(selected.flatten(), size=min(k_max, selected.numel()), fill_value=-1)[:, 0]
    return unpack_entries(entry, selected.shape[1])


def unpack_entries(entry: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, classes and validity of flat positions, which are -1 where there is nothing."""
    place = entry.clamp(min=0)
    return place // max(num_classes, 1), place % max(num_classes, 1), entry >= 0
