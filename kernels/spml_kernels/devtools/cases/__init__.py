"""Every kernel at its main shapes, with the launch parameters that the ops would choose; a module per op."""

from __future__ import annotations

from collections.abc import Iterator

from spml_kernels.devtools.aot import Case
from spml_kernels.devtools.cases import cam_mask, cam_pool, ignore_loss, label_loss, label_rows, large_loss

MODULES = (label_loss, large_loss, label_rows, cam_pool, cam_mask, ignore_loss)


def cases(arch: int) -> Iterator[Case]:
    """All cases, as launched on this compute capability."""
    for module in MODULES:
        yield from module.aot_cases(arch)
