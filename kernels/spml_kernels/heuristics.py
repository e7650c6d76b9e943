"""Block sizes and grids as pure functions of shapes, so that every rank and every run launches the same programs.

Nothing here looks at a device; `sms` and the like are arguments. No number here has been tuned on a GPU yet: they come
from register and shared-memory counts of ahead-of-time compiles (see docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

from spml_kernels.jit import cdiv


class Flat(NamedTuple):
    """Launch of a kernel that walks a tensor as one long row.

    Attributes:
        block: elements a program.
        warps: warps a program.
        programs: grid size.
    """

    block: int
    warps: int
    programs: int


def flat_launch(elements: int) -> Flat:
    """Point-wise kernels. 16 elements a thread: one 128-bit load of int8 codes, four of fp32 logits."""
    block = 2048 if elements > 2048 * 64 else 512
    return Flat(block, 4 if block == 2048 else 1, cdiv(elements, block))


def histogram_launch(elements: int) -> Flat:
    """Passes of the radix select: few programs, since each adds its histogram to the one in memory."""
    block = 2048
    return Flat(block, 8, max(1, min(cdiv(elements, block), 128)))
