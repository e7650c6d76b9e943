"""Gradients of cam_pool from the signs that its forward kept.

With P the sign of a cell, m and r the gradients of mean(M) and mean(relu M) over H W, every cell's gradient is
G = m + r P, made on the fly from two rows of B x C numbers and a bit:
    dX = G W,   dW = G' X,   dbias = sum G.

Where the products take longer than the bytes (many classes), most of what they would add is left out: 64 x 64 squares
without a positive cell, most of a trained network's, are skipped by lists made beforehand, and the mean part, which has
no zeros, becomes two products with one row per image:
    dX = (m W) [of its image] + (r P) W,   dW = m' sum(X) + (r P)' X.
The forward has made the mean features for that. Elsewhere one product holds both parts, and nothing is made beside it.
Sums that are split over programs are added in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool.kernels import (
    _cam_pool_dw_kernel,
    _cam_pool_dx_kernel,
    _cam_pool_flags_kernel,
    _cam_pool_list_kernel,
    _cam_pool_shares_kernel,
    _cam_pool_sum_kernel,
)
from spml_kernels.cam_pool.tiles import constants, launch_of
from spml_kernels.common.heuristics import SKIP, CamPoolLaunch
from spml_kernels.common.jit import LAUNCH, cdiv
from spml_kernels.common.ops import define

# Class squares of one program of the flags kernel.
SQUARES = 8
# Steps that the list kernel looks at together.
LIST_BLOCK = 128
# Classes of one program of the shares kernel; sums of one program of the sum kernel.
SHARES_BLOCK = 512
SUM_BLOCK = 1024


def _work_lists(flags: Tensor, tile: int, step: int) -> tuple[Tensor, Tensor]:
    """Of every tile along the first axis of squares, the steps along the second that hold a positive cell, in order.

    Args:
        flags: int8 [n, m] of squares, any strides.
        tile: cells or classes of a tile, at least a square's.
        step: classes or cells of a step, at most a square's.

    Returns:
        int32 [tiles, steps], valid up to the count, and the counts int32 [tiles].
    """
    merged, parts = tile // SKIP, SKIP // step
    tiles, width = cdiv(flags.shape[0], merged), flags.shape[1] * parts
    steps = torch.empty(tiles, width, dtype=torch.int32, device=flags.device)
    count = torch.empty(tiles, dtype=torch.int32, device=flags.device)
    _cam_pool_list_kernel[(tiles,)](
        flags,
        steps,
        count,
        flags.shape[0],
        *flags.stride(),
        width,
        MERGED=merged,
        PARTS=parts,
        BLOCK=LIST_BLOCK,
        num_warps=1,
        **LAUNCH,
    )
    return steps, count


@define("spml::cam_pool_backward")
def cam_pool_backward_op(
    grad_mean: Tensor,
    grad_relu: Tensor,
    features: Tensor,
    weight: Tensor,
    bits: Tensor,
    pooled: Tensor,
    want_x: bool,
    want_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias (fp32); those of features or of the two others are empty if unwanted.

    Args:
        grad_mean, grad_relu: [B, C].
        features, weight: as for `cam_pool`; bits, pooled: as `cam_pool_op` gives them.
    """
    batch, height, width, channels = features.shape
    cells, classes = height * width, len(weight)
    rows, dtype = batch * cells, features.dtype
    x, w = features.contiguous(), weight.to(dtype).contiguous()
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    d_x = torch.empty(features.shape if want_x else (0,), dtype=dtype, device=features.device)
    # Without images no program writes a gradient.
    new = torch.zeros if batch == 0 else torch.empty
    d_w = new((classes, channels) if want_w else (0,), dtype=weight.dtype, device=weight.device)
    d_b = new((classes,) if want_w else (0,), **make)
    if batch == 0:
        return d_x, d_w, d_b
    launch = launch_of(features, classes)
    grad_mean, grad_relu = grad_mean.float().contiguous(), grad_relu.float().contiguous()
    # fp16 cannot hold the tiny gradients of a mean: they are scaled to 1, and the sums scaled back.
    scaled = dtype == torch.float16
    scale = grad_mean
    if scaled:
        scale = (torch.maximum(grad_mean.abs().amax(), grad_relu.abs().amax()) / cells).clamp(min=1e-30)
    stride = bits.shape[1]
    off, on = torch.empty(2, batch, stride, dtype=dtype, device=features.device)
    _cam_pool_shares_kernel[(batch, cdiv(stride, SHARES_BLOCK))](
        grad_mean,
        grad_relu,
        scale,
        off,
        on,
        classes,
        stride,
        1.0 / cells,
        SKIP_EMPTY=launch.skip_empty_tiles,
        SCALED=scaled,
        BLOCK=SHARES_BLOCK,
        num_warps=4,
        **LAUNCH,
    )
    flags = off
    if launch.skip_empty_tiles:
        down, across = cdiv(rows, SKIP), cdiv(classes, SKIP)
        flags = torch.empty(down, across, dtype=torch.int8, device=features.device)
        _cam_pool_flags_kernel[(down, cdiv(across, SQUARES))](
            bits, flags, len(bits), stride, across, SIDE=SKIP, SQUARES=SQUARES, num_warps=4, **LAUNCH
        )
    if want_x:
        tiles = launch.d_features
        # Read with SKIP_EMPTY alone.
        mean, steps, count = off, bits, bits
        if launch.skip_empty_tiles:
            # A product in fp16 would overflow where it is scaled and underflow where it is not.
            mean = grad_mean @ w.float() / cells if scaled else off[:, :classes] @ w
            steps, count = _work_lists(flags, tiles.rows, tiles.classes)
        _cam_pool_dx_kernel[(cdiv(rows, tiles.rows) * cdiv(channels, tiles.channels),)](
            off,
            on,
            bits,
            w,
            mean,
            scale,
            steps,
            count,
            d_x,
            rows,
            classes,
            channels,
            cells,
            stride,
            steps.shape[1] if launch.skip_empty_tiles else cdiv(classes, tiles.classes),
            SKIP_EMPTY=launch.skip_empty_tiles,
            EVEN=channels % tiles.channels == 0,
            SCALED=scaled,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **constants(dtype, tiles),
            **LAUNCH,
        )
    if want_w:
        _weight_gradients(launch, off, on, bits, x, pooled, scale, flags, d_w, d_b, cells)
    return d_x, d_w, d_b


def _weight_gradients(
    launch: CamPoolLaunch,
    off: Tensor,
    on: Tensor,
    bits: Tensor,
    x: Tensor,
    pooled: Tensor,
    scale: Tensor,
    flags: Tensor,
    d_w: Tensor,
    d_b: Tensor,
    cells: int,
) -> None:
    """Fill the gradients of weights and bias."""
    tiles, splits = launch.d_weight, launch.splits
    classes, channels = d_w.shape
    rows = x.numel() // max(channels, 1)
    steps = count = bits
    if launch.skip_empty_tiles:
        steps, count = _work_lists(flags.T, tiles.classes, tiles.rows)
    weights, bias, part_stride = d_w, d_b, 0
    if splits > 1:
        # Whole lines of memory, so that every part's stores are as wide as those of the first.
        part_stride = cdiv(classes * (channels + 1), 32) * 32
        parts = torch.empty(splits, part_stride, dtype=torch.float32, device=x.device)
        weights, bias = parts, parts[0, classes * channels :]
    _cam_pool_dw_kernel[(cdiv(classes, tiles.classes) * cdiv(channels, tiles.channels), splits)](
        off,
        on,
        bits,
        x,
        pooled,
        scale,
        steps,
        count,
        weights,
        bias,
        rows,
        classes,
        channels,
        cells,
        bits.shape[1],
        steps.shape[1] if launch.skip_empty_tiles else cdiv(rows, tiles.rows),
        splits,
        part_stride,
        SKIP_EMPTY=launch.skip_empty_tiles,
        EVEN=channels % tiles.channels == 0,
        SCALED=x.dtype == torch.float16,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(x.dtype, tiles),
        **LAUNCH,
    )
    if splits > 1:
        _cam_pool_sum_kernel[(cdiv(classes * (channels + 1), SUM_BLOCK),)](
            weights,
            d_w,
            d_b,
            classes * channels,
            classes,
            splits,
            part_stride,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **LAUNCH,
        )


@cam_pool_backward_op.register_fake
def _(
    grad_mean: Tensor,
    grad_relu: Tensor,
    features: Tensor,
    weight: Tensor,
    bits: Tensor,
    pooled: Tensor,
    want_x: bool,
    want_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = features.new_empty(features.shape if want_x else (0,))
    d_w = weight.new_empty(weight.shape if want_w else (0,))
    return d_x, d_w, weight.new_empty(len(weight) if want_w else 0, dtype=torch.float32)
