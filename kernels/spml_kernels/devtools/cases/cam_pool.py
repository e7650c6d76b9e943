"""Ahead-of-time cases of cam_pool: the forward product and the two of the backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from spml_kernels.cam_pool.forward import GROUP
from spml_kernels.cam_pool.kernels import _cam_pool_dw_kernel, _cam_pool_dx_kernel, _cam_pool_fwd_kernel
from spml_kernels.cam_pool.tiles import constants
from spml_kernels.common.heuristics import SKIP, CamPoolLaunch, cam_pool_launch, images_per_tile, next_power_of_two
from spml_kernels.devtools.aot import Case


class _Shape(NamedTuple):
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


def _shapes(arch: int) -> Iterator[_Shape]:
    """All shapes in bf16, two in the other types."""
    for classes, channels, cells, batch in SHAPES:
        for word, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            if kind != torch.bfloat16 and classes not in (80, 5000):
                continue
            launch = cam_pool_launch(batch, cells, classes, channels, kind != torch.float32, arch)
            values = {"rows": batch * cells, "classes": classes, "channels": channels, "cells": cells, "stride": SKIP}
            aligned = tuple(name for name, value in values.items() if value % 16 == 0)
            name = f"{word} C {classes} K {channels} HW {cells} B {batch}"
            yield _Shape(name, kind, launch, channels, cells, dict.fromkeys(values, "i32"), aligned)


def _forward_cases(arch: int) -> Iterator[Case]:
    """The map's product."""
    for shape in _shapes(arch):
        tiles, data = shape.launch.forward, shape.pointer
        pointers: dict[str, str | tuple[str, ...]] = {
            "features_ptr": data,
            "weight_ptr": data,
            "bias_ptr": "*fp32",
            "mean_ptr": "*fp32",
            "relu_ptr": "*fp32",
            "part_ptr": "*fp32",
            "bits_ptr": "*i32",
            "pooled_ptr": data,
        }
        yield Case(
            "cam_pool forward",
            shape.name,
            _cam_pool_fwd_kernel,
            {**pointers, **shape.types, "scale": "fp32"},
            {
                "IMAGES": next_power_of_two(images_per_tile(tiles.rows, shape.cells)),
                "SLICES": shape.launch.slices,
                "TOUCHED": images_per_tile(tiles.rows // shape.launch.slices, shape.cells),
                "EVEN": shape.channels % tiles.channels == 0,
                "BITS": True,
                "POOL": shape.launch.skip_empty_tiles,
                "GROUP": GROUP,
                **constants(shape.kind, tiles),
            },
            (*pointers, *shape.aligned),
            tiles.warps,
            tiles.stages,
            tensor_cores=True,
        )


def _backward_cases(arch: int) -> Iterator[Case]:
    """The gradients' two products."""
    for shape in _shapes(arch):
        launch, data = shape.launch, shape.pointer
        common: dict[str, Any] = {"SKIP_EMPTY": launch.skip_empty_tiles, "SCALED": shape.kind == torch.float16}
        shares: dict[str, str | tuple[str, ...]] = {"off_ptr": data, "on_ptr": data, "bits_ptr": "*i32"}
        lists: dict[str, str | tuple[str, ...]] = {"scale_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32"}
        # fp16's mean part is made in fp32.
        mean = "*fp32" if shape.kind == torch.float16 else data
        yield Case(
            "cam_pool dX",
            shape.name,
            _cam_pool_dx_kernel,
            {**shares, "weight_ptr": data, "mean_ptr": mean, **lists, "out_ptr": data, **shape.types, "width": "i32"},
            {
                **common,
                "EVEN": shape.channels % launch.d_features.channels == 0,
                **constants(shape.kind, launch.d_features),
            },
            (*shares, "weight_ptr", "mean_ptr", "out_ptr", *shape.aligned),
            launch.d_features.warps,
            launch.d_features.stages,
            tensor_cores=True,
        )
        whole = data if launch.splits == 1 else "*fp32"
        yield Case(
            "cam_pool dW",
            shape.name,
            _cam_pool_dw_kernel,
            {
                **shares,
                "features_ptr": data,
                "pooled_ptr": data,
                **lists,
                "weight_ptr": whole,
                "bias_ptr": "*fp32",
                **shape.types,
                "width": "i32",
                "splits": "i32",
                "part_stride": "i32",
            },
            {
                **common,
                "EVEN": shape.channels % launch.d_weight.channels == 0,
                **constants(shape.kind, launch.d_weight),
            },
            (*shares, "features_ptr", "pooled_ptr", "weight_ptr", "bias_ptr", "part_stride", *shape.aligned),
            launch.d_weight.warps,
            launch.d_weight.stages,
            tensor_cores=True,
        )


def aot_cases(arch: int) -> Iterator[Case]:
    """The three products."""
    yield from _forward_cases(arch)
    yield from _backward_cases(arch)
