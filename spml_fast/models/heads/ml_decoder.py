"""ML-Decoder head: a few group queries that read the feature map by cross-attention, each for a group of classes.

Tokens Z = relu(E X) [h w, d], E a linear layer, without a position code; Q [K, d] group queries:
    s = LN(Q + drop(Q));   s = LN(s + drop(MHA(q=s, k=Z, v=Z)));   s = LN(s + drop(FFN(s)))
    logit[b, c] = <W[k, :, j], s[b, k]> + bias[c],   k = c // g,  j = c % g,  g = ceil(C / groups)
Queries do not see each other: there is no self-attention, in which they would cost their number squared. They are fixed
random vectors, unless queries is learned. The decoder's cost depends on K, not on C: 9,605 classes take 100 queries.
With groups >= C every class has its own query (full decoding). There is no class activation map, so BoostLU's alpha has
no meaning here and must be 1.

The map of a class, as IGNORE uses it, is that of Query2Label with the attention row of the query that the class reads
(`attention_output`). The g classes of a group share it: a map tells them apart only at full decoding, and which classes
share one is decided by their order in the data set.

Where released code differs:
- it computes all of min(groups, C) queries. Where fewer serve all classes (312 classes: 78 of 100), only these are
  made here, which is the same function.
- it finds g by adding 0.999 and cutting off, which is too small for some C with more than 1,000 groups.

Source: ML-Decoder (Ridnik et al., WACV 2023); docs/sources.md#ml-decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spml_fast.core.errors import UserError
from spml_fast.core.precision import no_autocast
from spml_fast.models.heads.attention import Attention, FeedForward, attention_output, require_positive
from spml_fast.models.heads.base import Head, HeadOptions, HeadOutput, MaskOptions, register


@dataclass(frozen=True)
class MLDecoderOptions(HeadOptions):
    """ML-Decoder.

    Attributes:
        groups: queries, each for a group of classes that share its attention; with as many as there are classes, or
            more, or null, each class has its own (full decoding).
        queries: fixed keeps the queries as they are drawn; learned trains them.
        hidden: token width d, reached by a linear layer and a ReLU; null takes the backbone's features as they are.
        ffn: width of the feed-forward layer.
        heads: attention heads.
        dropout: on the queries, on attention weights, in the feed-forward layer and on both residual branches.
        map_dropout: put dropout on the attention rows that masks are made of, in training.
    """

    groups: int | None = 100
    queries: Literal["fixed", "learned"] = "fixed"
    hidden: int | None = 768
    ffn: int = 2048
    heads: int = 8
    dropout: float = 0.1
    map_dropout: bool = False


class GroupLinear(nn.Module):
    """A matrix for each query, whose columns are the classes of its group, and a bias for each class.

    Args:
        queries: K.
        dim: d.
        size: g, classes of a group; the last group may have fewer.
        num_classes: C, more than (K - 1) g and at most K g.
    """

    def __init__(self, queries: int, dim: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(queries, dim, size))
        self.bias = nn.Parameter(torch.empty(num_classes))

    def reset_parameters(self, groups: int) -> None:
        """Draw the weights anew, normal by Xavier's rule for a tensor [groups, d, g]; biases start at 0."""
        _, dim, size = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2 / ((dim + groups) * size)))
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[B, K, d] to logits [B, C], in fp32 whatever autocast says."""
        with no_autocast(states.device):
            states = states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
            # A product for each query: nothing of size B C d.
            logits = torch.einsum("bkd,kdg->bkg", states, self.weight).flatten(1)
            return logits[:, : len(self.bias)] + self.bias


@register("ml_decoder")
class MLDecoderHead(Head):
    """See the top of this file.

    Raises:
        UserError: widths, heads or groups that do not fit together.
    """

    Options: ClassVar[type[HeadOptions]] = MLDecoderOptions
    # At full decoding; see `classes_per_query`.
    class_parameters: ClassVar[tuple[str, ...]] = ("queries", "classify.weight", "classify.bias")
    options: MLDecoderOptions

    def __init__(self, channels: int, num_classes: int, grid: tuple[int, int], options: HeadOptions) -> None:
        super().__init__(channels, num_classes, grid, options)
        o = self.options
        hidden = channels if o.hidden is None else o.hidden
        groups = num_classes if o.groups is None else o.groups
        require_positive(groups=groups, hidden=hidden, ffn=o.ffn, heads=o.heads)
        if not 0 <= o.dropout < 1:
            raise UserError(f"model.head_options.dropout is {o.dropout}; it must lie in [0, 1)")
        if hidden % o.heads:
            what = "the backbone's width" if o.hidden is None else "model.head_options.hidden"
            raise UserError(f"{what} is {hidden}; it must be a multiple of model.head_options.heads ({o.heads})")
        self.groups = min(groups, num_classes)
        self.classes_per_query = math.ceil(num_classes / self.groups)
        used = math.ceil(num_classes / self.classes_per_query)
        self.project = nn.Identity() if o.hidden is None else nn.Linear(channels, hidden)
        self.queries: Tensor
        if o.queries == "learned":
            self.queries = nn.Parameter(torch.empty(used, hidden))
        else:
            # Part of what is saved: no other random vectors give the run's logits.
            self.register_buffer("queries", torch.empty(used, hidden))
        self.attention, self.feed_forward = Attention(hidden, o.heads, o.dropout), FeedForward(hidden, o.ffn, o.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))
        self.dropout = nn.Dropout(o.dropout)
        self.classify = GroupLinear(used, hidden, self.classes_per_query, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw queries and parameters anew: linear layers, and attention, as torch's own modules are drawn."""
        for module in (*self.project.modules(), *self.attention.modules(), *self.feed_forward.modules()):
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        attention = self.attention
        for part in (attention.query, attention.key, attention.value):
            # Drawn as one matrix [3 d, d], which makes the bound smaller than that of a [d, d] each.
            bound = math.sqrt(6 / (4 * part.in_features))
            nn.init.uniform_(part.weight, -bound, bound)
        for part in (attention.query, attention.key, attention.value, attention.out):
            nn.init.zeros_(part.bias)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.reset_parameters()
        nn.init.normal_(self.queries)
        self.classify.reset_parameters(self.groups)

    @torch.no_grad()
    def set_bias(self, logits: Tensor, alpha: float) -> None:
        """The biases of the group-wise layer."""
        self.classify.bias.copy_(logits)

    def forward(
        self,
        features: Tensor,
        boost: bool = True,
        classes: Tensor | None = None,
        images: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> HeadOutput:
        """Logits; maps without gradient. As `Head.forward`."""
        tokens = features.flatten(1, 2)
        if self.options.hidden is not None:
            tokens = F.relu(self.project(tokens))
        query = self.queries[None]
        # With dropout each image has queries of its own; else all share them, and their projection.
        noisy = query.expand(features.shape[0], -1, -1) if self.training and self.dropout.p else query
        query = self.norm1(query + self.dropout(noisy))
        # -1, which stands for no class, stays -1.
        rows = None if classes is None else classes.div(self.classes_per_query, rounding_mode="floor")
        read, weights = self.attention(query, tokens, tokens, rows, self.options.map_dropout)
        states = self.norm2(query + self.dropout(read))
        states = self.norm3(states + self.dropout(self.feed_forward(states)))
        return attention_output(self.classify(states), weights, features, classes, images, mask)
