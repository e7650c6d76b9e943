"""Query2Label head: label queries that read the feature map by cross-attention.

Tokens X [h w, d] with a fixed sine position code; one label query per class:
    encoder layer:  s = LN(X + drop(MHA(q=X+pos, k=X+pos, v=X)));           memory = LN(s + drop(FFN(s)))
    decoder layer:  t = LN(t + drop(MHA(q=t+query, k=memory+pos, v=memory)));  t = LN(t + drop(FFN(t)));  t starts at 0
    logit[b, c] = <W_c, LN(t)[b, c]> + bias_c                               (group-wise linear)
The decoder has no self-attention: queries do not see each other. There is no class activation map, so BoostLU's alpha
has no meaning here and must be 1.

The map of a class, as IGNORE uses it, is A[c] * mean_channel(F): A the cross-attention row of the class in the last
decoder layer, averaged over heads, F the backbone's own feature map (`attention_output`).

Where released code differs:
- it keeps the attention weights of all classes and layers; here attention is fused, and the rows of the classes asked
  for are computed beside it.
- its map carries the attention dropout of the forward. Here the map is free of noise; map_dropout: true gives it
  dropout noise of the same rate (its own draw, since fused attention does not show the one it used).
- with queries equal for all images and t = 0, the first decoder layer's query projection is made once a batch.

Source: Query2Label (Liu et al., 2021), as IGNORE (ECCV 2024) uses it; docs/sources.md#query2label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from spml_fast.core.errors import UserError
from spml_fast.core.precision import no_autocast
from spml_fast.models.heads.attention import Attention, FeedForward, attention_output, require_positive
from spml_fast.models.heads.base import Head, HeadOptions, HeadOutput, MaskOptions, register


@dataclass(frozen=True)
class Query2LabelOptions(HeadOptions):
    """Query2Label.

    Attributes:
        preset: paper is hidden 2048, ffn 8192; small is 512, 2048; tiny is 128, 256. All have 4 heads, 1 encoder and
            2 decoder layers.
        hidden: token width d; null takes the preset's. Another width than the backbone's is reached by a projection.
        ffn: width of the feed-forward layers; null takes the preset's.
        heads: attention heads.
        encoder_layers: self-attention layers over the tokens.
        decoder_layers: cross-attention layers of the label queries.
        dropout: on attention weights, in the feed-forward layers and on every residual branch.
        map_dropout: put dropout on the attention rows that masks are made of, in training, as the released code.
    """

    preset: Literal["paper", "small", "tiny"] = "paper"
    hidden: int | None = None
    ffn: int | None = None
    heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 2
    dropout: float = 0.1
    map_dropout: bool = False


PRESETS = {"paper": (2048, 8192), "small": (512, 2048), "tiny": (128, 256)}


def sine_position(height: int, width: int, dim: int) -> Tensor:
    """DETR's fixed position code, fp32 [height * width, dim]: the first half of the channels for y, the second for x.

    Positions count from 1 and are divided by (side + 1e-6), times 2 pi; even channels are sines, odd ones cosines.
    """
    half = dim // 2
    channel = torch.arange(half, dtype=torch.float64)
    scale = 10000 ** (2 * (channel // 2) / half)

    def code(side: int) -> Tensor:
        angle = torch.arange(1, side + 1, dtype=torch.float64)[:, None] / (side + 1e-6) * (2 * math.pi) / scale
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())

    y = code(height)[:, None].expand(height, width, half)
    x = code(width)[None].expand(height, width, half)
    return torch.cat([y, x], -1).flatten(0, 1).float()


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by its norm."""

    def __init__(self, dim: int, ffn: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads, dropout), FeedForward(dim, ffn, dropout)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens [B, L, d] and their position code [L, d]."""
        placed = tokens + position
        tokens = self.norm1(tokens + self.dropout(self.attention(placed, placed, tokens)[0]))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class DecoderLayer(nn.Module):
    """Cross-attention of the label queries and feed-forward, each followed by its norm."""

    def __init__(self, dim: int, ffn: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads, dropout), FeedForward(dim, ffn, dropout)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(
        self,
        target: Tensor | None,
        query: Tensor,
        memory: Tensor,
        placed: Tensor,
        rows: Tensor | None,
        row_dropout: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer of reading.

        Args:
            target: [B, C, d] states of the layer below; None for zeros.
            query: [1, C, d] label queries.
            memory: [B, L, d] tokens.
            placed: [B, L, d] tokens with their position code.
            rows: int64 [B, N] classes whose attention is wanted, padded with -1; None for none.
            row_dropout: put dropout on that attention (in training).

        Returns:
            [B, C, d], and attention [B, N, L] fp32 averaged over heads or None.
        """
        asked = query if target is None else target + query
        read, weights = self.attention(asked, placed, memory, rows, row_dropout)
        read = self.dropout(read)
        target = self.norm1(read if target is None else target + read)
        return self.norm2(target + self.dropout(self.feed_forward(target))), weights


class GroupLinear(nn.Module):
    """One weight vector and one bias for each class, both uniform in +-1/sqrt(d)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(num_classes, dim)), nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, states: Tensor) -> Tensor:
        """[B, C, d] to logits [B, C], in fp32 whatever autocast says."""
        with no_autocast(states.device):
            states = states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
            return torch.einsum("bcd,cd->bc", states, self.weight) + self.bias


@register("query2label")
class Query2LabelHead(Head):
    """See the top of this file.

    Raises:
        UserError: widths, heads or layers that do not fit together.
    """

    Options: ClassVar[type[HeadOptions]] = Query2LabelOptions
    class_parameters: ClassVar[tuple[str, ...]] = ("queries.weight", "classify.weight", "classify.bias")
    options: Query2LabelOptions

    def __init__(self, channels: int, num_classes: int, grid: tuple[int, int], options: HeadOptions) -> None:
        super().__init__(channels, num_classes, grid, options)
        o = self.options
        hidden, ffn = PRESETS[o.preset]
        hidden, ffn = o.hidden or hidden, o.ffn or ffn
        require_positive(hidden=hidden, ffn=ffn, heads=o.heads, decoder_layers=o.decoder_layers)
        if o.encoder_layers < 0 or not 0 <= o.dropout < 1:
            raise UserError("model.head_options: encoder_layers must not be negative and dropout must lie in [0, 1)")
        if hidden % o.heads or hidden % 4:
            raise UserError(
                f"model.head_options.hidden is {hidden}; it must be a multiple of 4 and of heads ({o.heads})"
            )
        self.project = nn.Linear(channels, hidden) if channels != hidden else nn.Identity()
        sizes = (hidden, ffn, o.heads, o.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(o.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(o.decoder_layers))
        self.norm = nn.LayerNorm(hidden)
        self.queries = nn.Embedding(num_classes, hidden)
        self.classify = GroupLinear(num_classes, hidden)
        self.grid = tuple(grid)
        self.position: Tensor
        self.class_ids: Tensor
        self.register_buffer("position", sine_position(*grid, hidden), persistent=False)
        self.register_buffer("class_ids", torch.arange(num_classes), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for layer in [*self.encoder, *self.decoder]:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
            attention = layer.attention
            for part in (attention.query, attention.key, attention.value):
                # The original draws the three as one matrix [3 d, d], which makes the bound smaller.
                bound = math.sqrt(6 / (4 * part.in_features))
                nn.init.uniform_(part.weight, -bound, bound)
            for part in (attention.query, attention.key, attention.value, attention.out):
                nn.init.zeros_(part.bias)
            for part in (layer.feed_forward.up, layer.feed_forward.down):
                bound = 1 / math.sqrt(part.in_features)
                nn.init.uniform_(part.bias, -bound, bound)
        if isinstance(self.project, nn.Linear):
            self.project.reset_parameters()
        for part in (self.norm, self.queries, self.classify):
            part.reset_parameters()

    @torch.no_grad()
    def set_bias(self, logits: Tensor, alpha: float) -> None:
        """The biases of the classifying layer."""
        self.classify.bias.copy_(logits)

    def _position(self, height: int, width: int) -> Tensor:
        """The position code of a grid; another one than configured (smaller masked views) gets its own."""
        if (height, width) == self.grid:
            return self.position
        return sine_position(height, width, self.position.shape[1]).to(self.position)

    def forward(
        self,
        features: Tensor,
        boost: bool = True,
        classes: Tensor | None = None,
        images: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> HeadOutput:
        """Logits; maps without gradient. As `Head.forward`."""
        grid = features.shape[1:3]
        position = self._position(int(grid[0]), int(grid[1]))
        memory = self.project(features.flatten(1, 2))
        for layer in self.encoder:
            memory = layer(memory, position)
        placed, query = memory + position, self.queries(self.class_ids)[None]
        states: Tensor | None = None
        rows: Tensor | None = None
        for layer in self.decoder:
            last = layer is self.decoder[-1]
            states, rows = layer(states, query, memory, placed, classes if last else None, self.options.map_dropout)
        logits = self.classify(self.norm(states))
        return attention_output(logits, rows, features, classes, images, mask)
