"""cam_mask: cut the evidence of the observed classes' neighbours away: keep an image only where its own map is high.

Source: IGNORE (ECCV 2024), docs/sources.md#ignore. The order is normalise, upsample, threshold, multiply.

Three kernels: the maps of the observed classes [B, N, h, w] in fp32 (0.1 MB for 128 images of one class at 14 x 14),
their normalisation in place, and the masked image. The last one decides for a tile of pixels at a time from the few
cells that it touches: where all of them are below the threshold it writes zeros without reading the image, where all
of one class are above it copies, and only in between it upsamples, in registers. The union over several classes is the
threshold on the largest of their upsampled maps, and a class is upsampled in a tile only where it could matter.
Images are copied bit by bit, so every dtype is.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from spml_kernels.cam_mask.kernels import (
    _class_map_kernel,
    _mask_kernel,
    _normalise_batch_kernel,
    _normalise_image_kernel,
)
from spml_kernels.cam_mask.reference import cam_mask_reference, map_mask_reference, positive_classes_reference
from spml_kernels.common.autograd import register_masking
from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import class_map_launch, mask_launch, next_power_of_two, normalise_launch
from spml_kernels.common.jit import LAUNCH, cdiv
from spml_kernels.common.ops import define

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
        classes: int64 [B, N] observed classes of each image, padded with -1, which whatever is not within 0..C-1 counts
            as. Several give the union of their masks; a row without any keeps its whole image and takes no part in the
            normalisation.
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
    """As `cam_mask`, from given maps (attention heads have no class weights).

    Args:
        maps: [B, N, h, w], any floating dtype.
        classes: int64 [B, N], the classes that the maps are of, padded with -1.
        images: [B, 3, S, S].
        threshold: a pixel is kept where the normalised, upsampled map is greater.
        norm: over what maps are normalised.
        group: images that are normalised together in the batch modes.

    Returns:
        [B, 3, S, S] of the images' dtype and memory format, 0 where removed. No gradient reaches the maps.
    """
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


def cells_touched(pixels: int, ratio: float, cells: int) -> int:
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
    launch = mask_launch(width * step, step)
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
        CELLS_Y=cells_touched(launch.rows, down / height, down),
        CELLS_X=cells_touched(cdiv(launch.columns, step) + 1, across / width, across),
        BLOCK_Y=launch.rows,
        BLOCK_X=launch.columns,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return out


def _copy(images: Tensor) -> Tensor:
    return images.clone(memory_format=_format(images))


@define("spml::cam_mask")
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
    known = torch.empty_like(classes)
    launch = class_map_launch(channels, chosen)
    _class_map_kernel[(batch * cdiv(cells, launch.cells),)](
        features.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        classes,
        known,
        maps,
        len(weight),
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
    _normalise(maps, maps, known, norm, group)
    return _apply(maps, known, images, threshold)


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


register_masking(cam_mask_op, 4)


@define("spml::map_mask")
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


register_masking(map_mask_op, 2)
