"""Ahead-of-time cases of large_loss: the single launch, and the passes."""

from __future__ import annotations

from collections.abc import Iterator

from spml_kernels.common.heuristics import (
    LARGE_LOSS_SELECTS,
    flat_launch,
    histogram_launch,
    large_loss_single_launch,
)
from spml_kernels.devtools.aot import Case
from spml_kernels.large_loss.kernels import (
    _large_histogram_kernel,
    _large_select_kernel,
    _large_single_kernel,
    _large_threshold_kernel,
)


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for rows, classes in ((128, 312), (128, 5000)):
        for dtype in ("fp32", "bf16"):
            yield from _passes_cases(rows, classes, dtype)
    for rows, classes in ((16, 20), (16, 80), (16, 200), (64, 80), (128, 80), (128, 81)):
        for dtype in ("fp32", "bf16"):
            for listed in (True, False):
                yield _single_case(rows, classes, dtype, listed)


def _single_case(rows: int, classes: int, dtype: str, listed: bool) -> Case:
    """Loss and gradient of one batch in one launch; with the list as LL-Cp wants it, without as LL-R."""
    launch = large_loss_single_launch(rows * classes)
    assert launch is not None
    pointers = {"logits_ptr": f"*{dtype}", "codes_ptr": "*i8", "selected_ptr": "*i8", "grad_ptr": f"*{dtype}"}
    pointers |= {"rows_ptr": "*i64", "classes_ptr": "*i64", "valid_ptr": "*i8"}
    pointers |= {"k_ptr": "*i64", "threshold_ptr": "*fp32", "loss_ptr": "*fp32"}
    numbers = ("elements",) if rows * classes % 16 == 0 else ()
    return Case(
        "large_single",
        f"{dtype} {rows} x {classes} {'with list' if listed else 'without list'}",
        _large_single_kernel,
        {**pointers, "elements": "i32", "length": "i32", "k_max": "i32"},
        {
            "INCLUSIVE": False,
            "LOSS": True,
            "CORRECT": listed,
            "GRAD": True,
            "LIST": listed,
            "CLASSES": classes if listed else 1,
            "BLOCK": launch.block,
            "PART": launch.part,
        },
        (*pointers, *numbers),
        launch.warps,
    )


def _passes_cases(rows: int, classes: int, dtype: str) -> Iterator[Case]:
    elements, shape = rows * classes, f"{dtype} {rows} x {classes}"
    flat = flat_launch(elements)
    pointers: dict[str, str | tuple[str, ...]] = {"logits_ptr": f"*{dtype}", "codes_ptr": "*i8"}
    state: dict[str, str | tuple[str, ...]] = {"hist_ptr": "*i32", "state_ptr": "*i32"}
    numbers: dict[str, str | tuple[str, ...]] = {"elements": "i32", "rounds": "i32", "k_max": "i32"}
    threshold: dict[str, str | tuple[str, ...]] = {
        "counts_ptr": "*i32",
        "threshold_ptr": "*fp32",
        "room_ptr": "*i64",
    }
    for way, select in LARGE_LOSS_SELECTS.items():
        launch = histogram_launch(elements, way)
        # Further passes of four bits differ in one number.
        for level in range(3):
            yield Case(
                f"large_{way}",
                f"{shape} pass {level}",
                _large_histogram_kernel,
                {**pointers, "k_ptr": "*i64", **state, "out_ptr": "*i32", "next_ptr": "*i32", **numbers},
                {
                    "DONE": sum(select.widths[:level]),
                    "WIDTH": select.widths[level],
                    "BEFORE": select.widths[max(level - 1, 0)],
                    "BINS": select.bins,
                    "TURNS": select.turns,
                    "BLOCK": launch.block,
                },
                ("logits_ptr", "codes_ptr", "hist_ptr", "out_ptr", "elements"),
                launch.warps,
            )
        yield Case(
            "large_threshold",
            f"{shape} after {way}",
            _large_threshold_kernel,
            {**pointers, **state, **threshold, "elements": "i32"},
            {
                "INCLUSIVE": False,
                "LIST": False,
                "WIDTH": select.widths[-1],
                "BINS": select.bins,
                "BLOCK": flat.block,
            },
            ("logits_ptr", "codes_ptr", "hist_ptr", "counts_ptr", "elements"),
            flat.warps,
        )
    for listed in (True, False):
        yield Case(
            "large_select",
            f"{shape} with loss and {'list' if listed else 'no list'}",
            _large_select_kernel,
            {
                **pointers,
                **threshold,
                "selected_ptr": "*i8",
                "grad_ptr": f"*{dtype}",
                "partial_ptr": "*fp32",
                "rows_ptr": "*i64",
                "classes_ptr": "*i64",
                "valid_ptr": "*i8",
                "elements": "i32",
                "length": "i32",
            },
            {
                "INCLUSIVE": False,
                "LOSS": True,
                "CORRECT": listed,
                "GRAD": True,
                "LIST": listed,
                "CLASSES": classes if listed else 1,
                "BLOCK": flat.block,
            },
            ("logits_ptr", "codes_ptr", "counts_ptr", "selected_ptr", "grad_ptr", "elements"),
            flat.warps,
        )
