"""What the tiled products of cam_pool's forward and backward share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spml_kernels.common.heuristics import SKIP, CamPoolLaunch, Tiles, cam_pool_launch
from spml_kernels.common.jit import INTERPRETED, jit, tl


@jit
def operand_jit(value, UPCAST: tl.constexpr):
    """A tile as an operand of a product. Triton's interpreter multiplies bf16 by its bit patterns, so it gets fp32."""
    return value.to(tl.float32) if UPCAST else value


def launch_of(features: Tensor, classes: int) -> CamPoolLaunch:
    """The block sizes for features [B, H, W, K]; the interpreter takes Hopper's."""
    batch, height, width, channels = features.shape
    major, minor = torch.cuda.get_device_capability(features.device) if features.is_cuda else (9, 0)
    half = features.dtype != torch.float32
    return cam_pool_launch(batch, height * width, classes, channels, half, 10 * major + minor)


def constants(dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    """Constants that all matrix kernels take, for operands of this type. Sums are fp32 in every case."""
    return {
        # Three products of tf32 parts: fp32's accuracy on tensor cores. Plain tf32 would be Triton's default.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and dtype != torch.float32,
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.classes,
        "BLOCK_K": tiles.channels,
    }


class AotShape(NamedTuple):
    """A shape for compiles without a GPU.

    Attributes:
        name: in words; kind: of the operands.
        launch: block sizes.
        channels, cells: as numbers.
        types: of the numbers that all matrix kernels take; aligned: those that are multiples of 16.
    """

    name: str
    kind: torch.dtype
    launch: CamPoolLaunch
    channels: int
    cells: int
    types: dict[str, str | tuple[str, ...]]
    aligned: tuple[str, ...]

    @property
    def pointer(self) -> str:
        """Triton's name of a pointer to operands."""
        return {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[self.kind]


# (C, K, cells of an image, B) of the shapes that matter.
SHAPES = (
    (10, 96, 64, 64),
    (20, 2048, 196, 16),
    (80, 2048, 196, 128),
    (81, 768, 256, 64),
    (312, 1280, 49, 128),
    (5000, 2048, 196, 128),
    (5000, 512, 1024, 32),
    (9605, 2048, 196, 128),
)


def aot_shapes(arch: int) -> Iterator[AotShape]:
    """All shapes in bf16, two in the other types."""
    for classes, channels, cells, batch in SHAPES:
        for word, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            if kind != torch.bfloat16 and classes not in (80, 5000):
                continue
            launch = cam_pool_launch(batch, cells, classes, channels, kind != torch.float32, arch)
            values = {"rows": batch * cells, "classes": classes, "channels": channels, "cells": cells, "stride": SKIP}
            aligned = tuple(name for name, value in values.items() if value % 16 == 0)
            name = f"{word} C {classes} K {channels} HW {cells} B {batch}"
            yield AotShape(name, kind, launch, channels, cells, dict.fromkeys(values, "i32"), aligned)
