"""Class activation map, BoostLU's two means, and single maps. Source: docs/sources.md#boostlu."""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulate(tensor: Tensor) -> Tensor:
    """Half-precision values as fp32; fp32 and fp64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def cam_pool_reference(
    features_BHWK: Tensor, weight_CK: Tensor, bias_C: Tensor, boost: bool
) -> tuple[Tensor, Tensor | None]:
    """As `spml_kernels.cam_pool`."""
    features, weight, bias = _accumulate(features_BHWK), _accumulate(weight_CK), _accumulate(bias_C)
    cells_BPK = features.flatten(1, 2)
    mean_BC = torch.nn.functional.linear(cells_BPK.mean(1), weight, bias)
    if not boost:
        return mean_BC, None
    cam_BPC = torch.nn.functional.linear(cells_BPK, weight, bias)
    return mean_BC, cam_BPC.relu().mean(1)


def known_classes(classes_BN: Tensor, number: int) -> Tensor:
    """Class ids with -1 in the place of what is not below `number`."""
    return torch.where(classes_BN < number, classes_BN, -1)


def map_of_known(features_BHWK: Tensor, weight_CK: Tensor, bias_C: Tensor, classes_BN: Tensor) -> Tensor:
    """As `spml_kernels.cam_map`, for ids below C."""
    features, weight, bias = _accumulate(features_BHWK), _accumulate(weight_CK), _accumulate(bias_C)
    chosen = classes_BN.clamp(min=0)
    maps = torch.einsum("bhwk,bnk->bnhw", features, weight[chosen]) + bias[chosen][:, :, None, None]
    return torch.where((classes_BN >= 0)[:, :, None, None], maps, torch.zeros_like(maps))


def cam_map_reference(features_BHWK: Tensor, weight_CK: Tensor, bias_C: Tensor, classes_BN: Tensor) -> Tensor:
    """As `spml_kernels.cam_map`."""
    known_BN = known_classes(classes_BN, len(weight_CK))
    return map_of_known(features_BHWK, weight_CK, bias_C, known_BN)
