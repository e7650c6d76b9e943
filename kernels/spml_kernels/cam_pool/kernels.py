"""The kernels of cam_pool.

Forward: a tiled product whose tiles are summed over images, once with a program a tile and once with programs that take
tile after tile; the same sums of a map that a product elsewhere has made; and the sums across tiles. Backward: the
gradient of the map, a chunk at a time, for two products elsewhere.
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
def _add_image(cam, sums, sums_relu, image, corner, left, first, cells, WIDTH: tl.constexpr, IMAGES: tl.constexpr):
    """Add those of the `left` cells from `corner` on that belong to this image."""
    place = tl.arange(0, WIDTH)
    begin = image * cells - corner
    inside = ((place >= begin) & (place < tl.minimum(begin + cells, left)))[None, :]
    same_image = (tl.arange(0, IMAGES) == image - first)[None, :]
    here = tl.where(inside, cam, 0.0)
    sums += tl.where(same_image, tl.sum(here, 1)[:, None], 0.0)
    sums_relu += tl.where(same_image, tl.sum(at_least_jit(here, 0.0), 1)[:, None], 0.0)
    return sums, sums_relu


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
    """Add WIDTH cells of the map, from cell `corner` on, to the sums of their images; store their signs.

    TOUCHED: most images among these cells, 0 to find out; nothing is done for images that are not there.
    """
    place = tl.arange(0, WIDTH)
    left = tl.minimum(rows - corner, WIDTH)
    if BITS:
        # What lies past the last cell or class is cut off word by word: a test for every cell costs more.
        lanes = tl.reshape(tl.where(cam > 0, (1 << (place & 31))[None, :], 0), (BLOCK_C, WIDTH // 32, 32))
        word = tl.arange(0, WIDTH // 32)
        number = left - 32 * word
        known = tl.where(number >= 32, -1, (1 << tl.maximum(tl.minimum(number, 31), 0)) - 1)
        signs = tl.sum(lanes, 2) & tl.where((cls < classes)[:, None], known[None, :], 0)
        target = bits_ptr + (corner // 32 + word).to(tl.int64)[None, :] * stride + cls[:, None]
        tl.store(target, signs, mask=(cls < stride)[:, None] & (number > 0)[None, :])
    image = corner // cells
    turns = tl.cdiv(corner + left, cells) - image
    if TOUCHED == 0:
        for turn in range(0, turns):
            sums, sums_relu = _add_image(cam, sums, sums_relu, image + turn, corner, left, first, cells, WIDTH, IMAGES)
    else:
        for turn in tl.static_range(TOUCHED):
            if turn < turns:
                sums, sums_relu = _add_image(
                    cam, sums, sums_relu, image + turn, corner, left, first, cells, WIDTH, IMAGES
                )
    return sums, sums_relu


@jit
def _end_tile(
    acc,
    bias_ptr,
    mean_ptr,
    relu_ptr,
    part_ptr,
    bits_ptr,
    tile_r,
    first_cls,
    rows,
    classes,
    cells,
    stride,
    scale,
    IMAGES: tl.constexpr,
    SLICES: tl.constexpr,
    TOUCHED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the images of one tile of the map [BLOCK_C, BLOCK_R], bias added here; stores them and the signs.

    Its arguments are those of the kernels.
    """
    start = tile_r * BLOCK_R
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
def _place_jit(number, tiles_r, tiles_c, GROUP: tl.constexpr):
    """Which tile of cells and which of classes has this number.

    A few row tiles meet all class tiles before the next few, so that operands are found in the level-2 cache.
    """
    first_r = number // (GROUP * tiles_c) * GROUP
    width = tl.minimum(tiles_r - first_r, GROUP)
    return first_r + number % (GROUP * tiles_c) % width, number % (GROUP * tiles_c) // width


@jit(do_not_specialize=["rows"])
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
    IMAGES: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the map (classes by cells), summed over the cells of each image.

    Args:
        features_ptr: [rows, channels]; weight_ptr: [classes, channels]; bias_ptr: fp32 [classes].
        mean_ptr, relu_ptr: fp32 [B, classes], of images that lie within one tile.
        part_ptr: fp32 [tiles, 2, 2, classes]: of each tile the image that began before it (0) and the one that goes
            on after it (1); sums of M and of relu M.
        bits_ptr: int32 [words, stride], the signs; classes past the last are 0.
        scale: 1 / cells.
        SLICES: parts of the tile that are reduced one after the other, to hold fewer values at a time.
    """
    tile_r, tile_c = _place_jit(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.cdiv(classes, BLOCK_C), GROUP)
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
        acc = tl.dot(operand_jit(w, UPCAST), operand_jit(x, UPCAST), acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K

    _end_tile(
        acc,
        bias_ptr,
        mean_ptr,
        relu_ptr,
        part_ptr,
        bits_ptr,
        tile_r,
        first_cls,
        rows,
        classes,
        cells,
        stride,
        scale,
        IMAGES,
        SLICES,
        0,
        BITS,
        BLOCK_R,
        BLOCK_C,
    )


@jit(do_not_specialize=["rows"])
def _cam_pool_persistent_kernel(
    features_tiles,
    weight_tiles,
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
    IMAGES: tl.constexpr,
    SLICES: tl.constexpr,
    TOUCHED: tl.constexpr,
    BITS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `_cam_pool_fwd_kernel`, with operands copied by the tensor copy engine, several tiles a program.

    Args:
        features_tiles, weight_tiles: descriptors of [rows, channels] in tiles [BLOCK_R, BLOCK_K], and of
            [classes, channels] in tiles [BLOCK_C, BLOCK_K]. What lies beyond the end is read as 0.
        TOUCHED: most images that a slice touches. Both loops become one, so that the next tile's operands are copied
            during a tile's sums, and that can hold no third loop.
    """
    # Without this the compiler makes all of it a second time, for no channels.
    tl.assume(channels > 0)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    tiles_c = tl.cdiv(classes, BLOCK_C)
    for number in tl.range(tl.program_id(0), tiles_r * tiles_c, tl.num_programs(0), flatten=True):
        tile_r, tile_c = _place_jit(number, tiles_r, tiles_c, GROUP)
        acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for k0 in range(0, channels, BLOCK_K):
            x = features_tiles.load([tile_r * BLOCK_R, k0])
            w = weight_tiles.load([tile_c * BLOCK_C, k0])
            acc = tl.dot(operand_jit(w, UPCAST), operand_jit(x, UPCAST).T, acc)
        _end_tile(
            acc,
            bias_ptr,
            mean_ptr,
            relu_ptr,
            part_ptr,
            bits_ptr,
            tile_r,
            tile_c * BLOCK_C,
            rows,
            classes,
            cells,
            stride,
            scale,
            IMAGES,
            SLICES,
            TOUCHED,
            BITS,
            BLOCK_R,
            BLOCK_C,
        )


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


@jit(do_not_specialize=["rows", "first", "number"])
def _cam_pool_reduce_kernel(
    map_ptr,
    bias_ptr,
    mean_ptr,
    relu_ptr,
    part_ptr,
    bits_ptr,
    rows,
    first,
    number,
    map_stride,
    classes,
    cells,
    stride,
    scale,
    IMAGES: tl.constexpr,
    SLICES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As the forward kernel, from products that are in memory.

    Args:
        map_ptr: [number, map_stride], products of the cells from `first` on, without bias; columns past the last class
            may hold anything.
        first: a multiple of BLOCK_R.
        number: of these cells; the last chunk may have fewer than others.
        The other arguments are those of `_cam_pool_fwd_kernel`.
    """
    # Rows of signs are written to their end.
    tiles = tl.cdiv(stride, BLOCK_C)
    tile_r = tl.program_id(0) // tiles
    first_cls = tl.program_id(0) % tiles * BLOCK_C
    lane = first_cls + tl.arange(0, BLOCK_C)
    row = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    place = map_ptr + row.to(tl.int64)[None, :] * map_stride + lane[:, None]
    # Rows are read whole: their length is a multiple of what one load takes, the number of classes need not be.
    acc = tl.load(place, mask=(row < number)[None, :] & (lane < map_stride)[:, None], other=0.0)
    _end_tile(
        acc,
        bias_ptr,
        mean_ptr,
        relu_ptr,
        part_ptr,
        bits_ptr,
        first // BLOCK_R + tile_r,
        first_cls,
        rows,
        classes,
        cells,
        stride,
        scale,
        IMAGES,
        SLICES,
        0,
        BITS,
        BLOCK_R,
        BLOCK_C,
    )


@jit(do_not_specialize=["first", "number", "rows"])
def _cam_pool_expand_kernel(
    mean_ptr,
    relu_ptr,
    scale_ptr,
    bits_ptr,
    out_ptr,
    part_ptr,
    first,
    number,
    rows,
    classes,
    cells,
    stride,
    out_stride,
    share,
    SCALED: tl.constexpr,
    TOUCHED: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the map in LINES * 32 cells of a chunk and BLOCK classes, and its sum over these cells.

    Args:
        mean_ptr, relu_ptr: fp32 [B, classes], gradients of the two means.
        scale_ptr: fp32 [], what to divide by (with SCALED).
        bits_ptr: int32 [words, stride], the signs.
        out_ptr: [number, out_stride], of the cells from `first` on; 0 past the last class.
        part_ptr: fp32 [cdiv(rows, LINES * 32), classes], sums without the scale.
        first: a multiple of LINES * 32.
        number: cells of the chunk; rows: all of them.
        share: 1 / cells.
        TOUCHED: most images that 32 consecutive cells lie in.
    """
    line = tl.program_id(0) * LINES
    cls = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cls < classes
    factor = share / tl.load(scale_ptr) if SCALED else share
    images = rows // cells
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(0, LINES):
        row = (line + turn) * 32 + tl.arange(0, 32)
        known = row < number
        # One word holds the signs of all 32 cells of a class.
        word = (first // 32 + line + turn).to(tl.int64)
        there = cls < tl.where((line + turn) * 32 < number, classes, 0)
        bits = tl.load(bits_ptr + word * stride + cls, mask=there, other=0)
        positive = ((bits[None, :] >> tl.arange(0, 32)[:, None]) & 1) != 0
        begin = (first + (line + turn) * 32) // cells
        grad = tl.zeros((32, BLOCK), tl.float32)
        for step in tl.static_range(TOUCHED):
            image = begin + step
            place = image.to(tl.int64) * classes + cls
            there = cls < tl.where(image < images, classes, 0)
            mean = tl.load(mean_ptr + place, mask=there, other=0.0)
            both = mean + tl.load(relu_ptr + place, mask=there, other=0.0)
            here = (known & ((first + row) // cells == image))[:, None]
            grad = tl.where(here, tl.where(positive, both[None, :], mean[None, :]), grad)
        total += tl.sum(grad, 0)
        # Rows of scratch are multiples of 16 elements, and written whole, so that stores are 128 bits wide.
        place = out_ptr + row.to(tl.int64)[:, None] * out_stride + cls[None, :]
        value = (grad * factor).to(out_ptr.dtype.element_ty)
        tl.store(place, value, mask=known[:, None] & (cls < out_stride)[None, :])
    part = (first // (LINES * 32) + tl.program_id(0)).to(tl.int64)
    tl.store(part_ptr + part * classes + cls, total * share, mask=inside)
