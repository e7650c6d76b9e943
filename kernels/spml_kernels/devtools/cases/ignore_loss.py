"""Ahead-of-time cases of IGNORE's statistics and loss."""

from __future__ import annotations

from collections.abc import Iterator

from spml_kernels.common.heuristics import columns_launch, flat_launch
from spml_kernels.devtools.aot import Case
from spml_kernels.ignore_loss.kernels import (
    _ignore_backward_kernel,
    _ignore_finish_kernel,
    _ignore_loss_kernel,
    _ignore_statistics_kernel,
)
from spml_kernels.ignore_loss.op import FINISH


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernels for compiles without a GPU."""
    for rows, classes in ((16, 80), (128, 81), (128, 5000)):
        for dtype in ("fp32", "bf16"):
            elements, shape = rows * classes, f"{dtype} {rows} x {classes}"
            flat, columns = flat_launch(elements), columns_launch(rows, classes)
            data = f"*{dtype}"
            views: dict[str, str | tuple[str, ...]] = {"logits_ptr": data, "strong_ptr": data}
            yield Case(
                "ignore_statistics",
                shape,
                _ignore_statistics_kernel,
                {
                    "logits_ptr": data,
                    "masked_ptr": data,
                    "codes_ptr": "*i8",
                    "partial_ptr": "*fp32",
                    "gap_ptr": "*fp32",
                    "count_ptr": "*i32",
                    "rows": "i32",
                    "turns": "i32",
                },
                {"CLASSES": classes, "BLOCK_R": columns.rows, "BLOCK_C": columns.classes},
                ("logits_ptr", "masked_ptr", "codes_ptr", "partial_ptr", "gap_ptr", "count_ptr", "rows"),
                columns.warps,
                # Rows of an odd number of classes begin at odd addresses.
                streamed=classes % 8 == 0,
            )
            yield Case(
                "ignore_statistics end",
                shape,
                _ignore_finish_kernel,
                {
                    "partial_ptr": "*fp32",
                    "gap_ptr": "*fp32",
                    "count_ptr": "*i32",
                    "out_ptr": "*fp32",
                    "rows": "i32",
                    "parts": "i32",
                    "programs": "i32",
                },
                {"CLASSES": classes, "BLOCK": FINISH},
                ("partial_ptr", "gap_ptr", "count_ptr", "out_ptr", "rows"),
                streamed=False,
            )
            for form in ("logits", "epsilon"):
                flags = {"STRONG": True, "TARGET": True, "GUARDED": form == "epsilon", "BLOCK": flat.block}
                yield Case(
                    "ignore_loss",
                    f"{shape} {form}",
                    _ignore_loss_kernel,
                    {
                        **views,
                        "masked_ptr": data,
                        "codes_ptr": "*i8",
                        "truth_ptr": "*i8",
                        "gap_ptr": "*fp32",
                        "average_ptr": "*fp32",
                        "guard": "fp32",
                        "rejected_ptr": "*i8",
                        "partial_ptr": "*fp32",
                        "count_ptr": "*i32",
                        "elements": "i32",
                    },
                    {"CLASSES": classes, "REJECT": True, "AVERAGE": True, "TRUTH": True, **flags},
                    (*views, "masked_ptr", "codes_ptr", "truth_ptr", "average_ptr", "rejected_ptr", "elements"),
                    flat.warps,
                )
                yield Case(
                    "ignore_loss backward",
                    f"{shape} {form}",
                    _ignore_backward_kernel,
                    {
                        "upstream_ptr": "*fp32",
                        **views,
                        "codes_ptr": "*i8",
                        "rejected_ptr": "*i8",
                        "guard": "fp32",
                        "d_logits_ptr": data,
                        "d_strong_ptr": data,
                        "elements": "i32",
                    },
                    {"WEAK_GRAD": True, "STRONG_GRAD": True, **flags},
                    (*views, "codes_ptr", "rejected_ptr", "d_logits_ptr", "d_strong_ptr", "elements"),
                    flat.warps,
                )
