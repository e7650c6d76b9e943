"""Ahead-of-time cases of label_rows."""

from __future__ import annotations

from collections.abc import Iterator

from spml_kernels.common.heuristics import label_rows_launch
from spml_kernels.devtools.aot import Case
from spml_kernels.label_rows.kernels import _label_rows_kernel


def aot_cases(arch: int = 90) -> Iterator[Case]:
    """The kernel for compiles without a GPU."""
    for classes, kind in ((20, "i16"), (80, "i16"), (5000, "i16"), (9605, "i16"), (40000, "i32")):
        launch = label_rows_launch(classes)
        yield Case(
            "label_rows",
            f"{classes} classes",
            _label_rows_kernel,
            {
                "indptr_ptr": "*i64",
                "classes_ptr": f"*{kind}",
                "codes_ptr": "*i8",
                "index_ptr": "*i64",
                "out_ptr": "*i8",
                "num_classes": "i32",
            },
            {"DEFAULT": -1, "BLOCK": launch.block, "ENTRIES": launch.entries},
            ("indptr_ptr", "classes_ptr", "codes_ptr", "index_ptr", "out_ptr")
            + (("num_classes",) if classes % 16 == 0 else ()),
            launch.warps,
            streamed=False,
        )
