"""Ahead-of-time cases of cam_pool: the forward in its three ways, and what writes the gradient of the map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from spml_kernels.cam_pool.forward import GROUP
from spml_kernels.cam_pool.kernels import (
    _cam_pool_expand_kernel,
    _cam_pool_fwd_kernel,
    _cam_pool_persistent_kernel,
    _cam_pool_reduce_kernel,
)
from spml_kernels.cam_pool.tiles import constants, most_images, precision, sums
from spml_kernels.common.heuristics import (
    LANES,
    WORD,
    CamPoolLaunch,
    cam_pool_launch,
    expand_classes,
    expand_rows,
    expand_warps,
    images_per_tile,
)
from spml_kernels.devtools.aot import Case


class _Shape(NamedTuple):
    """A shape for compiles without a GPU.

    Attributes:
        name: in words; kind: of the operands.
        launch: block sizes.
        classes, channels, cells: as numbers.
        types: of the numbers that all matrix kernels take; aligned: those that are multiples of 16.
    """

    name: str
    kind: torch.dtype
    launch: CamPoolLaunch
    classes: int
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


def _shapes(arch: int, way: str = "tile") -> Iterator[_Shape]:
    """All shapes in bf16, two in the other types."""
    for classes, channels, cells, batch in SHAPES:
        for word, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            if kind != torch.bfloat16 and classes not in (80, 5000):
                continue
            launch = cam_pool_launch(batch, cells, classes, channels, kind != torch.float32, arch, way)
            values = {"rows": batch * cells, "classes": classes, "channels": channels, "cells": cells, "stride": LANES}
            aligned = tuple(name for name, value in values.items() if value % 16 == 0)
            name = f"{word} C {classes} K {channels} HW {cells} B {batch}"
            yield _Shape(name, kind, launch, classes, channels, cells, dict.fromkeys(values, "i32"), aligned)


_RESULTS: dict[str, str | tuple[str, ...]] = {
    "bias_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "relu_ptr": "*fp32",
    "part_ptr": "*fp32",
    "bits_ptr": "*i32",
}


def _tile_cases(arch: int) -> Iterator[Case]:
    """The map's product with its sums, a program a tile."""
    for shape in _shapes(arch):
        tiles, data = shape.launch.tiles, shape.pointer
        pointers: dict[str, str | tuple[str, ...]] = {"features_ptr": data, "weight_ptr": data, **_RESULTS}
        yield Case(
            "cam_pool forward",
            shape.name,
            _cam_pool_fwd_kernel,
            {**pointers, **shape.types, "scale": "fp32"},
            {
                **sums(shape.launch, shape.cells, True),
                **constants(shape.kind, tiles),
                "EVEN": shape.channels % tiles.channels == 0,
                "PRECISION": precision(shape.kind),
                "GROUP": GROUP,
            },
            (*pointers, *shape.aligned),
            tiles.warps,
            tiles.stages,
            tensor_cores=True,
        )


def _persistent_cases(arch: int) -> Iterator[Case]:
    """The same with programs that take tile after tile, for the maps that are chosen for it on Hopper."""
    for shape in _shapes(arch, "persistent"):
        tiles, words = shape.launch.tiles, shape.pointer.removeprefix("*")
        if shape.launch.way != "persistent" or tiles.classes < 128:
            continue
        copies: dict[str, str | tuple[str, ...]] = {
            "features_tiles": f"tensordesc<{words}[{tiles.rows}, {tiles.channels}]>",
            "weight_tiles": f"tensordesc<{words}[{tiles.classes}, {tiles.channels}]>",
        }
        yield Case(
            "cam_pool persistent",
            shape.name,
            _cam_pool_persistent_kernel,
            {**copies, **_RESULTS, **shape.types, "scale": "fp32"},
            {
                **sums(shape.launch, shape.cells, True),
                **constants(shape.kind, tiles),
                "TOUCHED": most_images(shape.launch, shape.cells),
                "GROUP": GROUP,
            },
            (*_RESULTS, *shape.aligned),
            tiles.warps,
            tiles.stages,
            tensor_cores=True,
        )


def _other_cases(arch: int) -> Iterator[Case]:
    """The sums of products from elsewhere, and the gradient of the map."""
    for shape in _shapes(arch, "vendor"):
        data, numbers = shape.pointer, {name: kind for name, kind in shape.types.items() if name != "channels"}
        aligned = tuple(name for name in shape.aligned if name != "channels")
        maps: dict[str, str | tuple[str, ...]] = {"map_ptr": "*fp32", **_RESULTS}
        chunk: dict[str, str | tuple[str, ...]] = {"first": "i32", "number": "i32", "map_stride": "i32"}
        yield Case(
            "cam_pool sums",
            shape.name,
            _cam_pool_reduce_kernel,
            {**maps, **numbers, **chunk, "scale": "fp32"},
            {
                **sums(shape.launch, shape.cells, True),
                "BLOCK_R": shape.launch.tiles.rows,
                "BLOCK_C": shape.launch.tiles.classes,
            },
            (*maps, "map_stride", *aligned),
            shape.launch.tiles.warps,
        )
        means = ("mean_ptr", "relu_ptr", "scale_ptr")
        pointers = {**dict.fromkeys(means, "*fp32"), "bits_ptr": "*i32", "out_ptr": data, "part_ptr": "*fp32"}
        more = {"first": "i32", "number": "i32", "out_stride": "i32", "share": "fp32"}
        classes = shape.classes
        yield Case(
            "cam_pool expand",
            shape.name,
            _cam_pool_expand_kernel,
            {**pointers, **numbers, **more},
            {
                "SCALED": shape.kind == torch.float16,
                "TOUCHED": images_per_tile(WORD, shape.cells),
                "LINES": expand_rows(classes) // WORD,
                "BLOCK": expand_classes(classes),
            },
            (*pointers, "out_stride", *aligned),
            expand_warps(classes),
            streamed=False,
        )


def aot_cases(arch: int) -> Iterator[Case]:
    """The product in both forms, the sums and the expansion of signs."""
    yield from _tile_cases(arch)
    yield from _persistent_cases(arch)
    yield from _other_cases(arch)
