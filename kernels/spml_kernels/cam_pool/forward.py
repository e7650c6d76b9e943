"""cam_pool: 1x1 class weights, BoostLU and the spatial mean, without materialising the map.

With M[b,c,p] = <w_c, X[b,p]> + bias_c, BoostLU's logit is mean_p phi(M) = mean(M) + (alpha - 1) mean(relu M), so the
two means give the logits of every alpha in one pass. Source: BoostLU (CVPR 2023), docs/sources.md#boostlu.

Forward: a tiled matrix product whose tile of the map is summed over the cells of each image in registers and dropped.
Cells of one image follow those of another, so a tile holds the end of one image, whole ones, and the start of one
more. Sums of whole images are final; the two others go to a buffer of two slots per tile, which a second kernel adds up
in a fixed order.
On Hopper large maps take a persistent form of that kernel: operands are copied by tensor descriptors, also during the
sums. Where card or compiler suit neither, PyTorch makes the products of a chunk of cells, and a kernel sums them in the
same way. `heuristics.cam_pool_way` chooses, the variable SPML_CAM_POOL takes one of the three.
What is kept is one bit per cell, the sign, 32 cells of one class to a word: making the map again instead would be a
fourth product beside the three that forward and backward need anyway, a bit costs 1/16 of a bf16 map.
The gradients are in `backward`, all kernels in `kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool import backward
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.kernels import (
    _cam_pool_finish_kernel,
    _cam_pool_fwd_kernel,
    _cam_pool_persistent_kernel,
    _cam_pool_reduce_kernel,
)
from spml_kernels.cam_pool.products import wide_product
from spml_kernels.cam_pool.reference import cam_map_reference, cam_pool_reference
from spml_kernels.cam_pool.tiles import constants, descriptor, launch_of, most_images, precision, sums
from spml_kernels.common.autograd import without_gradient
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import ALIGNED, LANES, WORD, CamPoolLaunch, map_scratch_bytes
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
    mean, relu, _ = cam_pool_op(features, weight, bias, wanted)
    return mean, relu


def cam_map(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps of a few chosen classes per image.

    Args:
        features: [B, H, W, K].
        weight: [C, K].
        bias: [C].
        classes: int64 [B, N] class ids; -1, or whatever is not within 0..C-1, gives a map of zeros.

    Returns:
        [B, N, H, W], fp32 (fp64 for fp64 input), signed, bias included.
    """
    return cam_map_reference(features, weight, bias, classes)


# Below this many cells the map is hardly larger than the logits, and a tile would touch very many images.
MIN_CELLS = 16


# Row tiles that share a sweep over all class tiles.
GROUP = 8


@define("spml::cam_pool")
def cam_pool_op(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean(M), mean(relu M), and the signs for the backward, empty without `keep`.

    The signs are int32 [cdiv(B H W, 32), C rounded up to 64].
    """
    batch, height, width, _ = features.shape
    classes, rows = len(weight), batch * height * width
    make: dict[str, Any] = {"dtype": torch.float32, "device": features.device}
    mean, relu = torch.empty(batch, classes, **make), torch.empty(batch, classes, **make)
    stride = cdiv(classes, LANES) * LANES
    bits = torch.empty(cdiv(rows, WORD) if keep else 0, stride, dtype=torch.int32, device=features.device)
    if batch == 0:
        return mean, relu, bits
    _fill(features.contiguous(), weight.to(features.dtype).contiguous(), bias.float().contiguous(), mean, relu, bits)
    return mean, relu, bits


def _fill(x: Tensor, w: Tensor, bias: Tensor, mean: Tensor, relu: Tensor, bits: Tensor) -> None:
    """Write means and signs, in the way that is chosen for this shape and card."""
    batch, height, width, _ = x.shape
    cells, classes = height * width, len(w)
    launch = launch_of(x, classes)
    if launch.way == "persistent" and (x.data_ptr() | w.data_ptr()) % 16 != 0:
        # A view that begins in the middle of an allocation.
        launch = launch_of(x, classes, "tile")
    tiles = launch.tiles
    split = tiles.rows % cells != 0
    part_shape = (cdiv(batch * cells, tiles.rows), 2, 2, classes) if split else (0,)
    part = torch.empty(part_shape, dtype=torch.float32, device=x.device)
    _WAYS[launch.way](launch, x, w, bias, mean, relu, part, bits)
    if split:
        _cam_pool_finish_kernel[(batch, cdiv(classes, 256))](
            mean, relu, part, classes, cells, 1.0 / cells, BLOCK_R=tiles.rows, BLOCK_C=256, num_warps=2, **LAUNCH
        )


def _tile(
    launch: CamPoolLaunch, x: Tensor, w: Tensor, bias: Tensor, mean: Tensor, relu: Tensor, part: Tensor, bits: Tensor
) -> None:
    """Products and sums in one kernel."""
    batch, height, width, channels = x.shape
    cells, classes, tiles = height * width, len(w), launch.tiles
    rows = batch * cells
    _cam_pool_fwd_kernel[(cdiv(rows, tiles.rows) * cdiv(classes, tiles.classes),)](
        x,
        w,
        bias,
        mean,
        relu,
        part,
        bits,
        rows,
        classes,
        channels,
        cells,
        bits.shape[1],
        1.0 / cells,
        EVEN=channels % tiles.channels == 0,
        PRECISION=precision(x.dtype),
        GROUP=GROUP,
        num_stages=tiles.stages,
        num_warps=tiles.warps,
        **sums(launch, cells, len(bits) > 0),
        **constants(x.dtype, tiles),
        **LAUNCH,
    )


def _persistent(
    launch: CamPoolLaunch, x: Tensor, w: Tensor, bias: Tensor, mean: Tensor, relu: Tensor, part: Tensor, bits: Tensor
) -> None:
    """Products and sums in one kernel, with tensor descriptors, as many programs as run at a time."""
    batch, height, width, channels = x.shape
    cells, classes, tiles = height * width, len(w), launch.tiles
    rows = batch * cells
    number = cdiv(rows, tiles.rows) * cdiv(classes, tiles.classes)
    _cam_pool_persistent_kernel[(min(number, launch.programs),)](
        descriptor(x.view(rows, channels), [tiles.rows, tiles.channels]),
        descriptor(w, [tiles.classes, tiles.channels]),
        bias,
        mean,
        relu,
        part,
        bits,
        rows,
        classes,
        channels,
        cells,
        bits.shape[1],
        1.0 / cells,
        TOUCHED=most_images(launch, cells),
        GROUP=GROUP,
        num_stages=tiles.stages,
        num_warps=tiles.warps,
        **sums(launch, cells, len(bits) > 0),
        **constants(x.dtype, tiles),
        **LAUNCH,
    )


def _vendor(
    launch: CamPoolLaunch, x: Tensor, w: Tensor, bias: Tensor, mean: Tensor, relu: Tensor, part: Tensor, bits: Tensor
) -> None:
    """Products by PyTorch into fp32 scratch for a chunk of cells, summed by a kernel.

    Features are read once, and all weights for every chunk, from the cache where they fit. Rounded to half precision, a
    cell whose product and bias nearly cancel would change its sign.
    """
    batch, height, width, channels = x.shape
    cells, classes, tiles = height * width, len(w), launch.tiles
    rows, stride = batch * cells, cdiv(classes, ALIGNED) * ALIGNED
    fit = map_scratch_bytes(rows, classes, x.element_size(), tiles.rows) // (4 * stride)
    # Chunks begin where tiles do.
    size = rows if fit >= rows else max(fit // tiles.rows, 1) * tiles.rows
    cam = torch.empty(min(size, rows), stride, dtype=torch.float32, device=x.device)
    x = x.view(rows, channels)
    for first in range(0, rows, size):
        number = min(size, rows - first)
        wide_product(x[first : first + number], w.T, cam[:number, :classes])
        _cam_pool_reduce_kernel[(cdiv(number, tiles.rows) * cdiv(bits.shape[1], tiles.classes),)](
            cam,
            bias,
            mean,
            relu,
            part,
            bits,
            rows,
            first,
            number,
            stride,
            classes,
            cells,
            bits.shape[1],
            1.0 / cells,
            BLOCK_R=tiles.rows,
            BLOCK_C=tiles.classes,
            num_warps=tiles.warps,
            **sums(launch, cells, len(bits) > 0),
            **LAUNCH,
        )


_WAYS = {"tile": _tile, "persistent": _persistent, "vendor": _vendor}


@cam_pool_op.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _ = features.shape
    mean = features.new_empty((batch, len(weight)), dtype=torch.float32)
    words = (batch * height * width + WORD - 1) // WORD if keep else 0
    stride = (len(weight) + LANES - 1) // LANES * LANES
    return mean, torch.empty_like(mean), features.new_empty((words, stride), dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, bias, _ = inputs
    _, _, bits = output
    without_gradient(ctx, bits)
    ctx.save_for_backward(features, weight, bits)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad_mean: Tensor | None, grad_relu: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    features, weight, bits = ctx.saved_tensors
    want_x, want_w, want_b = ctx.needs_input_grad[:3]
    shape = (len(features), len(weight))
    grads = [features.new_zeros(shape, dtype=torch.float32) if g is None else g for g in (grad_mean, grad_relu)]
    op = backward.cam_pool_backward_op
    d_x, d_w, d_b = op(*grads, features, weight, bits, want_x, want_w or want_b)
    return d_x if want_x else None, d_w if want_w else None, d_b.to(ctx.bias_dtype) if want_b else None, None


cam_pool_op.register_autograd(_backward, setup_context=_setup)
