"""Gradients of cam_pool from the signs that its forward kept.

With P the sign of a cell, m and r the gradients of mean(M) and mean(relu M) over H W, every cell's gradient of the map
is G = m + r P, made from two rows of B x C numbers and a bit:
    dX = G W,   dW = G' X,   dbias = sum G.

A small kernel writes G for a chunk of cells, short enough to stay in the level-2 cache, and the two products are
PyTorch's: no kernel of ours is as fast as the vendor's on every card, and a product that makes its operand from signs
in registers spends more on that than on multiplying. dX is complete chunk by chunk; dW is summed in fp32 over the
chunks, in the gradient itself where it is fp32. The scratch is the end of dX, which is written last, while a chunk fits
into it. Chunks follow each other in one order and nothing is added by atomics.

A product in PyTorch has its shape from the host, so classes without a positive cell cannot be left out of it without
waiting for the device to say which they are. `sparse` leaves them out of products of our own, where
SPML_CAM_POOL_BACKWARD or `heuristics.CAM_POOL_BACKWARD` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool.kernels import _cam_pool_expand_kernel
from spml_kernels.cam_pool.products import wide_product
from spml_kernels.cam_pool.sparse import sparse_gradients
from spml_kernels.cam_pool.tiles import cache_of
from spml_kernels.common import heuristics
from spml_kernels.common.dispatch import cam_pool_backward_override
from spml_kernels.common.heuristics import (
    ALIGNED,
    CHUNK_BYTES,
    WORD,
    Chunk,
    cam_pool_chunks,
    expand_classes,
    expand_rows,
    expand_warps,
    images_per_tile,
)
from spml_kernels.common.jit import LAUNCH, cdiv
from spml_kernels.common.ops import define


@define("spml::cam_pool_backward")
def cam_pool_backward_op(
    grad_mean: Tensor, grad_relu: Tensor, features: Tensor, weight: Tensor, bits: Tensor, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias (fp32); those of features or of the two others are empty if unwanted.

    Args:
        grad_mean, grad_relu: [B, C].
        features, weight: as for `cam_pool`; bits: as `cam_pool_op` gives them.
    """
    batch, height, width, channels = features.shape
    cells, classes = height * width, len(weight)
    rows, dtype = batch * cells, features.dtype
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    if rows == 0:
        d_x = torch.empty(features.shape if want_x else (0,), dtype=dtype, device=features.device)
        return d_x, torch.zeros_like(weight) if want_w else weight.new_empty(0), torch.zeros(classes * want_w, **make)
    grad_mean, grad_relu = grad_mean.float().contiguous(), grad_relu.float().contiguous()
    if (cam_pool_backward_override() or heuristics.CAM_POOL_BACKWARD) == "sparse":
        packed = features.contiguous().view(batch, cells, channels)
        d_x, d_w, d_bias = sparse_gradients(grad_mean, grad_relu, packed, weight, bits, want_x, want_w)
        return d_x.view(features.shape if want_x else (0,)), d_w, d_bias
    x, w = features.contiguous().view(rows, channels), weight.to(dtype).contiguous()
    d_x = torch.empty(features.shape if want_x else (0,), dtype=dtype, device=features.device)
    # fp16 cannot hold the tiny gradients of a mean: they are scaled to 1, and the products scaled back.
    scale = None
    if dtype == torch.float16:
        scale = (torch.maximum(grad_mean.abs().amax(), grad_relu.abs().amax()) / cells).clamp(min=1e-30)
    parts = torch.empty(cdiv(rows, expand_rows(classes)), classes, **make)
    stride = cdiv(classes, ALIGNED) * ALIGNED
    chunks = cam_pool_chunks(rows, classes, stride, channels, dtype.itemsize, want_x, cache_of(features))
    own = torch.empty(max((c.rows for c in chunks if c.own), default=0) * stride, dtype=dtype, device=features.device)
    weights = _WeightSum(weight, dtype, want_w, len(chunks), scale)
    for chunk in chunks:
        last = chunk.first + chunk.rows
        scratch = own if chunk.own else _end_of(d_x, last * channels, chunk.rows * stride)
        cam = scratch[: chunk.rows * stride].view(chunk.rows, stride)
        _expand(grad_mean, grad_relu, scale, bits, cam, parts, chunk, rows, cells)
        share = cam[:, :classes]
        if want_w:
            weights.add(share, x[chunk.first : last])
        if want_x:
            _features_gradient(share, w, scale, d_x.view(rows, channels)[chunk.first : last])
    return d_x, weights.total(), parts.sum(0) if want_w else torch.empty(0, **make)


def _features_gradient(share: Tensor, w: Tensor, scale: Tensor | None, target: Tensor) -> None:
    """Write share w, times the scale if there is one, to `target` [rows of the chunk, K]."""
    if scale is None:
        torch.mm(share, w, out=target)
        return
    # fp16 may hold neither the product before it is scaled back nor the scale: both are fp32, not all rows at a time.
    step = max(CHUNK_BYTES // (4 * w.shape[1]), 1)
    for part, out in zip(share.split(step), target.split(step), strict=True):
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        wide_product(part, w, wide)
        torch.mul(wide, scale, out=out)


def _end_of(d_x: Tensor, used: int, needed: int) -> Tensor:
    """The last `needed` elements of the features' gradient, from an aligned one on; none of them is among `used`."""
    start = (d_x.numel() - needed) // ALIGNED * ALIGNED
    assert start >= used
    return d_x.view(-1)[start : start + needed]


def _expand(
    grad_mean: Tensor,
    grad_relu: Tensor,
    scale: Tensor | None,
    bits: Tensor,
    cam: Tensor,
    parts: Tensor,
    chunk: Chunk,
    rows: int,
    cells: int,
) -> None:
    """Write a chunk of the map's gradient to `cam` [rows of it, stride], and its sums to their rows of `parts`."""
    classes = grad_mean.shape[1]
    block = expand_classes(classes)
    each = expand_rows(classes)
    _cam_pool_expand_kernel[(cdiv(chunk.rows, each), cdiv(classes, block))](
        grad_mean,
        grad_relu,
        grad_mean if scale is None else scale,
        bits,
        cam,
        parts,
        chunk.first,
        chunk.rows,
        rows,
        classes,
        cells,
        bits.shape[1],
        cam.shape[1],
        1.0 / cells,
        SCALED=scale is not None,
        TOUCHED=images_per_tile(WORD, cells),
        LINES=each // WORD,
        BLOCK=block,
        num_warps=expand_warps(classes),
        **LAUNCH,
    )


class _WeightSum:
    """The gradient of the weights, summed over chunks in fp32.

    Args:
        weight: [C, K].
        dtype: of the products' operands.
        wanted: whether there is a gradient at all.
        chunks: how many products are summed.
        scale: 0-d, what the sum is multiplied by.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, wanted: bool, chunks: int, scale: Tensor | None) -> None:
        self.result = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted else weight.new_empty(0)
        self.scale, self.begun = scale, False
        # A single product rounds its fp32 sums once, to the gradient's own type.
        direct = weight.dtype == torch.float32 or (chunks == 1 and weight.dtype == dtype and scale is None)
        self.sum = self.result if direct or not wanted else torch.empty_like(self.result, dtype=torch.float32)

    def add(self, share: Tensor, x: Tensor) -> None:
        """Add share' x, of [rows, C] and [rows, K]."""
        wide_product(share.T, x, self.sum, add=self.begun)
        self.begun = True

    def total(self) -> Tensor:
        """The gradient in the weights' type."""
        if self.begun and self.scale is not None:
            self.sum.mul_(self.scale)
        return self.result if self.sum is self.result else self.result.copy_(self.sum)


@cam_pool_backward_op.register_fake
def _(
    grad_mean: Tensor, grad_relu: Tensor, features: Tensor, weight: Tensor, bits: Tensor, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = features.new_empty(features.shape if want_x else (0,))
    d_w = weight.new_empty(weight.shape if want_w else (0,))
    return d_x, d_w, features.new_empty((len(weight),) if want_w else (0,), dtype=torch.float32)
