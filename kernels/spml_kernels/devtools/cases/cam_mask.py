"""Ahead-of-time cases of cam_mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spml_kernels.cam_mask.kernels import (
    _class_map_kernel,
    _mask_kernel,
    _normalise_batch_kernel,
    _normalise_image_kernel,
)
from spml_kernels.cam_mask.op import HUGE, cells_touched
from spml_kernels.common.heuristics import class_map_launch, mask_launch, normalise_launch
from spml_kernels.common.jit import cdiv
from spml_kernels.devtools.aot import Case

# (K, cells of a side, side of the image, N) of the shapes that matter.
AOT_SHAPES = ((2048, 14, 448, 1), (2048, 14, 448, 6), (96, 8, 64, 1), (768, 16, 225, 1))


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for channels, cells, side, chosen in AOT_SHAPES:
        launch = class_map_launch(channels, chosen)
        # A launch takes a 1 into the machine code.
        one: dict[str, Any] = {"chosen": 1} if chosen == 1 else {}
        numbers = () if one else ("chosen",)
        for dtype in ("bf16", "fp32"):
            pointers: dict[str, str | tuple[str, ...]] = {
                "features_ptr": f"*{dtype}",
                "weight_ptr": "*fp32",
                "bias_ptr": "*fp32",
                "ids_ptr": "*i64",
                "known_ptr": "*i64",
                "maps_ptr": "*fp32",
            }
            yield Case(
                "cam_mask maps",
                f"{dtype} K {channels} HW {cells}x{cells} N {chosen}",
                _class_map_kernel,
                {**pointers, **dict.fromkeys(("classes", *numbers, "cells", "channels"), "i32")},
                {
                    **one,
                    "EVEN": channels % launch.channels == 0,
                    "BLOCK_P": launch.cells,
                    "BLOCK_N": launch.chosen,
                    "BLOCK_K": launch.channels,
                },
                (*pointers, "channels"),
                launch.warps,
            )
        for bits, inner in (("i16", True), ("i16", False), ("i32", True), ("i32", False)):
            step = 3 if inner else 1
            tile = mask_launch(side * step, step)
            yield Case(
                "cam_mask image",
                f"{bits} {side}x{side} map {cells}x{cells} N {chosen} {'channels_last' if inner else 'contiguous'}",
                _mask_kernel,
                {
                    "maps_ptr": "*fp32",
                    "ids_ptr": "*i64",
                    "images_ptr": f"*{bits}",
                    "out_ptr": f"*{bits}",
                    "threshold": "fp32",
                    "margin": "fp32",
                    **dict.fromkeys((*numbers, "height", "width", "down", "across"), "i32"),
                    "ratio_y": "fp32",
                    "ratio_x": "fp32",
                },
                {
                    **one,
                    "PLANES": 1 if inner else 3,
                    "STEP": step,
                    "CELLS_Y": cells_touched(tile.rows, cells / side, cells),
                    "CELLS_X": cells_touched(cdiv(tile.columns, step) + 1, cells / side, cells),
                    "BLOCK_Y": tile.rows,
                    "BLOCK_X": tile.columns,
                },
                (
                    "maps_ptr",
                    "ids_ptr",
                    "images_ptr",
                    "out_ptr",
                    *(("height", "width") if side % 16 == 0 else ()),
                ),
                tile.warps,
                streamed=side % 16 == 0,
            )
        norm = normalise_launch(cells * cells)
        table: dict[str, str | tuple[str, ...]] = {"maps_ptr": "*fp32", "out_ptr": "*fp32", "ids_ptr": "*i64"}
        yield Case(
            "cam_mask per_image",
            f"{cells}x{cells}",
            _normalise_image_kernel,
            {**table, "cells": "i32"},
            {"BLOCK": norm.image},
            tuple(table),
            norm.warps,
            streamed=False,
        )
        yield Case(
            "cam_mask batch",
            f"{cells}x{cells}",
            _normalise_batch_kernel,
            {**table, "rows": "i32", "each": "i32", "cells": "i32"},
            {"RAWMAX": True, "HUGE": HUGE, "BLOCK_R": norm.rows, "BLOCK_P": norm.cells},
            tuple(table),
            norm.warps,
            streamed=False,
        )
