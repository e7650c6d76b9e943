"""The kernels of cam_pool, forward and backward.

Forward: a tiled product whose tiles are summed over images, mean features beside it, and the sums across tiles.
Backward: what each cell hands on, the lists of squares with a positive cell, the two products, and the sum of parts.
"""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import at_least_jit


@jit
def operand_jit(value, UPCAST: tl.constexpr):
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
    IMAGES: tl.constexpr,
):
    """Add WIDTH cells of the map, from cell `corner` on, to the sums of their images; store their signs."""
    row = corner + tl.arange(0, WIDTH)
    if BITS:
        positive = ((cam > 0) & (row < rows)[None, :] & (cls < classes)[:, None]).to(tl.int32)
        lanes = tl.reshape(positive, (BLOCK_C, WIDTH // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = corner // 32 + tl.arange(0, WIDTH // 32)
        target = bits_ptr + word.to(tl.int64)[None, :] * stride + cls[:, None]
        tl.store(target, tl.sum(lanes, 2), mask=(cls < stride)[:, None] & (word < tl.cdiv(rows, 32))[None, :])
    slot = tl.arange(0, IMAGES)
    for turn in range(0, TOUCHED):
        image = corner // cells + turn
        inside = ((row >= image * cells) & (row < tl.minimum(image * cells + cells, rows)))[None, :]
        same_image = (slot == image - first)[None, :]
        sums += tl.where(same_image, tl.sum(tl.where(inside, cam, 0.0), 1)[:, None], 0.0)
        sums_relu += tl.where(same_image, tl.sum(tl.where(inside, at_least_jit(cam, 0.0), 0.0), 1)[:, None], 0.0)
    return sums, sums_relu


@jit
def _pool_features(
    features_ptr,
    pooled_ptr,
    start,
    rows,
    channels,
    cells,
    scale,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean features of the images that begin in a tile of cells: products with a 0/1 matrix, image by image."""
    first = tl.cdiv(start, cells)
    last = tl.cdiv(tl.minimum(start + BLOCK_R, rows), cells)
    image = first + tl.arange(0, IMAGES)
    begin = (tl.arange(0, IMAGES) * cells)[None, :]
    number = (last - first) * cells
    x_ptr = features_ptr + (first * cells).to(tl.int64) * channels
    for k0 in range(0, channels, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_K, IMAGES), tl.float32)
        for row0 in range(0, number, BLOCK_R):
            row = row0 + tl.arange(0, BLOCK_R)
            inside = (row < number)[None, :] & (k < channels)[:, None]
            x = operand_jit(tl.load(x_ptr + row[None, :] * channels + k[:, None], mask=inside, other=0.0), UPCAST)
            member = (row[:, None] >= begin) & (row[:, None] < begin + cells)
            total = tl.dot(x, member.to(x.dtype), total, input_precision=PRECISION)
        place = pooled_ptr + image.to(tl.int64)[None, :] * channels + k[:, None]
        mean = (total * scale).to(pooled_ptr.dtype.element_ty)
        tl.store(place, mean, mask=(image < last)[None, :] & (k < channels)[:, None])


@jit(do_not_specialize=["rows"])
def _cam_pool_fwd_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    relu_ptr,
    part_ptr,
    bits_ptr,
    pooled_ptr,
    rows,
    classes,
    channels,
    cells,
    stride,
    scale,
    IMAGES: tl.constexpr,
    SLICES: tl.constexpr,
    TOUCHED: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the map (classes by cells), summed over the cells of each image.

    With POOL one program more for every tile of cells makes mean features, while they are in cache.

    Args:
        features_ptr: [rows, channels]; weight_ptr: [classes, channels]; bias_ptr: fp32 [classes].
        mean_ptr, relu_ptr: fp32 [B, classes], of images that lie within one tile.
        part_ptr: fp32 [tiles, 2, 2, classes]: of each tile the image that began before it (0) and the one that goes
            on after it (1); sums of M and of relu M.
        bits_ptr: int32 [words, stride], the signs; classes past the last are 0.
        pooled_ptr: [B, channels], mean features.
        scale: 1 / cells.
        SLICES: parts of the tile that are reduced one after the other, to hold fewer values at a time.
    """
    columns = tl.cdiv(classes, BLOCK_C) + (1 if POOL else 0)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    # A few row tiles meet all class tiles before the next few, so that operands are found in the level-2 cache.
    pid = tl.program_id(0)
    first_r = pid // (GROUP * columns) * GROUP
    width = tl.minimum(tiles_r - first_r, GROUP)
    tile_r = first_r + pid % (GROUP * columns) % width
    tile_c = pid % (GROUP * columns) // width

    start = tile_r * BLOCK_R
    # Two conditions in one would be looked at by the GPU.
    if POOL:  # noqa: SIM102
        if tile_c == columns - 1:
            _pool_features(
                features_ptr,
                pooled_ptr,
                start,
                rows,
                channels,
                cells,
                scale,
                PRECISION,
                UPCAST,
                # As many as a tile can hold the beginnings of; a product takes 16 columns at least.
                IMAGES if IMAGES > 16 else 16,
                BLOCK_R,
                BLOCK_K,
            )
            return
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
        acc = tl.dot(operand_jit(w, UPCAST), operand_jit(x, UPCAST), acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K

    cls = first_cls + tl.arange(0, BLOCK_C)
    inside = cls < classes
    acc += tl.load(bias_ptr + cls, mask=inside, other=0.0)[:, None]
    first = start // cells
    sums = tl.zeros((BLOCK_C, IMAGES), tl.float32)
    sums_relu = tl.zeros((BLOCK_C, IMAGES), tl.float32)
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
            IMAGES,
        )

    stop = start + BLOCK_R
    image = first + tl.arange(0, IMAGES)
    begin = image * cells
    end = begin + cells
    seen = inside[:, None] & (begin < tl.minimum(stop, rows))[None, :]
    whole = ((begin >= start) & (end <= stop))[None, :]
    place = image.to(tl.int64)[None, :] * classes + cls[:, None]
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
    """Means of one image that lies in several tiles, summed tile after tile."""
    image = tl.program_id(0)
    cls = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cls < classes
    first = image * cells // BLOCK_R
    last = (image * cells + cells - 1) // BLOCK_R
    if last > first:
        place = part_ptr + (first.to(tl.int64) * 2 + 1) * 2 * classes + cls
        total = tl.load(place, mask=inside, other=0.0)
        total_relu = tl.load(place + classes, mask=inside, other=0.0)
        for turn in range(0, last - first):
            place = part_ptr + (first.to(tl.int64) + 1 + turn) * 4 * classes + cls
            total += tl.load(place, mask=inside, other=0.0)
            total_relu += tl.load(place + classes, mask=inside, other=0.0)
        out = image.to(tl.int64) * classes + cls
        tl.store(mean_ptr + out, total * scale, mask=inside)
        tl.store(relu_ptr + out, total_relu * scale, mask=inside)


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
        width: steps per line.
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
