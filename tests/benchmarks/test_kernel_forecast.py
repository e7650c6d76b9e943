"""Instructions read from machine code, and the forecast made of them."""

from __future__ import annotations

import re

import pytest
import torch
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("needs triton, not interpreting", allow_module_level=True)

from spml_kernels.devtools.aot import Report, instructions

from benchmarks.kernel_bytes import Compiler, launches_of
from benchmarks.kernel_forecast import BYTES, CARD, CLOCK, GAP, MARKS, PRODUCTS, SCHEDULERS, forecast
from benchmarks.kernel_losses import label_loss_work
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_works import OPS
from spml_fast.methods.assume_negative import AssumeNegative
from tests.support.paths import ROOT


def machine_code(*lines: str) -> str:
    """As cuobjdump prints it: an address and an instruction, and a line of its encoding."""
    return "\n".join(
        f"        /*{16 * n:04x}*/    {line} ;    /* 0x0 */\n        /* 0x1 */" for n, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("lines", "longest", "loops"),
    [
        (("MOV R1, R2", "@P0 EXIT", "FADD R1, R1, R2", "EXIT", "BRA 0x40"), 4, ()),
        # Of two sides the longer one: 0, 1, 2, 3, 5, 6.
        (("MOV R1, R2", "@!P0 BRA 0x40", "FADD R1, R1, R2", "BRA 0x50", "NOP", "MOV R3, R1", "EXIT"), 6, ()),
        # A loop of three, which a uniform predicate may lead out of, within a loop of six.
        (
            ("NOP", "MOV R1, R2", "FADD R1, R1, R2", "FADD R1, R1, R2", "@P0 BRA P1, 0x20", "@UP0 BRA 0x10", "EXIT"),
            7,
            (3,),
        ),
        (("NOP", "@P0 BRA 0x00", "NOP", "@P0 BRA 0x20", "EXIT"), 5, (2, 2)),
    ],
)
def test_instructions_of_the_longest_way(lines, longest, loops):
    assert instructions(machine_code(*lines)) == (longest, loops)


class Known(Compiler):
    """Machine code that is known beforehand."""

    def __init__(self, **reports: Report) -> None:
        super().__init__(90)
        self.known = reports

    def report(self, launch):
        """By the kernel's name."""
        return self.known[launch.name]


def known(warps: int, longest: int, loops: tuple[int, ...] = ()) -> Report:
    return Report(32, 0, 0, warps, {}, {}, 0, (), True, longest, loops)


def test_the_longest_of_bytes_and_instructions_counts():
    work = label_loss_work(512, 9605, AssumeNegative.point, ())
    launch = next(s for s in launches_of(work, "fused", "fwd") if s.kernel is not None)
    for longest in (1, 10_000):
        found = forecast([launch], Known(_label_loss_kernel=known(8, longest)), 0.0, 0.0)
        programs = launch.grid[0]
        assert found.bytes_ == pytest.approx((512 * 9605 * 5 + 4 * programs) / (BYTES * CARD.memory * 1e3))
        assert found.instructions == pytest.approx(max(programs * 8 * longest / SCHEDULERS, 2 * longest) / CLOCK)
        assert found.all_ == GAP + (found.bytes_ if longest == 1 else found.instructions)
        assert found.issued == programs * 8 * 32 * longest


def test_sums_come_after_products_and_loops_turn():
    work = cam_work(128, 14, 2048, 5000, torch.bfloat16)
    launch = next(s for s in launches_of(work, "fused", "fwd") if s.name == "_cam_pool_fwd_kernel")
    # 32 turns of 95, of which the longest way has one; slices of 64 cells lie in 1 + 63 / 196 images.
    found = forecast(
        [launch], Known(_cam_pool_fwd_kernel=known(8, 2000, (95, 200, 200, 200, 200))), work.flops["fwd"], 0
    )
    warp = 2000 + 31 * 95 + 4 * 63 / 196 * 200
    assert found.issued == pytest.approx(32 * 8 * launch.grid[0] * warp)
    assert found.products == pytest.approx(work.flops["fwd"] / (PRODUCTS * CARD.half * 1e6))
    after = found.instructions * (1 - 32 * 95 / warp)
    assert found.all_ == pytest.approx(found.products + after + GAP)


def test_the_page_has_a_forecast_of_every_op():
    """Floor, bytes, launches, instructions, forecast, goal, and that nothing of it was measured."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = page.split(MARKS.begin)[1].split(MARKS.end)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert {row[0].split()[0] for row in cells} == set(OPS)
    assert all(len(row) == 9 and all(row) for row in cells)
    assert {row[-1] for row in cells} == {"not measured"}
    assert all(re.search(r"\*\*[\d.e+]+\*\*", row[5]) for row in cells)


def test_a_step_has_the_forward_s_product_and_two_more():
    work = cam_work(128, 14, 2048, 5000, torch.bfloat16)
    launches = launches_of(work, "fused", "step")
    names = {s.name for s in launches if s.kernel is not None}
    found = forecast(launches, Known(**{name: known(8, 10, (1,) * 5) for name in names}), work.flops["step"], 0)
    products = work.flops["step"] / (PRODUCTS * CARD.half * 1e6)
    assert found.products == pytest.approx(products)
    assert found.all_ >= products + GAP * len(launches)
    first = forecast(launches[:1], Known(**{name: known(8, 10, (1,) * 5) for name in names}), work.flops["fwd"], 0)
    assert first.products == pytest.approx(products / 3)
