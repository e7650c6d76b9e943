"""Histogram of IGNORE's logit gap by what the label really is: the image that explains its rejection.

The gap of a hidden positive should be larger than that of a true negative. Bins are powers of the square root of two,
because gaps grow with the logits over training.

Source: IGNORE (ECCV 2024); docs/sources.md#ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE

# Kinds of entries, in the order of the rows.
KINDS = ("observed_positive", "hidden_positive", "negative", "not_known")
# Upper ends of all bins but the last, which is open.
EDGES = tuple(2.0 ** (k / 2) for k in range(-16, 13))


class GapHistogram(nn.Module):
    """Counts of one epoch on the device; nothing is read back before the epoch ends.

    Attributes:
        counts: int64 [len(KINDS), len(EDGES) + 1]; not part of a checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.counts: Tensor
        self.edges: Tensor
        self.register_buffer("counts", torch.zeros(len(KINDS), len(EDGES) + 1, dtype=torch.int64, device=device), False)
        self.register_buffer("edges", torch.tensor(EDGES, device=device), False)

    @torch.no_grad()
    def add(self, logits: Tensor, masked: Tensor, batch: Batch) -> None:
        """Count the gaps |logits - masked| [B, C] of one micro-step by what the labels of `batch` say."""
        truth = batch.labels if batch.truth is None else batch.truth
        kind = torch.full_like(truth, KINDS.index("not_known"), dtype=torch.int64)
        kind.masked_fill_(truth == NEGATIVE, KINDS.index("negative"))
        kind.masked_fill_(truth == POSITIVE, KINDS.index("hidden_positive"))
        kind.masked_fill_(batch.labels == POSITIVE, KINDS.index("observed_positive"))
        place = kind * self.counts.shape[1] + torch.bucketize((logits - masked).abs().to(self.edges.dtype), self.edges)
        self.counts.view(-1).index_add_(0, place.reshape(-1), torch.ones_like(place).reshape(-1))

    def take(self) -> dict[str, list[float]]:
        """Counts of all ranks by kind, and the edges; starts anew (collective)."""
        total = distributed.all_reduce_sum(self.counts.clone()).tolist()
        self.counts.zero_()
        return {"edges": list(EDGES)} | dict(zip(KINDS, total, strict=True))
