"""Masked images of IGNORE in plain PyTorch. Source: docs/sources.md#ignore."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from spml_kernels.cam_pool.reference import known_classes, map_of_known


def positive_classes_reference(codes_BC: Tensor, width: int) -> Tensor:
    """As `spml_kernels.positive_classes`."""
    count = codes_BC.shape[1]
    # Descending keys of positives are ascending class ids; everything else has key 0.
    rank_C = torch.arange(count, 0, -1, device=codes_BC.device)
    key_BN = torch.where(codes_BC == 1, rank_C, 0).topk(min(width, count), dim=1).values
    ids_BN = torch.where(key_BN > 0, count - key_BN, -1)
    return pad(ids_BN, (0, max(width - count, 0)), value=-1)


def normalise_maps(maps_BNhw: Tensor, valid_BN: Tensor, norm: str, group: int) -> Tensor:
    """Maps normalised in one of the three ways; `per_image` gives 2 for flat maps, which is above every threshold.

    Args:
        maps_BNhw: [B, N, h, w], fp32 or fp64.
        valid_BN: bool [B, N], which of the maps there are.
        norm: `per_image`, `batch_rawmax` or `batch_minmax`, as for `spml_kernels.cam_mask`.
        group: images that are normalised together in the batch modes.

    Returns:
        [B, N, h, w]; meaningless where not valid.

    Raises:
        ValueError: an unknown `norm`.
    """
    if norm == "per_image":
        low, high = maps_BNhw.amin((2, 3), keepdim=True), maps_BNhw.amax((2, 3), keepdim=True)
        span = high - low
        return torch.where(span > 0, (maps_BNhw - low) / span, 2.0)
    if norm not in ("batch_rawmax", "batch_minmax"):
        raise ValueError(f"unknown normalisation {norm!r}")
    parts = []
    for maps, valid in zip(maps_BNhw.split(group), valid_BN.split(group), strict=True):
        seen = valid[:, :, None, None]
        low = torch.where(seen, maps, torch.inf).amin((0, 1))
        high = torch.where(seen, maps, -torch.inf).amax((0, 1))
        scale = high if norm == "batch_rawmax" else high - low
        parts.append(torch.where(seen & (scale != 0), (maps - low) / scale, 0.0))
    return torch.cat(parts) if parts else maps_BNhw


def map_mask_reference(
    maps_BNhw: Tensor, classes_BN: Tensor, images: Tensor, threshold: float, norm: str, group: int
) -> Tensor:
    """As `spml_kernels.map_mask`."""
    valid = classes_BN >= 0
    if images.numel() == 0 or classes_BN.shape[1] == 0:
        return images.clone()
    maps = maps_BNhw.detach()
    maps = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
    normal = normalise_maps(maps, valid, norm, group)
    keep_B1SS = ~valid.any(1)[:, None, None, None]
    # One class at a time: an image-sized map is far larger than all the maps together.
    for n in range(classes_BN.shape[1]):
        large = interpolate(normal[:, n : n + 1], images.shape[2:], mode="bilinear", align_corners=False)
        keep_B1SS = keep_B1SS | ((large > threshold) & valid[:, n, None, None, None])
    return torch.where(keep_B1SS, images, 0)


def cam_mask_reference(
    features_BHWK: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    classes_BN: Tensor,
    images: Tensor,
    threshold: float,
    norm: str,
    group: int,
) -> Tensor:
    """As `spml_kernels.cam_mask`."""
    known_BN = known_classes(classes_BN, len(weight_CK))
    maps = map_of_known(features_BHWK.detach(), weight_CK.detach(), bias_C.detach(), known_BN)
    return map_mask_reference(maps, known_BN, images, threshold, norm, group)
