"""cam_mask: cut the evidence of the observed classes' neighbours away: keep a picture only where its own map is high.

Source: IGNORE (ECCV 2024) as in spec/ignore.md 1.4. The order is normalise, upsample, threshold, multiply.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from spml_kernels.reference.cam_mask import cam_mask_reference, map_mask_reference, positive_classes_reference

MapNorm = Literal["per_image", "batch_rawmax", "batch_minmax"]


def cam_mask(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    pictures: Tensor,
    threshold: float,
    norm: MapNorm = "per_image",
    group: int = 16,
) -> Tensor:
    """Pictures with everything removed that does not speak for their observed classes.

    Args:
        features: [B, h, w, K], any floating dtype; channels-last feature memory is contiguous in this shape.
        weight: [C, K] class weights.
        bias: [C].
        classes: int64 [B, N] observed classes of each picture, padded with -1. Several give the union of their masks;
            a row without any keeps its whole picture and takes no part in the normalisation.
        pictures: [B, 3, S, S].
        threshold: a pixel is kept where the normalised, upsampled map is greater.
        norm: over what the map M is normalised.
            `per_image`: (M - min) / (max - min) over the cells of each map; a flat map keeps the whole picture.
            `batch_rawmax`: (M - min) / max over the maps of `group` consecutive pictures, cell by cell, as IGNORE's
            release; a cell whose max is 0 is not kept. `batch_minmax`: (M - min) / (max - min) in the same way, as
            CALR's. A group with one map keeps nothing in either.
        group: pictures that are normalised together in the batch modes.

    Returns:
        [B, 3, S, S] of the pictures' dtype and memory format, 0 where removed. No gradient reaches the map.
    """
    return cam_mask_reference(features, weight, bias, classes, pictures, threshold, norm, group)


def map_mask(
    maps: Tensor, classes: Tensor, pictures: Tensor, threshold: float, norm: MapNorm = "per_image", group: int = 16
) -> Tensor:
    """As `cam_mask`, from given maps [B, N, h, w] of the `classes` [B, N] (attention heads have no class weights)."""
    return map_mask_reference(maps, classes, pictures, threshold, norm, group)


def positive_classes(codes: Tensor, width: int) -> Tensor:
    """Class ids of each row's observed positives, without reading a size back from the device.

    Args:
        codes: int8 [B, C].
        width: N, a bound on positives of a row known on the host; further ones are cut off.

    Returns:
        int64 [B, N], ascending, padded with -1.
    """
    return positive_classes_reference(codes, width)
