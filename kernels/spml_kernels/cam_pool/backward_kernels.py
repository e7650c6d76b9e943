"""The kernels of cam_pool's gradients: what each cell hands on, lists of tiles with a positive cell, two products."""

from __future__ import annotations

from spml_kernels.cam_pool.tiles import operand_jit
from spml_kernels.common.jit import jit, tl


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
    SKIP_EMPTY: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a cell hands on, by image and class, as the products' operands.

    Args:
        mean_ptr, relu_ptr: fp32 [B, classes], gradients of the two means.
        scale_ptr: fp32 [], what to divide by (with SCALED).
        off_ptr, on_ptr: [B, stride], of a cell that is not positive and of one that is; 0 past the last class. With
            SKIP_EMPTY the mean part, which all cells have, and the boosted part, which only positive ones have.
        share: 1 / cells.
    """
    image = tl.program_id(0).to(tl.int64)
    cls = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + image * classes + cls, mask=cls < classes, other=0.0) * share
    relu = tl.load(relu_ptr + image * classes + cls, mask=cls < classes, other=0.0) * share
    if SCALED:
        factor = 1.0 / tl.load(scale_ptr)
        mean, relu = mean * factor, relu * factor
    inside = cls < stride
    tl.store(off_ptr + image * stride + cls, mean.to(off_ptr.dtype.element_ty), mask=inside)
    on = relu if SKIP_EMPTY else mean + relu
    tl.store(on_ptr + image * stride + cls, on.to(on_ptr.dtype.element_ty), mask=inside)


@jit
def _cam_pool_flags_kernel(bits_ptr, flags_ptr, words, stride, width, SIDE: tl.constexpr, SQUARES: tl.constexpr):
    """Which squares of SIDE cells by SIDE classes hold a positive cell.

    Args:
        bits_ptr: int32 [words, stride].
        flags_ptr: int8 [squares of cells, width].
    """
    down = tl.program_id(0)
    cls = tl.program_id(1) * SQUARES * SIDE + tl.arange(0, SQUARES * SIDE)
    signs = tl.zeros((SQUARES * SIDE,), tl.int32)
    for turn in tl.static_range(SIDE // 32):
        word = down * (SIDE // 32) + turn + tl.zeros_like(cls)
        place = bits_ptr + word.to(tl.int64) * stride + cls
        signs = signs | tl.load(place, mask=(cls < stride) & (word < words), other=0)
    hit = tl.max(tl.reshape((signs != 0).to(tl.int32), (SQUARES, SIDE)), 1)
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
    SKIP_EMPTY: tl.constexpr,
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
        mean_ptr: [B, channels], with SKIP_EMPTY the mean part, the same for all cells of an image.
        list_ptr: int32 [row tiles, width], with SKIP_EMPTY the steps of classes with a positive cell; count_ptr: int32
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
    number = tl.load(count_ptr + tile_r) if SKIP_EMPTY else width
    for turn in range(0, number):
        step = tl.load(list_ptr + tile_r * width + turn) if SKIP_EMPTY else turn
        cls = step * BLOCK_C + tl.arange(0, BLOCK_C)
        bits = tl.load(b_ptrs + cls[None, :])
        on = operand_jit(tl.load(on_ptr + g_lane + cls[None, :]), UPCAST)
        w_ptrs = weight_ptr + tl.minimum(cls, classes - 1).to(tl.int64)[:, None] * channels + k[None, :]
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=k[None, :] < channels, other=0.0)
        if SKIP_EMPTY:
            share = tl.where(((bits >> shift) & 1) != 0, on, 0.0).to(on.dtype)
        else:
            off = operand_jit(tl.load(off_ptr + g_lane + cls[None, :]), UPCAST)
            share = tl.where(((bits >> shift) & 1) != 0, on, off)
        acc = tl.dot(share, operand_jit(w, UPCAST), acc, input_precision=PRECISION)
    if SCALED:
        acc = acc * tl.load(scale_ptr)
    inside = (row < rows)[:, None] & (k < channels)[None, :]
    if SKIP_EMPTY:
        mean = tl.load(mean_ptr + image[:, None] * channels + k[None, :], mask=inside, other=0.0)
        acc += mean.to(tl.float32)
    place = out_ptr + row.to(tl.int64)[:, None] * channels + k[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=inside)


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
    SKIP_EMPTY: tl.constexpr,
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
        pooled_ptr: [B, channels], with SKIP_EMPTY the mean features, whose product the first part begins with.
        list_ptr: int32 [class tiles, width], with SKIP_EMPTY the steps of cells with a positive one; count_ptr: int32
            [class tiles], how many.
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
    if SKIP_EMPTY:
        images = rows // cells
        for first in range(0, tl.where(part == 0, images, 0), BLOCK_R):
            image = first + tl.arange(0, BLOCK_R)
            safe = tl.minimum(image, images - 1).to(tl.int64)
            existing = known & (image < images)[None, :]
            mean = tl.load(off_ptr + safe[None, :] * stride + cls[:, None], mask=existing, other=0.0)
            x = tl.load(pooled_ptr + safe[:, None] * channels + k[None, :], mask=(k < channels)[None, :], other=0.0)
            mean = operand_jit(mean, UPCAST)
            acc = tl.dot(mean, operand_jit(x, UPCAST), acc, input_precision=PRECISION)
            if tile_k == 0:
                acc_bias += tl.sum(mean.to(tl.float32), 1)
        # Shares are those of one cell, and mean features stand for all cells of an image.
        acc = acc * cells
        acc_bias = acc_bias * cells
    number = tl.load(count_ptr + tile_c) if SKIP_EMPTY else width
    each = tl.cdiv(number, splits)
    for turn in range(part * each, tl.minimum(part * each + each, number)):
        step = tl.load(list_ptr + tile_c * width + turn) if SKIP_EMPTY else turn
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        safe = tl.minimum(row, rows - 1)
        g_lane = (safe // cells).to(tl.int64)[None, :] * stride + cls[:, None]
        on = operand_jit(tl.load(on_ptr + g_lane, mask=known, other=0.0), UPCAST)
        bits = tl.load(bits_ptr + (safe // 32).to(tl.int64)[None, :] * stride + cls[:, None], mask=known, other=0)
        positive = ((bits >> (safe % 32)[None, :]) & 1) != 0
        x_ptrs = features_ptr + safe.to(tl.int64)[:, None] * channels + k[None, :]
        x = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=k[None, :] < channels, other=0.0)
        if SKIP_EMPTY:
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
    inside = lane < weights + classes
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, splits):
        total += tl.load(part_ptr + part * part_stride.to(tl.int64) + lane, mask=inside, other=0.0)
    tl.store(weight_ptr + lane, total.to(weight_ptr.dtype.element_ty), mask=lane < weights)
    tl.store(bias_ptr + (lane - weights), total, mask=inside & (lane >= weights))
