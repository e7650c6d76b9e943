"""What heads with queries share: attention that shows a few of its rows, feed-forward layers, and maps of attention.

The map of a class, as IGNORE uses it, is A * mean_channel(F): A the cross-attention row of the class's query, averaged
over heads, F the backbone's own feature map. That is the channel mean of A * F, factorised.

Source: docs/sources.md#query2label, docs/sources.md#ignore.
"""

from __future__ import annotations

import math

import torch
from spml_kernels import map_mask
from torch import Tensor, nn
from torch.nn import functional as F

from spml_fast.core.errors import UserError
from spml_fast.core.precision import no_autocast
from spml_fast.models.heads.base import HeadOutput, MaskOptions


def require_positive(**options: int) -> None:
    """Raise `UserError` for the first of a head's options that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"model.head_options.{name} is {value}; it must be at least 1")


class Attention(nn.Module):
    """Multi-head attention, fused; on demand the weights of a few queries.

    Args:
        dim: d.
        heads: number of heads.
        dropout: rate on the weights in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None = None, row_dropout: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [B, Q, d], or [1, Q, d] when all images share it.
            key: [B, L, d].
            value: [B, L, d].
            rows: int64 [B, N] places in Q whose weights are wanted; negative ones give zeros.
            row_dropout: put dropout on these weights (in training).

        Returns:
            [B, Q, d], and weights [B, N, L] fp32 averaged over heads (without gradient) or None.
        """
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        # Not len(k), which would be a fixed number in an exported graph.
        q = q.expand(k.shape[0], -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        if rows is None:
            return out, None
        with torch.no_grad(), no_autocast(q.device):
            place = rows.clamp(min=0)[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1])
            chosen = q.gather(2, place)
            if q.dtype in (torch.bfloat16, torch.float16):
                chosen, k = chosen.float(), k.float()
            weights = torch.softmax(chosen @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
            if row_dropout:
                weights = F.dropout(weights, self.dropout, self.training)
            weights = torch.where((rows >= 0)[:, :, None], weights.mean(1), 0.0)
        return out, weights


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return self.down(self.dropout(F.relu(self.up(tokens))))


def attention_output(
    logits: Tensor,
    rows: Tensor | None,
    features: Tensor,
    classes: Tensor | None,
    images: Tensor | None,
    mask: MaskOptions | None,
) -> HeadOutput:
    """The output of a head with queries: logits, and maps or masked images, without gradient, where they are wanted.

    Args:
        logits: [B, C] fp32.
        rows: [B, N, h w] fp32 attention of the classes asked for, averaged over heads; None for none.
        features: [B, h, w, K] of the backbone.
        classes: int64 [B, N], padded with -1; None for none.
        images: [B, 3, S, S] to be masked, or None.
        mask: how; the masked images are given instead of the maps.
    """
    if classes is None or rows is None:
        return HeadOutput(logits)
    with torch.no_grad(), no_autocast(features.device):
        average = features.detach().mean(-1, dtype=rows.dtype)
        attention = rows.unflatten(2, features.shape[1:3])
        maps = attention * average[:, None]
        if mask is None or images is None:
            return HeadOutput(logits, maps=maps, attention=attention)
        masked = map_mask(maps, classes, images, mask.threshold, mask.norm, mask.group)
    return HeadOutput(logits, masked=masked)
