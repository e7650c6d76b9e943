"""Kernels of cam_pool's backward that leave out classes without a positive cell.

A word is the signs of 32 cells of one class; a line is the words of all classes. Two kernels look for words that are
not 0 and write down where; two multiply what is written down. Every list has its one writer and a fixed order.
"""

from __future__ import annotations

from spml_kernels.cam_pool.kernels import operand_jit
from spml_kernels.common.jit import jit, tl


@jit
def _ones_jit(words):
    """How many bits of each word are set."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words += words >> 8
    return (words + (words >> 16)) & 63


@jit
def _first_bits_jit(number):
    """A word whose first `number` bits are set, 0 to 32 of them."""
    return tl.where(number >= 32, -1, (1 << tl.maximum(tl.minimum(number, 31), 0)) - 1)


@jit(do_not_specialize=["rows"])
def _cam_pool_count_kernel(
    relu_ptr,
    bits_ptr,
    number_ptr,
    part_ptr,
    rows,
    classes,
    cells,
    stride,
    share,
    TOUCHED: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Positive cells of BLOCK classes in a chunk of LINES lines, and what they add to the bias's gradient.

    Args:
        relu_ptr: fp32 [B, classes], gradient of mean(relu M).
        bits_ptr: int32 [lines, stride], the signs; 0 past the last cell.
        number_ptr: int32 [chunks, classes].
        part_ptr: fp32 [chunks, classes].
        rows: cells of all images; cells: of one.
        share: 1 / cells.
        TOUCHED: most images that a line lies in.
    """
    chunk = tl.program_id(0)
    cls = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cls < classes
    images = rows // cells
    number = tl.zeros((BLOCK,), tl.int32)
    part = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, tl.minimum(LINES, tl.cdiv(rows, 32) - chunk * LINES)):
        line = chunk * LINES + step
        words = tl.load(bits_ptr + line.to(tl.int64) * stride + cls, mask=inside, other=0)
        begin = line * 32 // cells
        for turn in tl.static_range(TOUCHED):
            image = begin + turn
            # Of the line's cells those of this image.
            before = image * cells - line * 32
            own = words & _first_bits_jit(before + cells) & ~_first_bits_jit(before)
            there = cls < tl.where(image < images, classes, 0)
            grad = tl.load(relu_ptr + image.to(tl.int64) * classes + cls, mask=there, other=0.0)
            ones = _ones_jit(own)
            number += ones
            # The gradient of an image without a positive cell is not looked at, whatever it is.
            part += tl.where(ones > 0, grad * ones, 0.0)
    place = chunk.to(tl.int64) * classes + cls
    tl.store(number_ptr + place, number, mask=inside)
    tl.store(part_ptr + place, part * share, mask=inside)


@jit(do_not_specialize=["lines"])
def _cam_pool_list_kernel(bits_ptr, list_ptr, number_ptr, lines, stride, BLOCK: tl.constexpr):
    """Which classes have a positive cell in a tile of two lines, in ascending order.

    Args:
        bits_ptr: int32 [lines, stride], 0 past the last class, so that rows can be read whole and loads are wide.
        list_ptr: int16 or int32 [tiles, stride], of which only the beginning is written.
        number_ptr: int32 [tiles], how long that is.
        lines: of all images.
    """
    tile = tl.program_id(0)
    line = tile.to(tl.int64) * 2
    number = 0
    for first in range(0, stride, BLOCK):
        cls = first + tl.arange(0, BLOCK)
        place = bits_ptr + line * stride + cls
        words = tl.load(place, mask=cls < stride, other=0)
        if tile * 2 + 1 < lines:
            words |= tl.load(place + stride, mask=cls < stride, other=0)
        here = (words != 0).to(tl.int32)
        target = list_ptr + tile.to(tl.int64) * stride + number + tl.cumsum(here, 0) - 1
        tl.store(target, cls, mask=here > 0)
        number += tl.sum(here, 0)
    tl.store(number_ptr + tile, number)


@jit(do_not_specialize=["lines"])
def _cam_pool_lines_kernel(
    bits_ptr,
    order_ptr,
    sorted_ptr,
    list_ptr,
    number_ptr,
    lines,
    classes,
    stride,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which lines of a chunk have a positive cell of one of BLOCK classes, in ascending order.

    Args:
        bits_ptr: int32 [lines, stride].
        order_ptr: int64 [chunks, classes], classes by positive cells of the chunk, most first.
        sorted_ptr: int32 [chunks, classes], how many these are.
        list_ptr: int32 [chunks, blocks, LINES], of which only beginnings are written.
        number_ptr: int32 [chunks, blocks], how long these are; 0 for classes without a positive cell.
        lines: of all images.
        LINES: of a chunk; STEP: looked at together.
    """
    chunk, block = tl.program_id(0), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < classes
    there = tl.load(sorted_ptr + chunk.to(tl.int64) * classes + place, mask=inside, other=0) > 0
    cls = tl.load(order_ptr + chunk.to(tl.int64) * classes + place, mask=there, other=0)
    slot = chunk * tl.num_programs(1) + block
    number = 0
    stop = tl.minimum((chunk + 1) * LINES, lines)
    for first in range(chunk * LINES, tl.where(tl.max(there.to(tl.int32), 0) > 0, stop, 0), STEP):
        line = first + tl.arange(0, STEP)
        words = tl.load(
            bits_ptr + line.to(tl.int64)[None, :] * stride + cls[:, None],
            mask=there[:, None] & (line < stop)[None, :],
            other=0,
        )
        here = tl.max((words != 0).to(tl.int32), 0)
        target = list_ptr + slot.to(tl.int64) * LINES + number + tl.cumsum(here, 0) - 1
        tl.store(target, line, mask=here > 0)
        number += tl.sum(here, 0)
    tl.store(number_ptr + slot, number)


@jit(do_not_specialize=["rows"])
def _cam_pool_sparse_x_kernel(
    relu_ptr,
    base_ptr,
    scale_ptr,
    bits_ptr,
    weight_ptr,
    list_ptr,
    number_ptr,
    out_ptr,
    rows,
    classes,
    channels,
    cells,
    stride,
    share,
    SCALED: tl.constexpr,
    TOUCHED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the features in a tile of two lines and BLOCK_K channels, over the classes of its list.

    Args:
        relu_ptr: fp32 [B, classes], gradient of mean(relu M).
        base_ptr: fp32 [B, channels], what every cell of an image has, by the gradient of mean(M).
        scale_ptr: fp32 [], what operands are divided by and products multiplied by (with SCALED).
        bits_ptr: int32 [lines, stride]; weight_ptr: [classes, channels].
        list_ptr, number_ptr: from `_cam_pool_list_kernel`.
        out_ptr: [rows, channels].
        share: 1 / cells.
        TOUCHED: most images that a tile lies in.
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, 64)
    start = tile * 64
    row = start + lane
    image = row // cells
    begin = start // cells
    peak = tl.load(scale_ptr) if SCALED else 1.0
    number = tl.load(number_ptr + tile)
    acc = tl.zeros((64, BLOCK_K), tl.float32)
    for step in range(0, tl.cdiv(number, BLOCK_C)):
        place = step * BLOCK_C + tl.arange(0, BLOCK_C)
        there = place < number
        cls = tl.load(list_ptr + tile.to(tl.int64) * stride + place, mask=there, other=0).to(tl.int32)
        word = bits_ptr + tile.to(tl.int64) * 2 * stride + cls
        upper = tl.load(word, mask=there, other=0)
        lower = tl.load(word + stride, mask=place < tl.where(start + 32 < rows, number, 0), other=0)
        words = tl.where((lane < 32)[:, None], upper[None, :], lower[None, :])
        grad = tl.zeros((64, BLOCK_C), tl.float32)
        for turn in tl.static_range(TOUCHED):
            here = begin + turn
            known = place < tl.where(here * cells < rows, number, 0)
            part = tl.load(relu_ptr + here.to(tl.int64) * classes + cls, mask=known, other=0.0)
            if SCALED:
                part /= peak
            grad = tl.where((image == here)[:, None], part[None, :], grad)
        positive = ((words >> (lane & 31)[:, None]) & 1) != 0
        grad = tl.where(positive, grad, 0.0).to(weight_ptr.dtype.element_ty)
        source = weight_ptr + cls.to(tl.int64)[:, None] * channels + k[None, :]
        weight = operand_jit(tl.load(source, mask=there[:, None] & (k < channels)[None, :], other=0.0), UPCAST)
        acc = tl.dot(operand_jit(grad, UPCAST), weight, acc, input_precision=PRECISION)
    mask = (row < rows)[:, None] & (k < channels)[None, :]
    base = tl.load(base_ptr + image.to(tl.int64)[:, None] * channels + k[None, :], mask=mask, other=0.0)
    result = ((acc + base) * (peak * share)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * channels + k[None, :], result, mask=mask)


@jit(do_not_specialize=["chunk", "rows"])
def _cam_pool_sparse_w_kernel(
    relu_ptr,
    scale_ptr,
    bits_ptr,
    features_ptr,
    order_ptr,
    sorted_ptr,
    list_ptr,
    number_ptr,
    sum_ptr,
    chunk,
    rows,
    classes,
    channels,
    cells,
    stride,
    share,
    SCALED: tl.constexpr,
    TOUCHED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add a chunk's part to the gradient of the weights, in BLOCK_C classes of its order and BLOCK_K channels.

    Args:
        relu_ptr: fp32 [B, classes], gradient of mean(relu M).
        scale_ptr: fp32 [], what operands are divided by and products multiplied by (with SCALED).
        bits_ptr: int32 [lines, stride]; features_ptr: [rows, channels].
        order_ptr, sorted_ptr, list_ptr, number_ptr: as in `_cam_pool_lines_kernel`.
        sum_ptr: fp32 [classes, channels]; a class is in one program's block only, so nobody else adds to it.
        chunk: which one.
        share: 1 / cells.
        TOUCHED: most images that a line lies in.
        LINES: of a chunk.
    """
    tiles_k = tl.cdiv(channels, BLOCK_K)
    block = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = chunk * tl.cdiv(classes, BLOCK_C) + block
    number = tl.load(number_ptr + slot)
    if number > 0:
        place = block * BLOCK_C + tl.arange(0, BLOCK_C)
        entry = chunk.to(tl.int64) * classes + place
        there = tl.load(sorted_ptr + entry, mask=place < classes, other=0) > 0
        cls = tl.load(order_ptr + entry, mask=there, other=0)
        peak = tl.load(scale_ptr) if SCALED else 1.0
        images = rows // cells
        lane = tl.arange(0, 32)
        acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for step in range(0, number):
            line = tl.load(list_ptr + slot.to(tl.int64) * LINES + step)
            row = line * 32 + lane
            words = tl.load(bits_ptr + line.to(tl.int64) * stride + cls, mask=there, other=0)
            begin = line * 32 // cells
            grad = tl.zeros((BLOCK_C, 32), tl.float32)
            for turn in tl.static_range(TOUCHED):
                here = begin + turn
                known = there & (here < images)
                part = tl.load(relu_ptr + here.to(tl.int64) * classes + cls, mask=known, other=0.0)
                if SCALED:
                    part /= peak
                grad = tl.where((row // cells == here)[None, :], part[:, None], grad)
            positive = ((words[:, None] >> lane[None, :]) & 1) != 0
            grad = tl.where(positive, grad, 0.0).to(features_ptr.dtype.element_ty)
            source = features_ptr + row.to(tl.int64)[:, None] * channels + k[None, :]
            mask = (row < rows)[:, None] & (k < channels)[None, :]
            features = operand_jit(tl.load(source, mask=mask, other=0.0), UPCAST)
            acc = tl.dot(operand_jit(grad, UPCAST), features, acc, input_precision=PRECISION)
        target = sum_ptr + cls[:, None] * channels + k[None, :]
        mask = there[:, None] & (k < channels)[None, :]
        before = tl.load(target, mask=mask, other=0.0)
        tl.store(target, before + acc * (peak * share), mask=mask)
