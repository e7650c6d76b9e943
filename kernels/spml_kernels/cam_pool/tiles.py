"""What the tiled products of cam_pool's forward and backward share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.heuristics import CamPoolLaunch, CamPoolTiles, cam_pool_launch
from spml_kernels.common.jit import INTERPRETED


def launch_of(features: Tensor, classes: int) -> CamPoolLaunch:
    """The block sizes for features [B, H, W, K]; the interpreter takes Hopper's."""
    batch, height, width, channels = features.shape
    major, minor = torch.cuda.get_device_capability(features.device) if features.is_cuda else (9, 0)
    half = features.dtype != torch.float32
    return cam_pool_launch(batch, height * width, classes, channels, half, 10 * major + minor)


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
