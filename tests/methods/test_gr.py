"""GR: its schedules."""

from __future__ import annotations

import pytest

from spml_fast.methods import Progress
from spml_fast.methods.gr import GROptions, gr_schedule


def test_gr_schedule() -> None:
    """(w, b) reach (E - 1)/E of the way, (mu, s) all of it; linear epochs stand at the start."""
    coco = GROptions(w_end=10.0, b_end=-8.0)
    assert gr_schedule(coco, Progress(1, 8, 0, 1)) == pytest.approx((0, -2, 0.5375, 1.8125))
    assert gr_schedule(coco, Progress(8, 8, 0, 1)) == pytest.approx((8.75, -7.25, 0.8, 0.5))
    assert gr_schedule(GROptions(), Progress(5, 8, 0, 1)) == pytest.approx((1, -2, 0.6875, 1.0625))
    rising = GROptions(w_start=1.0, w_end=3.0, b_start=1.0, b_end=-3.0)
    assert gr_schedule(rising, Progress(5, 8, 0, 1))[:2] == pytest.approx((2, -1))
    for epoch in (1, 3):
        assert gr_schedule(coco, Progress(epoch, 3, 0, 1, phase="linear")) == (0, -2, 0.5, 2)
