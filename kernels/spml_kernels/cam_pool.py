"""cam_pool: 1x1 class weights, BoostLU and the spatial mean, without asking for the map.

With M[b,c,p] = <w_c, X[b,p]> + bias_c, BoostLU's logit is mean_p phi(M) = mean(M) + (alpha - 1) mean(relu M)
(spec/boostlu_large_loss.md 1.1), so the two means give the logits of every alpha in one pass.

Forward: a tiled matrix product whose tile of the map is summed over the cells of each picture and dropped; the sums are
themselves products with a 0/1 matrix, so they run on tensor cores. Rows are (picture, cell) pairs, so a tile holds the
end of one picture, whole ones, and the start of another. Sums of whole pictures are final; the two others go to a
buffer of two slots a tile, which a second kernel adds up in a fixed order.
What is kept is one bit per cell, the sign, 32 cells of one class to a word: making the map again instead would be a
fourth product beside the three that forward and backward need anyway, a bit costs 1/16 of a bf16 map.

Backward, with P the sign and g the gradient of mean(relu M) over H W:
    dX = (g_mean W) / H W [pooled, B x K] + (g P) W,   dW = g_mean' mean(X) + (g P)' X,   dbias = sum g_mean + sum g P
g P is made on the fly from bits and g. 64 x 64 squares without a positive cell, most of a trained network's, are left
out of the sums by lists made beforehand. Sums that are split over programs are added in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spml_kernels.aot import Case
from spml_kernels.chunked import cam_pool_chunked
from spml_kernels.dispatch import use_triton
from spml_kernels.heuristics import (
    SKIP,
    WORD,
    CamPoolLaunch,
    Tiles,
    cam_pool_launch,
    next_power_of_two,
    pictures_per_tile,
)
from spml_kernels.jit import INTERPRETED, LAUNCH, cdiv, jit, tl
from spml_kernels.reference.cam_pool import cam_map_reference, cam_pool_reference


def cam_pool(features: Tensor, weight: Tensor, bias: Tensor, boost: bool = True) -> tuple[Tensor, Tensor | None]:
    """The two spatial means of the class activation map.

    Args:
        features: [B, H, W, K], any floating dtype; channels-last feature memory is contiguous in this shape.
        weight: [C, K] class weights.
        bias: [C].
        boost: whether mean(relu M) is needed; without it (alpha 1) no map is computed at all.

    Returns:
        mean(M) [B, C] and mean(relu M) [B, C] (None without `boost`), fp32 (fp64 for fp64 input). Both differentiable;
        the derivative of relu at 0 is 0 (strict ">", as the released code).
    """
    if not use_triton(features):
        return cam_pool_reference(features, weight, bias, boost)
    if not boost:
        pooled = features.flatten(1, 2).mean(1, dtype=torch.float32)
        return torch.nn.functional.linear(pooled, weight.float(), bias.float()), None
    if features.shape[1] * features.shape[2] < MIN_CELLS or weight.shape[0] == 0 or features.shape[3] == 0:
        return cam_pool_chunked(features, weight, bias)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (features, weight, bias))
    mean, relu, _ = cam_pool_op(features, weight, bias, wanted)
    return mean, relu


def cam_map(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps of a few chosen classes per picture.

    Args:
        features: [B, H, W, K].
        weight: [C, K].
        bias: [C].
        classes: int64 [B, N] class ids; -1 gives a map of zeros.

    Returns:
        [B, N, H, W], fp32 (fp64 for fp64 input), signed, bias included.
    """
    return cam_map_reference(features, weight, bias, classes)


# Below this many cells the map is hardly larger than the logits, and a tile would touch very many pictures.
MIN_CELLS = 16


@jit
def _operand(value, UPCAST: tl.constexpr):
    """A tile as an operand of a product. Triton's interpreter multiplies bf16 by its bit patterns, so it gets fp32."""
    return value.to(tl.float32) if UPCAST else value


@jit
def _halves(values):
    """Left and right half of a tile; no value moves to another thread."""
    left, right = tl.split(tl.permute(tl.reshape(values, (values.shape[0], 2, values.shape[1] // 2)), (0, 2, 1)))
    return left, right


@jit
def _slice(values, SLICES: tl.constexpr):
    """A tile cut into 1, 2, 4 or 8 tiles of fewer columns."""
    if SLICES == 1:
        result = (values,)
    else:
        left, right = _halves(values)
        result = _slice(left, SLICES // 2) + _slice(right, SLICES // 2)
    return result


@jit
def _reduce_cells(
    cam,
    sums,
    sums_relu,
    bits_ptr,
    corner,
    first,
    cls,
    rows,
    classes,
    cells,
    stride,
    TOUCHED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    PICTURES: tl.constexpr,
):
    """Add WIDTH cells of the map, from cell `corner` on, to the sums of their pictures; store their signs."""
    row = corner + tl.arange(0, WIDTH)
    if BITS:
        positive = ((cam > 0) & (row < rows)[None, :] & (cls < classes)[:, None]).to(tl.int32)
        lanes = tl.reshape(positive, (BLOCK_C, WIDTH // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = corner // 32 + tl.arange(0, WIDTH // 32)
        target = bits_ptr + word.to(tl.int64)[None, :] * stride + cls[:, None]
        tl.store(target, tl.sum(lanes, 2), mask=(cls < stride)[:, None] & (word < tl.cdiv(rows, 32))[None, :])
    slot = tl.arange(0, PICTURES)
    for turn in range(0, TOUCHED):
        picture = corner // cells + turn
        inside = ((row >= picture * cells) & (row < tl.minimum(picture * cells + cells, rows)))[None, :]
        here = (slot == picture - first)[None, :]
        sums += tl.where(here, tl.sum(tl.where(inside, cam, 0.0), 1)[:, None], 0.0)
        sums_relu += tl.where(here, tl.sum(tl.where(inside, tl.maximum(cam, 0.0), 0.0), 1)[:, None], 0.0)
    return sums, sums_relu


@jit
def _cam_pool_fwd_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    relu_ptr,
    part_ptr,
    bits_ptr,
    rows,
    classes,
    channels,
    cells,
    stride,
    scale,
    PICTURES: tl.constexpr,
    SLICES: tl.constexpr,
    TOUCHED: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the map (classes by cells), summed over the cells of each picture.

    Args:
        features_ptr: [rows, channels]; weight_ptr: [classes, channels]; bias_ptr: fp32 [classes].
        mean_ptr, relu_ptr: fp32 [B, classes], of pictures that lie within one tile.
        part_ptr: fp32 [tiles, 2, 2, classes]: of each tile the picture that began before it (0) and the one that goes
            on after it (1); sums of M and of relu M.
        bits_ptr: int32 [words, stride], the signs; classes past the last are 0.
        scale: 1 / cells.
        SLICES: parts of the tile that are reduced one after the other, to hold fewer values at a time.
    """
    tiles_c = tl.cdiv(classes, BLOCK_C)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    # A few row tiles meet all class tiles before the next few, so that operands are found in the level-2 cache.
    pid = tl.program_id(0)
    first_r = pid // (GROUP * tiles_c) * GROUP
    width = tl.minimum(tiles_r - first_r, GROUP)
    tile_r = first_r + pid % (GROUP * tiles_c) % width
    tile_c = pid % (GROUP * tiles_c) // width

    start = tile_r * BLOCK_R
    first_cls = tile_c * BLOCK_C
    k = tl.arange(0, BLOCK_K)
    # 64-bit addresses of tiles, 32-bit offsets within them: half the registers. Lanes past the end repeat the last row
    # or class and are dropped below: loads need no mask for them.
    x_ptr = features_ptr + start.to(tl.int64) * channels
    w_ptr = weight_ptr + first_cls.to(tl.int64) * channels
    x_lane = tl.minimum(tl.arange(0, BLOCK_R), rows - 1 - start)[None, :] * channels + k[:, None]
    w_lane = tl.minimum(tl.arange(0, BLOCK_C), classes - 1 - first_cls)[:, None] * channels + k[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for k0 in range(0, channels, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptr + x_lane)
            w = tl.load(w_ptr + w_lane)
        else:
            x = tl.load(x_ptr + x_lane, mask=(k0 + k)[:, None] < channels, other=0.0)
            w = tl.load(w_ptr + w_lane, mask=(k0 + k)[None, :] < channels, other=0.0)
        acc = tl.dot(_operand(w, UPCAST), _operand(x, UPCAST), acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K

    cls = first_cls + tl.arange(0, BLOCK_C)
    there = cls < classes
    acc += tl.load(bias_ptr + cls, mask=there, other=0.0)[:, None]
    first = start // cells
    sums = tl.zeros((BLOCK_C, PICTURES), tl.float32)
    sums_relu = tl.zeros((BLOCK_C, PICTURES), tl.float32)
    slices = _slice(acc, SLICES)
    for index in tl.static_range(SLICES):
        sums, sums_relu = _reduce_cells(
            slices[index],
            sums,
            sums_relu,
            bits_ptr,
            start + index * (BLOCK_R // SLICES),
            first,
            cls,
            rows,
            classes,
            cells,
            stride,
            TOUCHED,
            BITS,
            BLOCK_C,
            BLOCK_R // SLICES,
            PICTURES,
        )

    stop = start + BLOCK_R
    picture = first + tl.arange(0, PICTURES)
    begin = picture * cells
    end = begin + cells
    seen = there[:, None] & (begin < tl.minimum(stop, rows))[None, :]
    whole = ((begin >= start) & (end <= stop))[None, :]
    place = picture.to(tl.int64)[None, :] * classes + cls[:, None]
    tl.store(mean_ptr + place, sums * scale, mask=seen & whole)
    tl.store(relu_ptr + place, sums_relu * scale, mask=seen & whole)
    side = tl.where(begin < start, 0, 1)
    place = (tile_r.to(tl.int64) * 2 + side)[None, :] * 2 * classes + cls[:, None]
    tl.store(part_ptr + place, sums, mask=seen & (whole == 0))
    tl.store(part_ptr + place + classes, sums_relu, mask=seen & (whole == 0))


@jit
def _cam_pool_finish_kernel(
    mean_ptr, relu_ptr, part_ptr, classes, cells, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Means of one picture that lies in several tiles, summed tile after tile."""
    picture = tl.program_id(0)
    cls = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = cls < classes
    first = picture * cells // BLOCK_R
    last = (picture * cells + cells - 1) // BLOCK_R
    if last > first:
        place = part_ptr + (first.to(tl.int64) * 2 + 1) * 2 * classes + cls
        total = tl.load(place, mask=there, other=0.0)
        total_relu = tl.load(place + classes, mask=there, other=0.0)
        for turn in range(0, last - first):
            place = part_ptr + (first.to(tl.int64) + 1 + turn) * 4 * classes + cls
            total += tl.load(place, mask=there, other=0.0)
            total_relu += tl.load(place + classes, mask=there, other=0.0)
        out = picture.to(tl.int64) * classes + cls
        tl.store(mean_ptr + out, total * scale, mask=there)
        tl.store(relu_ptr + out, total_relu * scale, mask=there)


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
    grad_ptr,
    bits_ptr,
    weight_ptr,
    pooled_ptr,
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
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the features' gradient (cells by channels), summed over the listed steps of classes.

    Args:
        grad_ptr: [B, stride], gradient of mean(relu M) over cells, in the operands' type, 0 past the last class.
        bits_ptr: int32 [words, stride], 0 past the last class; weight_ptr: [classes, channels].
        pooled_ptr: fp32 [B, channels], the mean part, the same for all cells of a picture.
        scale_ptr: fp32 [], what grad was divided by (with SCALED).
        list_ptr: int32 [row tiles, width], steps of classes with a positive cell; count_ptr: int32 [row tiles].
        out_ptr: [rows, channels].
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile_r = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    safe = tl.minimum(row, rows - 1)
    picture = (safe // cells).to(tl.int64)
    g_ptrs = grad_ptr + picture[:, None] * stride
    b_ptrs = bits_ptr + (safe // 32).to(tl.int64)[:, None] * stride
    shift = (safe % 32)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for turn in range(0, tl.load(count_ptr + tile_r)):
        step = tl.load(list_ptr + tile_r * width + turn)
        cls = step * BLOCK_C + tl.arange(0, BLOCK_C)
        g = tl.load(g_ptrs + cls[None, :])
        bits = tl.load(b_ptrs + cls[None, :])
        w_ptrs = weight_ptr + tl.minimum(cls, classes - 1).to(tl.int64)[:, None] * channels + k[None, :]
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=k[None, :] < channels, other=0.0)
        g = _operand(g, UPCAST)
        boosted = tl.where(((bits >> shift) & 1) != 0, g, 0.0).to(g.dtype)
        acc = tl.dot(boosted, _operand(w, UPCAST), acc, input_precision=PRECISION)
    if SCALED:
        acc = acc * tl.load(scale_ptr)
    there = (row < rows)[:, None] & (k < channels)[None, :]
    acc += tl.load(pooled_ptr + picture[:, None] * channels + k[None, :], mask=there, other=0.0)
    place = out_ptr + row.to(tl.int64)[:, None] * channels + k[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _cam_pool_dw_kernel(
    grad_ptr,
    bits_ptr,
    features_ptr,
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
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the boosted part of the weights' gradient (classes by channels), over a part of the listed cells.

    Args:
        grad_ptr, bits_ptr, scale_ptr: as for the features' gradient; features_ptr: [rows, channels].
        list_ptr: int32 [class tiles, width], steps of cells with a positive one; count_ptr: int32 [class tiles].
        weight_ptr: fp32 [splits, classes, channels]; bias_ptr: fp32 [splits, classes], the sums of the same tile.
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile_c = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    part = tl.program_id(1)
    cls = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    there = (cls < classes)[:, None]
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    number = tl.load(count_ptr + tile_c)
    each = tl.cdiv(number, splits)
    first = part * each
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    acc_bias = tl.zeros((BLOCK_C,), tl.float32)
    for turn in range(first, tl.minimum(first + each, number)):
        step = tl.load(list_ptr + tile_c * width + turn)
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        safe = tl.minimum(row, rows - 1)
        # The last tile of classes may be wider than the rows of the two, which end at a multiple of 64.
        known = cls[:, None] < stride
        g = tl.load(grad_ptr + (safe // cells).to(tl.int64)[None, :] * stride + cls[:, None], mask=known, other=0.0)
        bits = tl.load(bits_ptr + (safe // 32).to(tl.int64)[None, :] * stride + cls[:, None], mask=known, other=0)
        positive = (((bits >> (safe % 32)[None, :]) & 1) != 0) & (row < rows)[None, :]
        x_ptrs = features_ptr + safe.to(tl.int64)[:, None] * channels + k[None, :]
        x = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=k[None, :] < channels, other=0.0)
        g = _operand(g, UPCAST)
        boosted = tl.where(positive, g, 0.0).to(g.dtype)
        acc = tl.dot(boosted, _operand(x, UPCAST), acc, input_precision=PRECISION)
        if tile_k == 0:
            acc_bias += tl.sum(boosted.to(tl.float32), 1)
    if SCALED:
        scale = tl.load(scale_ptr)
        acc = acc * scale
        acc_bias = acc_bias * scale
    place = weight_ptr + (part.to(tl.int64) * classes + cls)[:, None] * channels + k[None, :]
    tl.store(place, acc, mask=there & (k < channels)[None, :])
    if tile_k == 0:
        tl.store(bias_ptr + part.to(tl.int64) * classes + cls, acc_bias, mask=cls < classes)


def compute_dtype(features: Tensor) -> torch.dtype:
    """Type of the products' operands: the features' own. Sums are fp32 in every case."""
    return features.dtype


def _precision(dtype: torch.dtype) -> str:
    # Three products of tf32 parts: fp32's accuracy on tensor cores. Plain tf32 would be Triton's default.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _launch(batch: int, cells: int, classes: int, channels: int, features: Tensor) -> CamPoolLaunch:
    """The block sizes of a call; the interpreter takes Hopper's."""
    major, minor = torch.cuda.get_device_capability(features.device) if features.is_cuda else (9, 0)
    return cam_pool_launch(batch, cells, classes, channels, features.dtype != torch.float32, 10 * major + minor)


def _shared(dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    """Constants that all matrix kernels take."""
    return {
        "PRECISION": _precision(dtype),
        "UPCAST": INTERPRETED and dtype != torch.float32,
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.classes,
        "BLOCK_K": tiles.channels,
    }


# Row tiles that share a sweep over all class tiles.
GROUP = 8
# Class squares of one program of the flags kernel.
SQUARES = 8
# Steps that the list kernel looks at together.
LIST_BLOCK = 128


@torch.library.custom_op("spml::cam_pool", mutates_args=())
def cam_pool_op(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean(M), mean(relu M), and with `keep` the signs int32 [cdiv(B H W, 32), C rounded up to 64] (else empty)."""
    batch, height, width, channels = features.shape
    cells, classes = height * width, len(weight)
    rows, dtype = batch * cells, compute_dtype(features)
    x, w = features.contiguous(), weight.to(dtype).contiguous()
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    mean, relu = torch.empty(batch, classes, **make), torch.empty(batch, classes, **make)
    words = cdiv(rows, WORD) if keep else 0
    stride = cdiv(classes, SKIP) * SKIP
    bits = torch.empty(words, stride, dtype=torch.int32, device=features.device)
    if batch == 0:
        return mean, relu, bits
    launch = _launch(batch, cells, classes, channels, features)
    tiles = launch.forward
    tiles_r, tiles_c = cdiv(rows, tiles.rows), cdiv(classes, tiles.classes)
    split = tiles.rows % cells != 0
    part = torch.empty((tiles_r, 2, 2, classes) if split else (0,), **make)
    _cam_pool_fwd_kernel[(tiles_r * tiles_c,)](
        x,
        w,
        bias.float().contiguous(),
        mean,
        relu,
        part,
        bits,
        rows,
        classes,
        channels,
        cells,
        stride,
        1.0 / cells,
        PICTURES=next_power_of_two(pictures_per_tile(tiles.rows, cells)),
        SLICES=launch.slices,
        TOUCHED=pictures_per_tile(tiles.rows // launch.slices, cells),
        EVEN=channels % tiles.channels == 0,
        BITS=keep,
        GROUP=GROUP,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_shared(dtype, tiles),
        **LAUNCH,
    )
    if split:
        _cam_pool_finish_kernel[(batch, cdiv(classes, 256))](
            mean, relu, part, classes, cells, 1.0 / cells, BLOCK_R=tiles.rows, BLOCK_C=256, num_warps=2, **LAUNCH
        )
    return mean, relu, bits


@cam_pool_op.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _ = features.shape
    mean = features.new_empty((batch, len(weight)), dtype=torch.float32)
    words = (batch * height * width + WORD - 1) // WORD if keep else 0
    stride = (len(weight) + SKIP - 1) // SKIP * SKIP
    return mean, torch.empty_like(mean), features.new_empty((words, stride), dtype=torch.int32)


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
    grad_mean: Tensor, grad_relu: Tensor, features: Tensor, weight: Tensor, bits: Tensor, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias (fp32); those of features or of the two others are empty if unwanted."""
    batch, height, width, channels = features.shape
    cells, classes = height * width, len(weight)
    rows, dtype = batch * cells, compute_dtype(features)
    x, w = features.contiguous(), weight.to(dtype).contiguous()
    grad_mean, share = grad_mean.float(), grad_relu.float() / cells
    d_x = torch.empty(features.shape if want_x else (0,), dtype=features.dtype, device=features.device)
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    if batch == 0:
        shapes = ((classes, channels), (classes,)) if want_w else ((0,), (0,))
        return d_x, torch.zeros(shapes[0], dtype=weight.dtype, device=weight.device), torch.zeros(shapes[1], **make)
    # fp16 cannot hold the tiny gradients of a mean: they are scaled to 1, and the sums scaled back.
    scaled = dtype == torch.float16
    scale = share.abs().amax().clamp(min=1e-30) if scaled else share
    stride = bits.shape[1]
    share = torch.nn.functional.pad((share / scale if scaled else share).to(dtype), (0, stride - classes)).contiguous()

    launch = _launch(batch, cells, classes, channels, features)
    down, across = cdiv(rows, SKIP), cdiv(classes, SKIP)
    flags = torch.empty(down, across, dtype=torch.int8, device=features.device)
    _cam_pool_flags_kernel[(down, cdiv(across, SQUARES))](
        bits, flags, len(bits), stride, across, SIDE=SKIP, SQUARES=SQUARES, num_warps=4, **LAUNCH
    )
    if want_x:
        tiles = launch.d_features
        pooled = grad_mean @ weight.float() / cells
        steps, count = _work_lists(flags, tiles.rows, tiles.classes)
        _cam_pool_dx_kernel[(cdiv(rows, tiles.rows) * cdiv(channels, tiles.channels),)](
            share,
            bits,
            w,
            pooled,
            scale,
            steps,
            count,
            d_x,
            rows,
            classes,
            channels,
            cells,
            stride,
            steps.shape[1],
            EVEN=channels % tiles.channels == 0,
            SCALED=scaled,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **_shared(dtype, tiles),
            **LAUNCH,
        )
    if not want_w:
        return d_x, torch.empty(0, dtype=weight.dtype, device=weight.device), torch.empty(0, **make)
    tiles = launch.d_weight
    steps, count = _work_lists(flags.T, tiles.classes, tiles.rows)
    d_w = torch.empty(launch.splits, classes, channels, **make)
    d_b = torch.empty(launch.splits, classes, **make)
    _cam_pool_dw_kernel[(cdiv(classes, tiles.classes) * cdiv(channels, tiles.channels), launch.splits)](
        share,
        bits,
        x,
        scale,
        steps,
        count,
        d_w,
        d_b,
        rows,
        classes,
        channels,
        cells,
        stride,
        steps.shape[1],
        launch.splits,
        EVEN=channels % tiles.channels == 0,
        SCALED=scaled,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_shared(dtype, tiles),
        **LAUNCH,
    )
    whole = d_w[0] if launch.splits == 1 else d_w.sum(0)
    whole.addmm_(grad_mean.T, x.flatten(1, 2).mean(1, dtype=torch.float32))
    return d_x, whole.to(weight.dtype), d_b.sum(0) + grad_mean.sum(0)


@cam_pool_backward_op.register_fake
def _(
    grad_mean: Tensor, grad_relu: Tensor, features: Tensor, weight: Tensor, bits: Tensor, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = features.new_empty(features.shape if want_x else (0,))
    d_w = weight.new_empty(weight.shape if want_w else (0,))
    return d_x, d_w, weight.new_empty(len(weight) if want_w else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[2])
    # Else zeros of the signs' size would be written for a gradient that nobody reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, weight, output[2])
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad_mean: Tensor | None, grad_relu: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    features, weight, bits = ctx.saved_tensors
    want_x, want_w, want_b = ctx.needs_input_grad[:3]
    shape = (len(features), len(weight))
    grads = [features.new_zeros(shape, dtype=torch.float32) if g is None else g for g in (grad_mean, grad_relu)]
    d_x, d_w, d_b = cam_pool_backward_op(*grads, features, weight, bits, want_x, want_w or want_b)
    return d_x if want_x else None, d_w if want_w else None, d_b.to(ctx.bias_dtype) if want_b else None, None


cam_pool_op.register_autograd(_backward, setup_context=_setup)


# (C, K, cells of a picture, B) of the shapes that matter.
AOT_SHAPES = (
    (10, 96, 64, 64),
    (20, 2048, 196, 16),
    (80, 2048, 196, 128),
    (81, 768, 256, 64),
    (312, 1280, 49, 128),
    (5000, 2048, 196, 128),
    (5000, 512, 1024, 32),
    (9605, 2048, 196, 128),
)


def aot_cases(arch: int) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for classes, channels, cells, batch in AOT_SHAPES:
        for dtype in ("bf16", "fp16", "fp32"):
            if dtype != "bf16" and classes not in (80, 5000):
                continue
            yield from _shape_cases(classes, channels, cells, batch, dtype, arch)


def _shape_cases(classes: int, channels: int, cells: int, batch: int, dtype: str, arch: int) -> Iterator[Case]:
    half = dtype != "fp32"
    launch = cam_pool_launch(batch, cells, classes, channels, half, arch)
    shape = f"{dtype} C {classes} K {channels} HW {cells} B {batch}"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    numbers: dict[str, str | tuple[str, ...]] = {
        "rows": "i32",
        "classes": "i32",
        "channels": "i32",
        "cells": "i32",
        "stride": "i32",
    }
    values = {"rows": batch * cells, "classes": classes, "channels": channels, "cells": cells, "stride": 64}
    aligned = tuple(name for name, value in values.items() if value % 16 == 0)
    data = f"*{dtype}"
    yield Case(
        "cam_pool forward",
        shape,
        _cam_pool_fwd_kernel,
        {
            "features_ptr": data,
            "weight_ptr": data,
            "bias_ptr": "*fp32",
            "mean_ptr": "*fp32",
            "relu_ptr": "*fp32",
            "part_ptr": "*fp32",
            "bits_ptr": "*i32",
            **numbers,
            "scale": "fp32",
        },
        {
            "PICTURES": next_power_of_two(pictures_per_tile(launch.forward.rows, cells)),
            "SLICES": launch.slices,
            "TOUCHED": pictures_per_tile(launch.forward.rows // launch.slices, cells),
            "EVEN": channels % launch.forward.channels == 0,
            "BITS": True,
            "GROUP": GROUP,
            **_shared(kind, launch.forward),
        },
        ("features_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "relu_ptr", "part_ptr", "bits_ptr", *aligned),
        launch.forward.warps,
        launch.forward.stages,
        tensor_cores=True,
    )
    lists: dict[str, str | tuple[str, ...]] = {"scale_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32"}
    signs: dict[str, str | tuple[str, ...]] = {"grad_ptr": data, "bits_ptr": "*i32"}
    yield Case(
        "cam_pool dX",
        shape,
        _cam_pool_dx_kernel,
        {
            **signs,
            "weight_ptr": data,
            "pooled_ptr": "*fp32",
            **lists,
            "out_ptr": data,
            **numbers,
            "width": "i32",
        },
        {
            "EVEN": channels % launch.d_features.channels == 0,
            "SCALED": dtype == "fp16",
            **_shared(kind, launch.d_features),
        },
        ("grad_ptr", "bits_ptr", "weight_ptr", "pooled_ptr", "out_ptr", *aligned),
        launch.d_features.warps,
        launch.d_features.stages,
        tensor_cores=True,
    )
    yield Case(
        "cam_pool dW",
        shape,
        _cam_pool_dw_kernel,
        {
            **signs,
            "features_ptr": data,
            **lists,
            "weight_ptr": "*fp32",
            "bias_ptr": "*fp32",
            **numbers,
            "width": "i32",
            "splits": "i32",
        },
        {
            "EVEN": channels % launch.d_weight.channels == 0,
            "SCALED": dtype == "fp16",
            **_shared(kind, launch.d_weight),
        },
        ("grad_ptr", "bits_ptr", "features_ptr", "weight_ptr", "bias_ptr", *aligned),
        launch.d_weight.warps,
        launch.d_weight.stages,
        tensor_cores=True,
    )
