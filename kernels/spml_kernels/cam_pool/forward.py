"""cam_pool: 1x1 class weights, BoostLU and the spatial mean, without materialising the map.

With M[b,c,p] = <w_c, X[b,p]> + bias_c, BoostLU's logit is mean_p phi(M) = mean(M) + (alpha - 1) mean(relu M), so the
two means give the logits of every alpha in one pass. Source: BoostLU (CVPR 2023), docs/sources.md#boostlu.

Forward: a tiled matrix product whose tile of the map is summed over the cells of each image in registers and dropped.
Cells of one image follow those of another, so a tile holds the end of one image, whole ones, and the start of one
more. Sums of whole images are final; the two others go to a buffer of two slots per tile, which a second kernel adds up
in a fixed order.
What is kept is one bit per cell, the sign, 32 cells of one class to a word: making the map again instead would be a
fourth product beside the three that forward and backward need anyway, a bit costs 1/16 of a bf16 map. Where the
backward will want the mean features, the forward makes them beside the tiles that read the same cells.
The gradients are in `backward`, all kernels in `kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool import backward
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.kernels import _cam_pool_finish_kernel, _cam_pool_fwd_kernel
from spml_kernels.cam_pool.reference import cam_map_reference, cam_pool_reference
from spml_kernels.cam_pool.tiles import constants, launch_of
from spml_kernels.common.autograd import without_gradient
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import SKIP, WORD, images_per_tile, next_power_of_two, skips_empty_tiles
from spml_kernels.common.jit import LAUNCH, cdiv
from spml_kernels.common.ops import define


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


# Row tiles that share a sweep over all class tiles.
GROUP = 8


@define("spml::cam_pool")
def cam_pool_op(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean(M), mean(relu M), and what the backward needs, empty without `keep`.

    That is the signs, int32 [cdiv(B H W, 32), C rounded up to 64], and where it makes the mean part by itself
    (`heuristics.skips_empty_tiles`) the mean features [B, K] in the features' type.
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
    pool = keep and skips_empty_tiles(rows, classes)
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
    pooled = features.new_empty((batch, channels) if keep and skips_empty_tiles(rows, classes) else (0,))
    return mean, torch.empty_like(mean), features.new_empty((words, stride), dtype=torch.int32), pooled


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, weight, bias, _ = inputs
    _, _, bits, pooled = output
    without_gradient(ctx, bits, pooled)
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
