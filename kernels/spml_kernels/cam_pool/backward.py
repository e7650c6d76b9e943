"""Gradients of cam_pool from the signs that its forward kept.

With P the sign of a cell, m and r the gradients of mean(M) and mean(relu M) over H W, every cell's gradient is
G = m + r P, made on the fly from two rows of B x C numbers and a bit:
    dX = G W,   dW = G' X,   dbias = sum G.

Where the products take longer than the bytes (many classes), most of what they would add is left out: 64 x 64 squares
without a positive cell, most of a trained network's, are skipped by lists made beforehand, and the mean part, which has
no zeros, becomes two products with one row an image:
    dX = (m W) [of its image] + (r P) W,   dW = m' sum(X) + (r P)' X.
The forward has made the mean features for that. Elsewhere one product holds both parts, and nothing is made beside it.
Sums that are split over programs are added in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool.tiles import aot_shapes, constants, launch_of, operand_jit
from spml_kernels.common.heuristics import SKIP, CamPoolLaunch
from spml_kernels.common.jit import LAUNCH, cdiv, jit, tl
from spml_kernels.devtools.aot import Case


@jit
def _cam_pool_shares_kernel(
    mean_ptr,
    relu_ptr,
    scale_ptr,
    off_ptr,
    on_ptr,
    classes,
    stride,
    share,
    APART: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a cell hands on, by image and class, as the products' operands.

    Args:
        mean_ptr, relu_ptr: fp32 [B, classes], gradients of the two means.
        scale_ptr: fp32 [], what to divide by (with SCALED).
        off_ptr, on_ptr: [B, stride], of a cell that is not positive and of one that is; 0 past the last class. With
            APART the mean part, which all cells have, and the boosted part, which only positive ones have.
        share: 1 / cells.
    """
    image = tl.program_id(0).to(tl.int64)
    cls = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + image * classes + cls, mask=cls < classes, other=0.0) * share
    relu = tl.load(relu_ptr + image * classes + cls, mask=cls < classes, other=0.0) * share
    if SCALED:
        factor = 1.0 / tl.load(scale_ptr)
        mean, relu = mean * factor, relu * factor
    there = cls < stride
    tl.store(off_ptr + image * stride + cls, mean.to(off_ptr.dtype.element_ty), mask=there)
    on = relu if APART else mean + relu
    tl.store(on_ptr + image * stride + cls, on.to(on_ptr.dtype.element_ty), mask=there)


@jit
def _cam_pool_flags_kernel(bits_ptr, flags_ptr, words, stride, width, SIDE: tl.constexpr, SQUARES: tl.constexpr):
    """Which squares of SIDE cells by SIDE classes hold a positive cell.

    Args:
        bits_ptr: int32 [words, stride].
        flags_ptr: int8 [squares of cells, width].
    """
    down = tl.program_id(0)
    cls = tl.program_id(1) * SQUARES * SIDE + tl.arange(0, SQUARES * SIDE)
    found = tl.zeros((SQUARES * SIDE,), tl.int32)
    for turn in tl.static_range(SIDE // 32):
        word = down * (SIDE // 32) + turn + tl.zeros_like(cls)
        place = bits_ptr + word.to(tl.int64) * stride + cls
        found = found | tl.load(place, mask=(cls < stride) & (word < words), other=0)
    hit = tl.max(tl.reshape((found != 0).to(tl.int32), (SQUARES, SIDE)), 1)
    square = tl.program_id(1) * SQUARES + tl.arange(0, SQUARES)
    tl.store(flags_ptr + down.to(tl.int64) * width + square, hit.to(tl.int8), mask=square < width)


@jit
def _cam_pool_list_kernel(
    flags_ptr,
    list_ptr,
    count_ptr,
    lines,
    line_stride,
    square_stride,
    width,
    MERGED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The work list of one tile: which steps along a line of squares hold a positive cell, in order.

    Args:
        flags_ptr: int8, squares; `lines` of them across, a line of squares each.
        list_ptr: int32 [tiles, width]; count_ptr: int32 [tiles].
        width: steps a line.
        MERGED: lines that a tile spans; PARTS: steps that a square is cut into.
    """
    tile = tl.program_id(0)
    number = 0
    for start in range(0, width, BLOCK):
        step = start + tl.arange(0, BLOCK)
        hit = tl.zeros((BLOCK,), tl.int32)
        for turn in tl.static_range(MERGED):
            line = tile * MERGED + turn + tl.zeros_like(step)
            place = flags_ptr + line * line_stride + (step // PARTS) * square_stride
            hit = hit | tl.load(place, mask=(step < width) & (line < lines), other=0).to(tl.int32)
        hit = (hit != 0).to(tl.int32)
        tl.store(list_ptr + tile * width + number + tl.cumsum(hit, 0) - 1, step, mask=hit != 0)
        number += tl.sum(hit, 0)
    tl.store(count_ptr + tile, number)


@jit
def _cam_pool_dx_kernel(
    off_ptr,
    on_ptr,
    bits_ptr,
    weight_ptr,
    mean_ptr,
    scale_ptr,
    list_ptr,
    count_ptr,
    out_ptr,
    rows,
    classes,
    channels,
    cells,
    stride,
    width,
    APART: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the features' gradient (cells by channels), summed over all steps of classes, or the listed ones.

    Args:
        off_ptr, on_ptr, scale_ptr: from `_cam_pool_shares_kernel`.
        bits_ptr: int32 [words, stride], 0 past the last class; weight_ptr: [classes, channels].
        mean_ptr: [B, channels], with APART the mean part, the same for all cells of an image.
        list_ptr: int32 [row tiles, width], with APART the steps of classes with a positive cell; count_ptr: int32
            [row tiles], how many.
        out_ptr: [rows, channels].
        width: steps of all classes.
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile_r = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    safe = tl.minimum(row, rows - 1)
    image = (safe // cells).to(tl.int64)
    g_lane = image[:, None] * stride
    b_ptrs = bits_ptr + (safe // 32).to(tl.int64)[:, None] * stride
    shift = (safe % 32)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    number = tl.load(count_ptr + tile_r) if APART else width
    for turn in range(0, number):
        step = tl.load(list_ptr + tile_r * width + turn) if APART else turn
        cls = step * BLOCK_C + tl.arange(0, BLOCK_C)
        bits = tl.load(b_ptrs + cls[None, :])
        on = operand_jit(tl.load(on_ptr + g_lane + cls[None, :]), UPCAST)
        w_ptrs = weight_ptr + tl.minimum(cls, classes - 1).to(tl.int64)[:, None] * channels + k[None, :]
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=k[None, :] < channels, other=0.0)
        if APART:
            share = tl.where(((bits >> shift) & 1) != 0, on, 0.0).to(on.dtype)
        else:
            off = operand_jit(tl.load(off_ptr + g_lane + cls[None, :]), UPCAST)
            share = tl.where(((bits >> shift) & 1) != 0, on, off)
        acc = tl.dot(share, operand_jit(w, UPCAST), acc, input_precision=PRECISION)
    if SCALED:
        acc = acc * tl.load(scale_ptr)
    there = (row < rows)[:, None] & (k < channels)[None, :]
    if APART:
        mean = tl.load(mean_ptr + image[:, None] * channels + k[None, :], mask=there, other=0.0)
        acc += mean.to(tl.float32)
    place = out_ptr + row.to(tl.int64)[:, None] * channels + k[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _cam_pool_dw_kernel(
    off_ptr,
    on_ptr,
    bits_ptr,
    features_ptr,
    pooled_ptr,
    scale_ptr,
    list_ptr,
    count_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    classes,
    channels,
    cells,
    stride,
    width,
    splits,
    part_stride,
    APART: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the weights' gradient (classes by channels), over a part of all steps of cells, or the listed ones.

    Args:
        off_ptr, on_ptr, bits_ptr, scale_ptr: as for the features' gradient; features_ptr: [rows, channels].
        pooled_ptr: [B, channels], with APART the mean features, whose product the first part begins with.
        list_ptr: int32 [class tiles, width], with APART the steps of cells with a positive one; count_ptr: int32 [class
            tiles], how many.
        weight_ptr: [classes, channels] of part 0, and bias_ptr: [classes]; those of the next part lie part_stride on.
        width: steps of all cells.
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile_c = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    part = tl.program_id(1)
    cls = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    # The last tile of classes may be wider than the rows of signs and shares, which end at a multiple of 64.
    known = cls[:, None] < stride
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    acc_bias = tl.zeros((BLOCK_C,), tl.float32)
    if APART:
        images = rows // cells
        for first in range(0, tl.where(part == 0, images, 0), BLOCK_R):
            image = first + tl.arange(0, BLOCK_R)
            safe = tl.minimum(image, images - 1).to(tl.int64)
            here = known & (image < images)[None, :]
            mean = tl.load(off_ptr + safe[None, :] * stride + cls[:, None], mask=here, other=0.0)
            x = tl.load(pooled_ptr + safe[:, None] * channels + k[None, :], mask=(k < channels)[None, :], other=0.0)
            mean = operand_jit(mean, UPCAST)
            acc = tl.dot(mean, operand_jit(x, UPCAST), acc, input_precision=PRECISION)
            if tile_k == 0:
                acc_bias += tl.sum(mean.to(tl.float32), 1)
        # Shares are those of one cell, and mean features stand for all cells of an image.
        acc = acc * cells
        acc_bias = acc_bias * cells
    number = tl.load(count_ptr + tile_c) if APART else width
    each = tl.cdiv(number, splits)
    for turn in range(part * each, tl.minimum(part * each + each, number)):
        step = tl.load(list_ptr + tile_c * width + turn) if APART else turn
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        safe = tl.minimum(row, rows - 1)
        g_lane = (safe // cells).to(tl.int64)[None, :] * stride + cls[:, None]
        on = operand_jit(tl.load(on_ptr + g_lane, mask=known, other=0.0), UPCAST)
        bits = tl.load(bits_ptr + (safe // 32).to(tl.int64)[None, :] * stride + cls[:, None], mask=known, other=0)
        positive = ((bits >> (safe % 32)[None, :]) & 1) != 0
        x_ptrs = features_ptr + safe.to(tl.int64)[:, None] * channels + k[None, :]
        x = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=k[None, :] < channels, other=0.0)
        if APART:
            share = tl.where(positive & (row < rows)[None, :], on, 0.0).to(on.dtype)
        else:
            off = operand_jit(tl.load(off_ptr + g_lane, mask=known, other=0.0), UPCAST)
            share = tl.where((row < rows)[None, :], tl.where(positive, on, off), 0.0).to(on.dtype)
        acc = tl.dot(share, operand_jit(x, UPCAST), acc, input_precision=PRECISION)
        if tile_k == 0:
            acc_bias += tl.sum(share.to(tl.float32), 1)
    if SCALED:
        scale = tl.load(scale_ptr)
        acc = acc * scale
        acc_bias = acc_bias * scale
    place = weight_ptr + part.to(tl.int64) * part_stride + cls.to(tl.int64)[:, None] * channels + k[None, :]
    tl.store(place, acc.to(weight_ptr.dtype.element_ty), mask=(cls < classes)[:, None] & (k < channels)[None, :])
    if tile_k == 0:
        tl.store(bias_ptr + part.to(tl.int64) * part_stride + cls, acc_bias, mask=cls < classes)


@jit
def _cam_pool_sum_kernel(part_ptr, weight_ptr, bias_ptr, weights, classes, splits, part_stride, BLOCK: tl.constexpr):
    """Gradients of weights and bias from their parts, part after part.

    Args:
        part_ptr: fp32 [splits, part_stride], of a part the weights' first, then the bias's.
        weight_ptr: [weights], all of them; bias_ptr: fp32 [classes].
    """
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = lane < weights + classes
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, splits):
        total += tl.load(part_ptr + part * part_stride.to(tl.int64) + lane, mask=there, other=0.0)
    tl.store(weight_ptr + lane, total.to(weight_ptr.dtype.element_ty), mask=lane < weights)
    tl.store(bias_ptr + (lane - weights), total, mask=there & (lane >= weights))


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


@torch.library.custom_op("spml::cam_pool_backward", mutates_args=())
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
        APART=launch.apart,
        SCALED=scaled,
        BLOCK=SHARES_BLOCK,
        num_warps=4,
        **LAUNCH,
    )
    flags = off
    if launch.apart:
        down, across = cdiv(rows, SKIP), cdiv(classes, SKIP)
        flags = torch.empty(down, across, dtype=torch.int8, device=features.device)
        _cam_pool_flags_kernel[(down, cdiv(across, SQUARES))](
            bits, flags, len(bits), stride, across, SIDE=SKIP, SQUARES=SQUARES, num_warps=4, **LAUNCH
        )
    if want_x:
        tiles = launch.d_features
        # Read with APART alone.
        mean, steps, count = off, bits, bits
        if launch.apart:
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
            steps.shape[1] if launch.apart else cdiv(classes, tiles.classes),
            APART=launch.apart,
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
    if launch.apart:
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
        steps.shape[1] if launch.apart else cdiv(rows, tiles.rows),
        splits,
        part_stride,
        APART=launch.apart,
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


def aot_cases(arch: int) -> Iterator[Case]:
    """The two products for compiles without a GPU."""
    for shape in aot_shapes(arch):
        launch, data = shape.launch, shape.pointer
        common: dict[str, Any] = {"APART": launch.apart, "SCALED": shape.kind == torch.float16}
        shares: dict[str, str | tuple[str, ...]] = {"off_ptr": data, "on_ptr": data, "bits_ptr": "*i32"}
        lists: dict[str, str | tuple[str, ...]] = {"scale_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32"}
        # fp16's mean part is made in fp32.
        mean = "*fp32" if shape.kind == torch.float16 else data
        yield Case(
            "cam_pool dX",
            shape.name,
            _cam_pool_dx_kernel,
            {**shares, "weight_ptr": data, "mean_ptr": mean, **lists, "out_ptr": data, **shape.types, "width": "i32"},
            {
                **common,
                "EVEN": shape.channels % launch.d_features.channels == 0,
                **constants(shape.kind, launch.d_features),
            },
            (*shares, "weight_ptr", "mean_ptr", "out_ptr", *shape.aligned),
            launch.d_features.warps,
            launch.d_features.stages,
            tensor_cores=True,
        )
        whole = data if launch.splits == 1 else "*fp32"
        yield Case(
            "cam_pool dW",
            shape.name,
            _cam_pool_dw_kernel,
            {
                **shares,
                "features_ptr": data,
                "pooled_ptr": data,
                **lists,
                "weight_ptr": whole,
                "bias_ptr": "*fp32",
                **shape.types,
                "width": "i32",
                "splits": "i32",
                "part_stride": "i32",
            },
            {
                **common,
                "EVEN": shape.channels % launch.d_weight.channels == 0,
                **constants(shape.kind, launch.d_weight),
            },
            (*shares, "features_ptr", "pooled_ptr", "weight_ptr", "bias_ptr", "part_stride", *shape.aligned),
            launch.d_weight.warps,
            launch.d_weight.stages,
            tensor_cores=True,
        )
