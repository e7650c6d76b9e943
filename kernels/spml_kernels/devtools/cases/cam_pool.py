"""Ahead-of-time cases of cam_pool: the forward in its three ways, and the backward in its two."""

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
from spml_kernels.cam_pool.sparse import TILE_LINES
from spml_kernels.cam_pool.sparse_kernels import (
    _cam_pool_count_kernel,
    _cam_pool_lines_kernel,
    _cam_pool_list_kernel,
    _cam_pool_sparse_w_kernel,
    _cam_pool_sparse_x_kernel,
)
from spml_kernels.cam_pool.tiles import constants, most_images, precision, sums
from spml_kernels.common.heuristics import (
    LANES,
    WORD,
    CamPoolLaunch,
    cam_pool_launch,
    cam_pool_sparse_launch,
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


def _sparse_cases(arch: int) -> Iterator[Case]:
    """The backward that leaves out classes without a positive cell: lists on the device, and products of them."""
    for shape in _shapes(arch):
        launch, half = cam_pool_sparse_launch(shape.channels, shape.kind != torch.float32), shape.kind == torch.float16
        listed: dict[str, str | tuple[str, ...]] = {
            "bits_ptr": "*i32",
            "order_ptr": "*i64",
            "sorted_ptr": "*i32",
            "list_ptr": "*i32",
            "number_ptr": "*i32",
        }
        own: dict[str, str | tuple[str, ...]] = {"bits_ptr": "*i32", "list_ptr": "*i16", "number_ptr": "*i32"}
        # None of these depends on the features' type.
        if shape.kind == torch.bfloat16:
            numbers: dict[str, str | tuple[str, ...]] = {"lines": "i32", "classes": "i32", "stride": "i32"}
            aligned = tuple(name for name in shape.aligned if name in numbers)
            name = shape.name.removeprefix("bf16 ")
            yield Case(
                "cam_pool list",
                name,
                _cam_pool_list_kernel,
                {**own, "lines": "i32", "stride": "i32"},
                {"BLOCK": launch.listed},
                (*own, "stride"),
            )
            lines = {"LINES": launch.lines, "STEP": min(launch.lines, WORD), "BLOCK": launch.classes}
            yield Case(
                "cam_pool lines",
                name,
                _cam_pool_lines_kernel,
                {**listed, **numbers},
                lines,
                (*listed, *aligned),
                streamed=False,
            )
            counts: dict[str, str | tuple[str, ...]] = {
                "relu_ptr": "*fp32",
                "bits_ptr": "*i32",
                "number_ptr": "*i32",
                "part_ptr": "*fp32",
            }
            shorter = {key: kind for key, kind in shape.types.items() if key != "channels"}
            yield Case(
                "cam_pool count",
                name,
                _cam_pool_count_kernel,
                {**counts, **shorter, "share": "fp32"},
                {
                    "TOUCHED": images_per_tile(WORD, shape.cells),
                    "LINES": launch.lines,
                    "BLOCK": launch.counted,
                },
                (*counts, *(key for key in shape.aligned if key != "channels")),
                streamed=False,
            )
        grads: dict[str, str | tuple[str, ...]] = {"relu_ptr": "*fp32", "scale_ptr": "*fp32"}
        products = {
            "SCALED": half,
            "PRECISION": precision(shape.kind),
            "UPCAST": False,
            "BLOCK_K": launch.channels,
        }
        pointers = {**grads, **own, "base_ptr": "*fp32", "weight_ptr": shape.pointer, "out_ptr": shape.pointer}
        yield Case(
            "cam_pool sparse dX",
            shape.name,
            _cam_pool_sparse_x_kernel,
            {**pointers, **shape.types, "share": "fp32"},
            {**products, "TOUCHED": images_per_tile(TILE_LINES * WORD, shape.cells), "BLOCK_C": launch.step},
            (*pointers, *shape.aligned),
            launch.warps,
            launch.stages,
            tensor_cores=True,
        )
        pointers = {**grads, **listed, "features_ptr": shape.pointer, "sum_ptr": "*fp32"}
        yield Case(
            "cam_pool sparse dW",
            shape.name,
            _cam_pool_sparse_w_kernel,
            {**pointers, "chunk": "i32", **shape.types, "share": "fp32"},
            {
                **products,
                "TOUCHED": images_per_tile(WORD, shape.cells),
                "LINES": launch.lines,
                "BLOCK_C": launch.classes,
            },
            (*pointers, *shape.aligned),
            launch.warps,
            launch.stages,
            tensor_cores=True,
        )


def aot_cases(arch: int) -> Iterator[Case]:
    """The product in both forms, the sums, the expansion of signs, and what leaves classes out."""
    yield from _tile_cases(arch)
    yield from _persistent_cases(arch)
    yield from _other_cases(arch)
    yield from _sparse_cases(arch)
