"""Which way cam_pool's forward goes, with what block sizes, and the constants of its products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.dispatch import cam_pool_override
from spml_kernels.common.heuristics import (
    FULL_GPU,
    CamPoolLaunch,
    CamPoolTiles,
    cam_pool_launch,
    cam_pool_way,
    images_per_tile,
    next_power_of_two,
)
from spml_kernels.common.jit import INTERPRETED, VERSION, TensorDescriptor

# Of tensors without a card, which are interpreted or recorded.
DEFAULT = (90, "tile")


def launch_of(features: Tensor, classes: int, way: str | None = None) -> CamPoolLaunch:
    """The way and block sizes for features [B, H, W, K].

    Args:
        features: what is multiplied.
        classes: C.
        way: one of `CAM_POOL_WAYS`; None takes what SPML_CAM_POOL says, or else what is chosen.
    """
    batch, height, width, channels = features.shape
    shape, half = (batch, height * width, classes), features.dtype != torch.float32
    capability, chosen = DEFAULT
    sms = FULL_GPU
    if features.is_cuda:
        card = torch.cuda.get_device_properties(features.device)
        capability, sms = 10 * card.major + card.minor, card.multi_processor_count
        chosen = cam_pool_way(capability, VERSION, *shape, half)
    way = way or cam_pool_override() or chosen
    return cam_pool_launch(*shape, channels, half, capability, way, sms)


def cache_of(tensor: Tensor) -> int:
    """Bytes of the level-2 cache of a tensor's card; 0 without one."""
    return torch.cuda.get_device_properties(tensor.device).L2_cache_size if tensor.is_cuda else 0


def constants(dtype: torch.dtype, tiles: CamPoolTiles) -> dict[str, Any]:
    """Constants that both matrix kernels take, for operands of this type. Sums are fp32 in every case."""
    return {
        "UPCAST": INTERPRETED and dtype != torch.float32,
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.classes,
        "BLOCK_K": tiles.channels,
    }


def sums(launch: CamPoolLaunch, cells: int, bits: bool) -> dict[str, Any]:
    """Constants of the sums over a tile.

    Args:
        launch: of the kernel.
        cells: of an image.
        bits: whether signs are kept.
    """
    return {
        "IMAGES": next_power_of_two(images_per_tile(launch.tiles.rows, cells)),
        "SLICES": launch.slices,
        "BITS": bits,
    }


def most_images(launch: CamPoolLaunch, cells: int) -> int:
    """Images that a slice of a tile touches at most, TOUCHED of the persistent kernel."""
    return images_per_tile(launch.tiles.rows // launch.slices, cells)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied; others have no choice."""
    # Three products of tf32 parts: fp32's accuracy on tensor cores. Plain tf32 would be Triton's default.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def descriptor(matrix: Tensor, tile: list[int]) -> Any:
    """What the tensor copy engine takes of a matrix [rows, columns], in tiles [rows, columns].

    The base and every row begin at a multiple of 16 bytes.
    """
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), tile)
