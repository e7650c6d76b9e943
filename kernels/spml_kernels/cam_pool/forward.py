"""cam_pool: 1x1 class weights, BoostLU and the spatial mean, without asking for the map.

With M[b,c,p] = <w_c, X[b,p]> + bias_c, BoostLU's logit is mean_p phi(M) = mean(M) + (alpha - 1) mean(relu M)
(spec/boostlu_large_loss.md 1.1), so the two means give the logits of every alpha in one pass.

Forward: a tiled matrix product whose tile of the map is summed over the cells of each image in registers and dropped.
Cells of one image follow those of another, so a tile holds the end of one image, whole ones, and the start of one
more. Sums of whole images are final; the two others go to a buffer of two slots a tile, which a second kernel adds up
in a fixed order.
What is kept is one bit per cell, the sign, 32 cells of one class to a word: making the map again instead would be a
fourth product beside the three that forward and backward need anyway, a bit costs 1/16 of a bf16 map. Where the
backward will want the mean features, the forward makes them beside the tiles that read the same cells.
The gradients are in `cam_pool_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool import backward
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.reference import cam_map_reference, cam_pool_reference
from spml_kernels.cam_pool.tiles import aot_shapes, constants, launch_of, operand_jit
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import SKIP, WORD, images_per_tile, mean_apart, next_power_of_two
from spml_kernels.common.jit import LAUNCH, cdiv, jit, tl
from spml_kernels.devtools.aot import Case


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
    mean, relu, _, _ = cam_pool_op(features, weight, bias, wanted)
    return mean, relu


def cam_map(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps of a few chosen classes per image.

    Args:
        features: [B, H, W, K].
        weight: [C, K].
        bias: [C].
        classes: int64 [B, N] class ids; -1 gives a map of zeros.

    Returns:
        [B, N, H, W], fp32 (fp64 for fp64 input), signed, bias included.
    """
    return cam_map_reference(features, weight, bias, classes)


# Below this many cells the map is hardly larger than the logits, and a tile would touch very many images.
MIN_CELLS = 16


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
        here = (slot == image - first)[None, :]
        sums += tl.where(here, tl.sum(tl.where(inside, cam, 0.0), 1)[:, None], 0.0)
        sums_relu += tl.where(here, tl.sum(tl.where(inside, tl.maximum(cam, 0.0), 0.0), 1)[:, None], 0.0)
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
            there = (row < number)[None, :] & (k < channels)[:, None]
            x = operand_jit(tl.load(x_ptr + row[None, :] * channels + k[:, None], mask=there, other=0.0), UPCAST)
            mine = (row[:, None] >= begin) & (row[:, None] < begin + cells)
            total = tl.dot(x, mine.to(x.dtype), total, input_precision=PRECISION)
        place = pooled_ptr + image.to(tl.int64)[None, :] * channels + k[:, None]
        mean = (total * scale).to(pooled_ptr.dtype.element_ty)
        tl.store(place, mean, mask=(image < last)[None, :] & (k < channels)[:, None])


@jit
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
    there = cls < classes
    acc += tl.load(bias_ptr + cls, mask=there, other=0.0)[:, None]
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
    seen = there[:, None] & (begin < tl.minimum(stop, rows))[None, :]
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
    there = cls < classes
    first = image * cells // BLOCK_R
    last = (image * cells + cells - 1) // BLOCK_R
    if last > first:
        place = part_ptr + (first.to(tl.int64) * 2 + 1) * 2 * classes + cls
        total = tl.load(place, mask=there, other=0.0)
        total_relu = tl.load(place + classes, mask=there, other=0.0)
        for turn in range(0, last - first):
            place = part_ptr + (first.to(tl.int64) + 1 + turn) * 4 * classes + cls
            total += tl.load(place, mask=there, other=0.0)
            total_relu += tl.load(place + classes, mask=there, other=0.0)
        out = image.to(tl.int64) * classes + cls
        tl.store(mean_ptr + out, total * scale, mask=there)
        tl.store(relu_ptr + out, total_relu * scale, mask=there)


# Row tiles that share a sweep over all class tiles.
GROUP = 8


@torch.library.custom_op("spml::cam_pool", mutates_args=())
def cam_pool_op(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean(M), mean(relu M), and what the backward needs, empty without `keep`.

    That is the signs, int32 [cdiv(B H W, 32), C rounded up to 64], and where it makes the mean part apart
    (`heuristics.mean_apart`) the mean features [B, K] in the features' type.
    """
    batch, height, width, channels = features.shape
    cells, classes = height * width, len(weight)
    rows, dtype = batch * cells, features.dtype
    x, w = features.contiguous(), weight.to(dtype).contiguous()
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    mean, relu = torch.empty(batch, classes, **make), torch.empty(batch, classes, **make)
    words = cdiv(rows, WORD) if keep else 0
    stride = cdiv(classes, SKIP) * SKIP
    bits = torch.empty(words, stride, dtype=torch.int32, device=features.device)
    pool = keep and mean_apart(rows, classes)
    pooled = torch.empty((batch, channels) if pool else (0,), dtype=dtype, device=features.device)
    if batch == 0:
        return mean, relu, bits, pooled
    launch = launch_of(features, classes)
    tiles = launch.forward
    tiles_r, tiles_c = cdiv(rows, tiles.rows), cdiv(classes, tiles.classes)
    split = tiles.rows % cells != 0
    part = torch.empty((tiles_r, 2, 2, classes) if split else (0,), **make)
    _cam_pool_fwd_kernel[(tiles_r * (tiles_c + pool),)](
        x,
        w,
        bias.float().contiguous(),
        mean,
        relu,
        part,
        bits,
        pooled,
        rows,
        classes,
        channels,
        cells,
        stride,
        1.0 / cells,
        IMAGES=next_power_of_two(images_per_tile(tiles.rows, cells)),
        SLICES=launch.slices,
        TOUCHED=images_per_tile(tiles.rows // launch.slices, cells),
        EVEN=channels % tiles.channels == 0,
        BITS=keep,
        POOL=pool,
        GROUP=GROUP,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(dtype, tiles),
        **LAUNCH,
    )
    if split:
        _cam_pool_finish_kernel[(batch, cdiv(classes, 256))](
            mean, relu, part, classes, cells, 1.0 / cells, BLOCK_R=tiles.rows, BLOCK_C=256, num_warps=2, **LAUNCH
        )
    return mean, relu, bits, pooled


@cam_pool_op.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = features.shape
    rows, classes = batch * height * width, len(weight)
    mean = features.new_empty((batch, classes), dtype=torch.float32)
    words = (rows + WORD - 1) // WORD if keep else 0
    stride = (classes + SKIP - 1) // SKIP * SKIP
    pooled = features.new_empty((batch, channels) if keep and mean_apart(rows, classes) else (0,))
    return mean, torch.empty_like(mean), features.new_empty((words, stride), dtype=torch.int32), pooled


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, weight, bias, _ = inputs
    _, _, bits, pooled = output
    ctx.mark_non_differentiable(bits, pooled)
    # Else zeros of the signs' size would be written for a gradient that nobody reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, weight, bits, pooled)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad_mean: Tensor | None, grad_relu: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    features, weight, bits, pooled = ctx.saved_tensors
    want_x, want_w, want_b = ctx.needs_input_grad[:3]
    shape = (len(features), len(weight))
    grads = [features.new_zeros(shape, dtype=torch.float32) if g is None else g for g in (grad_mean, grad_relu)]
    op = backward.cam_pool_backward_op
    d_x, d_w, d_b = op(*grads, features, weight, bits, pooled, want_x, want_w or want_b)
    return d_x if want_x else None, d_w if want_w else None, d_b.to(ctx.bias_dtype) if want_b else None, None


cam_pool_op.register_autograd(_backward, setup_context=_setup)


def aot_cases(arch: int) -> Iterator[Case]:
    """The forward for compiles without a GPU."""
    for shape in aot_shapes(arch):
        tiles, data = shape.launch.forward, shape.pointer
        pointers: dict[str, str | tuple[str, ...]] = {
            "features_ptr": data,
            "weight_ptr": data,
            "bias_ptr": "*fp32",
            "mean_ptr": "*fp32",
            "relu_ptr": "*fp32",
            "part_ptr": "*fp32",
            "bits_ptr": "*i32",
            "pooled_ptr": data,
        }
        yield Case(
            "cam_pool forward",
            shape.name,
            _cam_pool_fwd_kernel,
            {**pointers, **shape.types, "scale": "fp32"},
            {
                "IMAGES": next_power_of_two(images_per_tile(tiles.rows, shape.cells)),
                "SLICES": shape.launch.slices,
                "TOUCHED": images_per_tile(tiles.rows // shape.launch.slices, shape.cells),
                "EVEN": shape.channels % tiles.channels == 0,
                "BITS": True,
                "POOL": shape.launch.apart,
                "GROUP": GROUP,
                **constants(shape.kind, tiles),
            },
            (*pointers, *shape.aligned),
            tiles.warps,
            tiles.stages,
            tensor_cores=True,
        )
