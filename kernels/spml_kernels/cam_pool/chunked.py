"""cam_pool in plain PyTorch over chunks of classes: matrix products by the vendor's library, a map that fits in cache.

One chunk's map [B * H * W, chunk] is made, reduced and dropped before the next, small enough to stay in the level-2
cache of a GPU, so that it is hardly written to memory. The backward makes it again (a fourth product) instead of
keeping it. It is the rival that the fused kernels have to beat, and what runs where they do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bytes of one chunk's map; half of the 50 MB of an H100's level-2 cache.
CACHE_BYTES = 24 * 2**20


def chunk_size(cells: int, num_classes: int, itemsize: int, cache: int = CACHE_BYTES) -> int:
    """Classes of one chunk: a multiple of 64 whose map takes at most `cache` bytes, and at least 64.

    Args:
        cells: B * H * W.
        num_classes: C.
        itemsize: bytes per entry of the map.
        cache: bytes.
    """
    fitting = cache // max(cells * itemsize, 1) // 64 * 64
    return max(64, min(fitting, -(-num_classes // 64) * 64))


class _ChunkedCamPool(torch.autograd.Function):
    """mean(M) and mean(relu M), [B, C] fp32 each."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, channels = features.shape
        cells = features.reshape(batch * height * width, channels)
        operand = weight.to(cells.dtype)
        pooled = features.flatten(1, 2).mean(1, dtype=torch.float32)
        mean = torch.nn.functional.linear(pooled, weight.float(), bias.float())
        relu = torch.empty_like(mean)
        size = chunk_size(len(cells), len(weight), cells.element_size())
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            cam = torch.addmm(bias[part].to(cells.dtype), cells, operand[part].T)
            relu[:, part] = cam.relu_().view(batch, height * width, -1).mean(1, dtype=torch.float32)
        ctx.save_for_backward(features, weight, bias, pooled)
        return mean, relu

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, pooled = ctx.saved_tensors
        grad_mean, grad_relu = upstream
        batch, height, width, channels = features.shape
        count = height * width
        cells = features.reshape(batch * count, channels)
        operand = weight.to(cells.dtype)
        d_weight = grad_mean.T @ pooled
        d_bias = grad_mean.sum(0)
        d_pooled = grad_mean @ weight.float() / count
        d_cells = d_pooled[:, None].expand(batch, count, channels).reshape(-1, channels)
        size = chunk_size(len(cells), len(weight), cells.element_size())
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            positive = torch.addmm(bias[part].to(cells.dtype), cells, operand[part].T) > 0
            share = (grad_relu[:, part] / count)[:, None].expand(batch, count, -1).reshape(len(cells), -1)
            boosted = torch.where(positive, share, 0).to(cells.dtype)
            d_weight[part] += boosted.T @ cells
            d_bias[part] += boosted.sum(0, dtype=torch.float32)
            d_cells += boosted @ operand[part]
        return d_cells.view_as(features).to(features.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def cam_pool_chunked(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `cam_pool` with boost. Matrix products run in the features' dtype."""
    mean, relu = _ChunkedCamPool.apply(features, weight, bias)
    return mean, relu
