"""Which way cam_pool's forward goes, with what block sizes, and the constants of its products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.dispatch import cam_pool_override
from spml_kernels.common.heuristics import CamPoolLaunch, CamPoolTiles, cam_pool_launch, cam_pool_way
from spml_kernels.common.jit import INTERPRETED, VERSION

# Of tensors without a card, which are interpreted or recorded.
DEFAULT = (90, "tile")


def launch_of(features: Tensor, classes: int) -> CamPoolLaunch:
    """The way and block sizes for features [B, H, W, K]; the way is what SPML_CAM_POOL says, else what is chosen."""
    batch, height, width, channels = features.shape
    capability, way = DEFAULT
    if features.is_cuda:
        major, minor = torch.cuda.get_device_capability(features.device)
        capability = 10 * major + minor
        way = cam_pool_way(capability, VERSION)
    way = cam_pool_override() or way
    half = features.dtype != torch.float32
    return cam_pool_launch(batch, height * width, classes, channels, half, capability, way)


def constants(dtype: torch.dtype, tiles: CamPoolTiles) -> dict[str, Any]:
    """Constants that all matrix kernels take, for operands of this type. Sums are fp32 in every case."""
    return {
        # Three products of tf32 parts: fp32's accuracy on tensor cores. Plain tf32 would be Triton's default.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and dtype != torch.float32,
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.classes,
        "BLOCK_K": tiles.channels,
    }
