"""All ops at the shapes that matter.

`works` is what `bench_kernels.py` times and counts and what the tests of the byte counter check. A further op joins by
a function in `kernel_maps.py` or `kernel_losses.py` that yields its `KernelWork`s, in `OPS`; a further method's point
function joins by itself, through its `examples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.kernel_base import KernelWork
from benchmarks.kernel_losses import (
    ignore_loss_works,
    ignore_statistics_works,
    label_loss_works,
    label_rows_works,
    large_loss_works,
)
from benchmarks.kernel_maps import cam_mask_works, cam_works
from benchmarks.kernel_sweep import SWEEPS

OPS: dict[str, Callable[[bool], Iterator[KernelWork]]] = {
    "cam_pool": cam_works,
    "cam_mask": cam_mask_works,
    "label_loss": label_loss_works,
    "large_loss": large_loss_works,
    "ignore_statistics": ignore_statistics_works,
    "ignore_loss": ignore_loss_works,
    "label_rows": label_rows_works,
}


def works(ops: list[str], small: bool = False, shapes: list[str] | None = None) -> list[KernelWork]:
    """All works of these ops.

    Args:
        ops: names in `OPS`, or in `SWEEPS` for an op with other launches than the shipped ones.
        small: a few shapes of each.
        shapes: only those whose shape contains one of these texts.
    """
    found = [work for op in ops for work in {**OPS, **SWEEPS}[op](small)]
    return found if shapes is None else [work for work in found if any(text in work.shape for text in shapes)]
