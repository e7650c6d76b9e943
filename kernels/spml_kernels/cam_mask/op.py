"""cam_mask: cut the evidence of the observed classes' neighbours away: keep an image only where its own map is high.

Source: IGNORE (ECCV 2024) as in spec/ignore.md 1.4. The order is normalise, upsample, threshold, multiply.

Three kernels: the maps of the observed classes [B, N, h, w] in fp32 (0.1 MB for 128 images of one class at 14 x 14),
their normalisation in place, and the masked image. The last one decides for a tile of pixels at a time from the few
cells that it touches: where all of them are below the threshold it writes zeros without reading the image, where all
of one class are above it copies, and only in between it upsamples, in registers. The union over several classes is the
threshold on the largest of their upsampled maps, and a class is upsampled in a tile only where it could matter.
Images are copied bit by bit, so every dtype is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spml_kernels.cam_mask.reference import cam_mask_reference, map_mask_reference, positive_classes_reference
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import map_launch, mask_launch, next_power_of_two, normalise_launch
from spml_kernels.common.jit import LAUNCH, cdiv, jit, tl
from spml_kernels.devtools.aot import Case

MapNorm = Literal["per_image", "batch_rawmax", "batch_minmax"]


def cam_mask(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    images: Tensor,
    threshold: float,
    norm: MapNorm = "per_image",
    group: int = 16,
) -> Tensor:
    """Images with everything removed that does not speak for their observed classes.

    Args:
        features: [B, h, w, K], any floating dtype; channels-last feature memory is contiguous in this shape.
        weight: [C, K] class weights.
        bias: [C].
        classes: int64 [B, N] observed classes of each image, padded with -1. Several give the union of their masks;
            a row without any keeps its whole image and takes no part in the normalisation.
        images: [B, 3, S, S].
        threshold: a pixel is kept where the normalised, upsampled map is greater.
        norm: over what the map M is normalised.
            `per_image`: (M - min) / (max - min) over the cells of each map; a flat map keeps the whole image.
            `batch_rawmax`: (M - min) / max over the maps of `group` consecutive images, cell by cell, as IGNORE's
            release; a cell whose max is 0 is not kept. `batch_minmax`: (M - min) / (max - min) in the same way, as
            CALR's. A group with one map keeps nothing in either.
        group: images that are normalised together in the batch modes.

    Returns:
        [B, 3, S, S] of the images' dtype and memory format, 0 where removed. No gradient reaches the map.
    """
    if not use_triton(features):
        return cam_mask_reference(features, weight, bias, classes, images, threshold, norm, group)
    _check(norm)
    head = (features.detach(), weight.detach(), bias.detach())
    return cam_mask_op(*head, classes, images, float(threshold), norm, group)


def map_mask(
    maps: Tensor, classes: Tensor, images: Tensor, threshold: float, norm: MapNorm = "per_image", group: int = 16
) -> Tensor:
    """As `cam_mask`, from given maps [B, N, h, w] of the `classes` [B, N] (attention heads have no class weights)."""
    if not use_triton(maps):
        return map_mask_reference(maps, classes, images, threshold, norm, group)
    _check(norm)
    return map_mask_op(maps.detach(), classes, images, float(threshold), norm, group)


def _check(norm: str) -> None:
    if norm not in get_args(MapNorm):
        raise ValueError(f"unknown normalisation {norm!r}")


def positive_classes(codes: Tensor, width: int) -> Tensor:
    """Class ids of each row's observed positives, without reading a size back from the device.

    Args:
        codes: int8 [B, C].
        width: N, a bound on positives of a row known on the host; further ones are cut off.

    Returns:
        int64 [B, N], ascending, padded with -1.
    """
    return positive_classes_reference(codes, width)


@jit
def _class_map_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    maps_ptr,
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
        ids_ptr: int64 [B, chosen], -1 for none.
        maps_ptr: fp32 [B, chosen, cells], not written for -1.
    """
    blocks = tl.cdiv(cells, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    # Lanes past the last cell repeat it and are dropped at the end: loads need no mask for them.
    x_lane = tl.minimum(cell, cells - 1)[:, None] * channels + k[None, :]
    for first in range(0, chosen, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + image * chosen + n, mask=n < chosen, other=-1)
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


@jit
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


@jit
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
        ratio_y, ratio_x: cells a pixel.
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
    y0, y1, weight_y = _source_jit(y, ratio_y, down)
    source_x = tl.minimum(tl.maximum((q // STEP + 0.5) * ratio_x - 0.5, 0.0), across - 1.0)

    classes = 0
    whole = 0
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
                # Column by column of cells: each is interpolated along y and given its share of every pixel along x.
                large = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
                for column in range(left, right + 1):
                    upper = tl.load(map_ptr + y0 * across + column)
                    lower = tl.load(map_ptr + y1 * across + column)
                    share = tl.maximum(1.0 - tl.abs(source_x - column), 0.0)
                    large += (upper * (1.0 - weight_y) + lower * weight_y)[:, None] * share[None, :]
                best = tl.maximum(best, large)
    kept = (best > threshold) | (whole != 0) | (classes == 0)
    inside = (y < height)[:, None] & (q < row)[None, :]
    needed = tl.max(tl.max((kept & inside).to(tl.int32), 1), 0)
    start = image * PLANES * height * row + first_y.to(tl.int64) * row + first_x
    lane = tl.arange(0, BLOCK_Y)[:, None] * row + tl.arange(0, BLOCK_X)[None, :]
    for _ in tl.static_range(PLANES):
        if needed != 0:
            value = tl.load(images_ptr + start + lane, mask=inside, other=0)
            tl.store(out_ptr + start + lane, tl.where(kept, value, 0), mask=inside)
        else:
            tl.store(out_ptr + start + lane, tl.zeros((BLOCK_Y, BLOCK_X), out_ptr.dtype.element_ty), mask=inside)
        start += height * row


# Relative rounding of the four products and three sums of an upsampled value, with room to spare.
MARGIN = 2e-6
# Larger than any threshold, and far from overflow.
HUGE = 1e30
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _interleaved(images: Tensor) -> bool:
    """Whether channels are innermost in memory."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _format(images: Tensor) -> torch.memory_format:
    return torch.channels_last if _interleaved(images) else torch.contiguous_format


def _window(pixels: int, ratio: float, cells: int) -> int:
    """At least the number of cells, a power of two, that this many consecutive pixels lie between."""
    return next_power_of_two(min(int((pixels - 1) * ratio) + 3, cells))


def _normalise(maps: Tensor, out: Tensor, classes: Tensor, norm: str, group: int) -> None:
    """Normalised maps [B, N, h, w] into `out`, which may be `maps`; rows without a class stay as they are."""
    batch, chosen = classes.shape
    cells = maps.shape[2] * maps.shape[3]
    launch = normalise_launch(cells)
    if norm == "per_image":
        _normalise_image_kernel[(batch * chosen,)](
            maps, out, classes, cells, BLOCK=launch.image, num_warps=launch.warps, **LAUNCH
        )
        return
    # A group longer than the batch is the batch, and its rows stay within 32 bits.
    group = min(group, batch)
    _normalise_batch_kernel[(cdiv(batch, group) * cdiv(cells, launch.cells),)](
        maps,
        out,
        classes,
        batch * chosen,
        group * chosen,
        cells,
        RAWMAX=norm == "batch_rawmax",
        HUGE=HUGE,
        BLOCK_R=launch.rows,
        BLOCK_P=launch.cells,
        num_warps=launch.warps,
        **LAUNCH,
    )


def _apply(normal: Tensor, classes: Tensor, images: Tensor, threshold: float) -> Tensor:
    """The images masked by normalised maps [B, N, h, w]."""
    images = images.contiguous(memory_format=_format(images))
    out = torch.empty_like(images)
    batch, channels, height, width = images.shape
    inner = _interleaved(images)
    step, planes = (channels, 1) if inner else (1, channels)
    down, across = normal.shape[2:]
    launch = mask_launch()
    bits = BITS[images.element_size()]
    _mask_kernel[(batch * cdiv(height, launch.rows) * cdiv(width * step, launch.columns),)](
        normal,
        classes,
        images.view(bits),
        out.view(bits),
        threshold,
        abs(threshold) * MARGIN,
        classes.shape[1],
        height,
        width,
        down,
        across,
        down / height,
        across / width,
        PLANES=planes,
        STEP=step,
        CELLS_Y=_window(launch.rows, down / height, down),
        CELLS_X=_window(cdiv(launch.columns, step) + 1, across / width, across),
        BLOCK_Y=launch.rows,
        BLOCK_X=launch.columns,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return out


def _copy(images: Tensor) -> Tensor:
    return images.clone(memory_format=_format(images))


@torch.library.custom_op("spml::cam_mask", mutates_args=())
def cam_mask_op(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    images: Tensor,
    threshold: float,
    norm: str,
    group: int,
) -> Tensor:
    """See `cam_mask`; gradients go to the images alone."""
    batch, height, width, channels = features.shape
    chosen, cells = classes.shape[1], height * width
    if images.numel() == 0 or chosen == 0:
        return _copy(images)
    classes = classes.contiguous()
    maps = torch.empty(batch, chosen, height, width, dtype=torch.float32, device=features.device)
    launch = map_launch(channels, chosen)
    _class_map_kernel[(batch * cdiv(cells, launch.cells),)](
        features.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        classes,
        maps,
        chosen,
        cells,
        channels,
        EVEN=channels % launch.channels == 0,
        BLOCK_P=launch.cells,
        BLOCK_N=launch.chosen,
        BLOCK_K=launch.channels,
        num_warps=launch.warps,
        **LAUNCH,
    )
    _normalise(maps, maps, classes, norm, group)
    return _apply(maps, classes, images, threshold)


@cam_mask_op.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    images: Tensor,
    threshold: float,
    norm: str,
    group: int,
) -> Tensor:
    return torch.empty_like(images, memory_format=_format(images))


def _setup_cam(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.choices = inputs[5:]


def _backward_cam(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    # The mask is a constant, so what it does to an image it does to a gradient.
    return (*[None] * 4, cam_mask_op(*ctx.saved_tensors, upstream, *ctx.choices), *[None] * 3)


cam_mask_op.register_autograd(_backward_cam, setup_context=_setup_cam)


@torch.library.custom_op("spml::map_mask", mutates_args=())
def map_mask_op(maps: Tensor, classes: Tensor, images: Tensor, threshold: float, norm: str, group: int) -> Tensor:
    """See `map_mask`; gradients go to the images alone."""
    if images.numel() == 0 or classes.shape[1] == 0:
        return _copy(images)
    maps, classes = maps.contiguous(), classes.contiguous()
    normal = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    _normalise(maps, normal, classes, norm, group)
    return _apply(normal, classes, images, threshold)


@map_mask_op.register_fake
def _(maps: Tensor, classes: Tensor, images: Tensor, threshold: float, norm: str, group: int) -> Tensor:
    return torch.empty_like(images, memory_format=_format(images))


def _setup_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.choices = inputs[3:]


def _backward_map(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, map_mask_op(*ctx.saved_tensors, upstream, *ctx.choices), None, None, None


map_mask_op.register_autograd(_backward_map, setup_context=_setup_map)


# (K, cells of a side, side of the image, N) of the shapes that matter.
AOT_SHAPES = ((2048, 14, 448, 1), (2048, 14, 448, 6), (96, 8, 64, 1), (768, 16, 225, 1))


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for channels, cells, side, chosen in AOT_SHAPES:
        launch = map_launch(channels, chosen)
        # A launch takes a 1 into the machine code.
        one: dict[str, Any] = {"chosen": 1} if chosen == 1 else {}
        numbers = () if one else ("chosen",)
        for dtype in ("bf16", "fp32"):
            pointers: dict[str, str | tuple[str, ...]] = {
                "features_ptr": f"*{dtype}",
                "weight_ptr": "*fp32",
                "bias_ptr": "*fp32",
                "ids_ptr": "*i64",
                "maps_ptr": "*fp32",
            }
            yield Case(
                "cam_mask maps",
                f"{dtype} K {channels} HW {cells}x{cells} N {chosen}",
                _class_map_kernel,
                {**pointers, **dict.fromkeys((*numbers, "cells", "channels"), "i32")},
                {
                    **one,
                    "EVEN": channels % launch.channels == 0,
                    "BLOCK_P": launch.cells,
                    "BLOCK_N": launch.chosen,
                    "BLOCK_K": launch.channels,
                },
                (*pointers, "channels"),
                launch.warps,
            )
        tile = mask_launch()
        for bits, inner in (("i16", True), ("i16", False), ("i32", True), ("i32", False)):
            step = 3 if inner else 1
            yield Case(
                "cam_mask image",
                f"{bits} {side}x{side} map {cells}x{cells} N {chosen} {'channels_last' if inner else 'contiguous'}",
                _mask_kernel,
                {
                    "maps_ptr": "*fp32",
                    "ids_ptr": "*i64",
                    "images_ptr": f"*{bits}",
                    "out_ptr": f"*{bits}",
                    "threshold": "fp32",
                    "margin": "fp32",
                    **dict.fromkeys((*numbers, "height", "width", "down", "across"), "i32"),
                    "ratio_y": "fp32",
                    "ratio_x": "fp32",
                },
                {
                    **one,
                    "PLANES": 1 if inner else 3,
                    "STEP": step,
                    "CELLS_Y": _window(tile.rows, cells / side, cells),
                    "CELLS_X": _window(cdiv(tile.columns, step) + 1, cells / side, cells),
                    "BLOCK_Y": tile.rows,
                    "BLOCK_X": tile.columns,
                },
                (
                    "maps_ptr",
                    "ids_ptr",
                    "images_ptr",
                    "out_ptr",
                    *(("height", "width") if side % 16 == 0 else ()),
                ),
                tile.warps,
                streamed=side % 16 == 0,
            )
        norm = normalise_launch(cells * cells)
        table: dict[str, str | tuple[str, ...]] = {"maps_ptr": "*fp32", "out_ptr": "*fp32", "ids_ptr": "*i64"}
        yield Case(
            "cam_mask per_image",
            f"{cells}x{cells}",
            _normalise_image_kernel,
            {**table, "cells": "i32"},
            {"BLOCK": norm.image},
            tuple(table),
            norm.warps,
            streamed=False,
        )
        yield Case(
            "cam_mask batch",
            f"{cells}x{cells}",
            _normalise_batch_kernel,
            {**table, "rows": "i32", "each": "i32", "cells": "i32"},
            {"RAWMAX": True, "HUGE": HUGE, "BLOCK_R": norm.rows, "BLOCK_P": norm.cells},
            tuple(table),
            norm.warps,
            streamed=False,
        )
