"""The kernels of cam_mask: maps of the chosen classes, their normalisation, the masked image."""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl


@jit(do_not_specialize=["chosen"])
def _class_map_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    known_ptr,
    maps_ptr,
    classes,
    chosen,
    cells,
    channels,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Maps of the chosen classes in one block of cells of one image. Nothing is read where there is no class.

    Args:
        features_ptr: [B, cells, channels]; weight_ptr: [C, channels]; bias_ptr: [C].
        ids_ptr: int64 [B, chosen], -1 for none; what is not within 0..classes-1 is none.
        known_ptr: the same shape, ids written with -1 for none.
        maps_ptr: fp32 [B, chosen, cells], not written for none.
    """
    blocks = tl.cdiv(cells, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    # Lanes past the last cell repeat it and are dropped at the end: loads need no mask for them.
    x_lane = tl.minimum(cell, cells - 1)[:, None] * channels + k[None, :]
    if tl.program_id(0) % blocks == 0:
        # By itself, since a loop that does both keeps a number on the stack with some compilers.
        for place in range(0, chosen):
            one = tl.load(ids_ptr + image * chosen + place)
            tl.store(known_ptr + image * chosen + place, tl.where((one >= 0) & (one < classes), one, -1))
    for first in range(0, chosen, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + image * chosen + n, mask=n < chosen, other=-1)
        # An id that is no class would be looked up outside of the weights.
        ids = tl.where((ids >= 0) & (ids < classes), ids, -1)
        if tl.max(ids, 0) >= 0:
            cls = tl.maximum(ids, 0)
            x_ptr = features_ptr + image * cells * channels
            w_ptr = weight_ptr + cls[:, None] * channels + k[None, :]
            acc = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_K), tl.float32)
            for k0 in range(0, channels, BLOCK_K):
                if EVEN:
                    x = tl.load(x_ptr + x_lane).to(tl.float32)
                    w = tl.load(w_ptr).to(tl.float32)
                else:
                    x = tl.load(x_ptr + x_lane, mask=(k0 + k)[None, :] < channels, other=0.0).to(tl.float32)
                    w = tl.load(w_ptr, mask=(k0 + k)[None, :] < channels, other=0.0).to(tl.float32)
                acc += x[None, :, :] * w[:, None, :]
                x_ptr += BLOCK_K
                w_ptr += BLOCK_K
            cam = tl.sum(acc, 2) + tl.load(bias_ptr + cls).to(tl.float32)[:, None]
            place = maps_ptr + (image * chosen + n)[:, None] * cells + cell[None, :]
            tl.store(place, cam, mask=(ids >= 0)[:, None] & (cell < cells)[None, :])


@jit
def _normalise_image_kernel(maps_ptr, out_ptr, ids_ptr, cells, BLOCK: tl.constexpr):
    """One map [cells] that has a class, over its own cells: (M - min) / (max - min), 2 where flat or with a NaN.

    Args:
        maps_ptr: [B * chosen, cells]; out_ptr: fp32 of the same shape, may be the same.
        ids_ptr: int64 [B * chosen].
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ids_ptr + row) >= 0:
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        broken = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, cells, BLOCK):
            cell = start + tl.arange(0, BLOCK)
            # Lanes past the end repeat the last cell, which moves neither of the two.
            m = tl.load(maps_ptr + row * cells + tl.minimum(cell, cells - 1)).to(tl.float32)
            least = tl.minimum(least, m)
            most = tl.maximum(most, m)
            # Minimum and maximum pass over a NaN on a GPU.
            broken = broken | (m != m).to(tl.int32)
        low = tl.min(least, 0)
        span = tl.where(tl.max(broken, 0) == 0, tl.max(most, 0) - low, 0.0)
        for start in range(0, cells, BLOCK):
            cell = start + tl.arange(0, BLOCK)
            m = tl.load(maps_ptr + row * cells + cell, mask=cell < cells, other=0.0).to(tl.float32)
            value = tl.where(span > 0, (m - low) / tl.where(span > 0, span, 1.0), 2.0)
            tl.store(out_ptr + row * cells + cell, value, mask=cell < cells)


@jit(do_not_specialize=["rows", "each"])
def _normalise_batch_kernel(
    maps_ptr,
    out_ptr,
    ids_ptr,
    rows,
    each,
    cells,
    RAWMAX: tl.constexpr,
    HUGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The maps of one group, cell by cell: (M - min) / max with RAWMAX, else / (max - min); 0 where that is 0.

    Args:
        maps_ptr: [rows, cells], rows = B * chosen; out_ptr: fp32 of the same shape, may be the same.
        ids_ptr: int64 [rows], -1 for maps that take no part.
        each: rows of a group; the last one may have fewer.
    """
    blocks = tl.cdiv(cells, BLOCK_P)
    first = tl.program_id(0) // blocks * each
    stop = tl.minimum(first + each, rows)
    cell = (tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    least = tl.full((BLOCK_R, BLOCK_P), float("inf"), tl.float32)
    most = tl.full((BLOCK_R, BLOCK_P), float("-inf"), tl.float32)
    for start in range(first, stop, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        seen = tl.load(ids_ptr + row, mask=row < stop, other=-1)[:, None] >= 0
        place = row.to(tl.int64)[:, None] * cells + cell
        m = tl.load(maps_ptr + place, mask=seen & (cell < cells), other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.where(seen, m, float("inf")))
        most = tl.maximum(most, tl.where(seen, m, float("-inf")))
    low = tl.min(least, 0)[None, :]
    scale = tl.max(most, 0)[None, :]
    if not RAWMAX:
        scale = scale - low
    for start in range(first, stop, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        seen = (tl.load(ids_ptr + row, mask=row < stop, other=-1)[:, None] >= 0) & (cell < cells)
        place = row.to(tl.int64)[:, None] * cells + cell
        m = tl.load(maps_ptr + place, mask=seen, other=0.0).to(tl.float32)
        value = tl.where(scale != 0, (m - low) / tl.where(scale != 0, scale, 1.0), 0.0)
        # Finite, since cells beside a pixel's own take part with a share of 0.
        value = tl.minimum(tl.maximum(value, -HUGE), HUGE)
        tl.store(out_ptr + place, value, mask=seen)


@jit
def _source_jit(pixel, ratio, cells):
    """The two cells that a pixel lies between, and the weight of the second; corners are not aligned."""
    source = tl.maximum((pixel + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), cells - 1)
    return low, tl.minimum(low + 1, cells - 1), source - low.to(tl.float32)


@jit(do_not_specialize=["chosen"])
def _mask_kernel(
    maps_ptr,
    ids_ptr,
    images_ptr,
    out_ptr,
    threshold,
    margin,
    chosen,
    height,
    width,
    down,
    across,
    ratio_y,
    ratio_x,
    PLANES: tl.constexpr,
    STEP: tl.constexpr,
    CELLS_Y: tl.constexpr,
    CELLS_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One tile of one image, all of its planes.

    Args:
        maps_ptr: fp32 [B, chosen, down, across], normalised; not read where ids_ptr, int64 [B, chosen], is -1.
        images_ptr, out_ptr: [B, PLANES, height, width * STEP], integers of the images' width: STEP is the number of
            channels where they are innermost, else 1.
        margin: more than rounding can move an upsampled value that is close to the threshold.
        ratio_y, ratio_x: cells per pixel.
        CELLS_Y, CELLS_X: at least the cells that a tile touches.
    """
    row = width * STEP
    tiles_x = tl.cdiv(row, BLOCK_X)
    tiles = tiles_x * tl.cdiv(height, BLOCK_Y)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_y = tile // tiles_x * BLOCK_Y
    first_x = tile % tiles_x * BLOCK_X
    last_y = tl.minimum(first_y + BLOCK_Y, height) - 1
    last_x = tl.minimum(first_x + BLOCK_X, row) - 1
    top, _, _ = _source_jit(first_y, ratio_y, down)
    left, _, _ = _source_jit(first_x // STEP, ratio_x, across)
    _, bottom, _ = _source_jit(last_y, ratio_y, down)
    _, right, _ = _source_jit(last_x // STEP, ratio_x, across)
    window = tl.minimum(top + tl.arange(0, CELLS_Y), bottom)[:, None] * across
    window += tl.minimum(left + tl.arange(0, CELLS_X), right)[None, :]
    y = first_y + tl.arange(0, BLOCK_Y)
    q = first_x + tl.arange(0, BLOCK_X)

    classes = 0
    whole = 0
    partly = 0
    best = tl.full((BLOCK_Y, BLOCK_X), float("-inf"), tl.float32)
    for n in range(0, chosen):
        if tl.load(ids_ptr + image * chosen + n) >= 0:
            classes += 1
            map_ptr = maps_ptr + (image * chosen + n) * down * across
            values = tl.load(map_ptr + window)
            # An upsampled value lies between its cells, so these bounds decide for the whole tile.
            if tl.min(tl.min(values, 1), 0) > threshold + margin:
                whole = 1
            if (tl.max(tl.max(values, 1), 0) > threshold - margin) & (whole == 0):
                partly = 1
                # Column by column of cells: each is interpolated along y and given its share of every pixel along x.
                y0, y1, weight_y = _source_jit(y, ratio_y, down)
                source_x = tl.minimum(tl.maximum((q // STEP + 0.5) * ratio_x - 0.5, 0.0), across - 1.0)
                large = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
                for column in range(left, right + 1):
                    upper = tl.load(map_ptr + y0 * across + column)
                    lower = tl.load(map_ptr + y1 * across + column)
                    share = tl.maximum(1.0 - tl.abs(source_x - column), 0.0)
                    large += (upper * (1.0 - weight_y) + lower * weight_y)[:, None] * share[None, :]
                best = tl.maximum(best, large)
    inside = (y < height)[:, None] & (q < row)[None, :]
    start = image * PLANES * height * row + first_y.to(tl.int64) * row + first_x
    lane = tl.arange(0, BLOCK_Y)[:, None] * row + tl.arange(0, BLOCK_X)[None, :]
    everything = (whole != 0) | (classes == 0)
    for _ in tl.static_range(PLANES):
        if everything:
            tl.store(out_ptr + start + lane, tl.load(images_ptr + start + lane, mask=inside, other=0), mask=inside)
        elif partly != 0:
            value = tl.load(images_ptr + start + lane, mask=inside, other=0)
            tl.store(out_ptr + start + lane, tl.where(best > threshold, value, 0), mask=inside)
        else:
            tl.store(out_ptr + start + lane, tl.zeros((BLOCK_Y, BLOCK_X), out_ptr.dtype.element_ty), mask=inside)
        start += height * row
