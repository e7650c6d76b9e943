"""How many labels the large losses select: the published schedule.

Source: docs/sources.md#large-loss.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from spml_fast.methods import get_method
from spml_fast.methods.large_loss import clean_rate, selection_size

RAMPS = {"ll_r": (0.5, True), "ll_ct": (0.2, True), "ll_cp": (0.1, False)}
ENTRIES = {"voc": 320, "coco": 1280, "nus": 1296, "cub": 4992, "coco_last": 80}
# k in epochs 1 to 10 at the batch of 16 (the last batch of COCO has one image).
SCHEDULE = {
    ("ll_r", "voc"): [0, 2, 4, 5, 7, 9, 10, 12, 13, 15],
    ("ll_r", "coco"): [0, 7, 13, 20, 26, 33, 39, 45, 52, 58],
    ("ll_r", "nus"): [0, 7, 13, 20, 26, 33, 39, 46, 52, 59],
    ("ll_r", "cub"): [0, 25, 50, 75, 100, 125, 150, 175, 200, 225],
    ("ll_r", "coco_last"): [0, 1, 1, 2, 2, 3, 3, 3, 4, 4],
    ("ll_ct", "voc"): [0, 1, 2, 2, 3, 4, 4, 5, 6, 6],
    ("ll_ct", "coco"): [0, 3, 6, 8, 11, 13, 16, 18, 21, 24],
    ("ll_ct", "nus"): [0, 3, 6, 8, 11, 13, 16, 19, 21, 24],
    ("ll_ct", "cub"): [0, 10, 20, 30, 40, 50, 60, 70, 80, 90],
    ("ll_ct", "coco_last"): [0, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    ("ll_cp", "voc"): [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ("ll_cp", "coco"): [0, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ("ll_cp", "nus"): [0, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ("ll_cp", "cub"): [0, 5, 5, 5, 5, 5, 5, 5, 5, 5],
    ("ll_cp", "coco_last"): [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize(("name", "data"), SCHEDULE)
def test_published_schedule(name, data):
    delta, ramp = RAMPS[name]
    assert get_method(name).Options().delta_rel == delta
    assert get_method(name).permanent is not ramp
    sizes = [selection_size(ENTRIES[data], delta, epoch, ramp, "accumulator") for epoch in range(1, 11)]
    assert sizes == SCHEDULE[name, data]


def test_exact_arithmetic_differs_where_rounding_did():
    """The released accumulator selects one more in epoch 6 of VOC and COCO, where B C r is whole."""
    differs = {}
    for name, (delta, ramp) in RAMPS.items():
        for data, entries in ENTRIES.items():
            exact = [selection_size(entries, delta, epoch, ramp, "rational") for epoch in range(1, 11)]
            steps = [epoch - 1 if ramp else min(epoch - 1, 1) for epoch in range(1, 11)]
            assert exact == [math.ceil(entries * s * Fraction(str(delta)) / 100) for s in steps]
            pairs = zip(exact, SCHEDULE[name, data], strict=True)
            changed = {epoch: (a, b) for epoch, (a, b) in enumerate(pairs, 1) if a != b}
            if changed:
                differs[name, data] = changed
    assert differs == {
        ("ll_r", "voc"): {6: (8, 9)},
        ("ll_r", "coco"): {6: (32, 33)},
        ("ll_r", "coco_last"): {6: (2, 3)},
    }


def test_rejected_labels_per_epoch_of_a_public_run():
    """65,665 images of COCO: 4,104 batches of 16 and one of 1."""
    totals = [
        4104 * selection_size(1280, 0.5, epoch, True, "accumulator")
        + selection_size(80, 0.5, epoch, True, "accumulator")
        for epoch in range(2, 11)
    ]
    assert totals == [28729, 53353, 82082, 106706, 135435, 160059, 184683, 213412, 238036]


def test_clean_rate_is_the_released_accumulator():
    rate = 1.0
    for epoch in range(1, 30):
        assert clean_rate(0.5, epoch) == rate
        rate -= 0.5 / 100


@pytest.mark.parametrize("rule", ["accumulator", "rational"])
def test_from_nothing_to_everything(rule: str) -> None:
    assert [selection_size(60, 100.0, epoch, True, rule) for epoch in (1, 2, 3)] == [0, 60, 60]
    assert [selection_size(60, 0.0, epoch, True, rule) for epoch in (1, 2, 3)] == [0, 0, 0]
