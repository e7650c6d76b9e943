"""The pointing game and MaxBoxAcc, on maps whose boxes are known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from spml_fast.analysis.localisation import (
    SIDE,
    THRESHOLDS,
    box_accuracy,
    box_overlap,
    boxes_of,
    cells_in_boxes,
    overlaps,
    peak_in_boxes,
    peaks,
    scaled_map,
)
from spml_fast.data.manifest import Manifest


def test_peaks_are_cell_centres_as_fractions() -> None:
    maps = np.zeros((2, 2, 4))
    maps[0, 1, 2] = 1
    # All equal: the first.
    assert peaks(maps).tolist() == [[0.625, 0.75], [0.125, 0.25]]


def test_cells_in_boxes_take_the_union() -> None:
    inside = cells_in_boxes([[0, 0, 0.5, 0.5], [0.7, 0.1, 1, 1]], 2, 4)
    assert inside.tolist() == [[True, True, False, True], [False, False, False, True]]


def test_a_peak_is_in_a_box_or_not() -> None:
    cells = np.array([[0.0, 1, 3], [5, 2, 5]])
    assert peak_in_boxes(cells, [[0, 0.5, 0.4, 1]])
    # Of the two highest the first counts.
    assert not peak_in_boxes(cells, [[0.6, 0.5, 1, 1]])
    assert peak_in_boxes(cells, [[0.9, 0.9, 1, 1], [0, 0, 1, 1]])


def test_box_overlap_by_hand() -> None:
    first = [[0, 0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.9]]
    second = [[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]
    # Half of each in common: 1 / 3; edges that touch: 0; a quarter of the whole: 1 / 4. A line has no area.
    np.testing.assert_allclose(box_overlap(first, second), [[1, 1 / 3, 0, 1 / 4], [0, 0, 0, 0]], atol=1e-12)
    assert box_overlap([[0.1, 0.1, 0.1, 0.1]], [[0.1, 0.1, 0.1, 0.1]]).tolist() == [[0]]


def test_boxes_of_a_class(small_digits: Path) -> None:
    split = Manifest(small_digits).split("test")
    assert split.boxes is not None
    known = split.known.rows(range(20))
    for sample in range(20):
        for class_id in range(10):
            found = boxes_of(split.boxes, sample, class_id)
            assert found.shape[1:] == (4,) and (len(found) > 0) == (known[sample, class_id] == 1)
            assert ((found[:, 2:] > found[:, :2]).all()) and found.min(initial=0) >= 0 and found.max(initial=1) <= 1


# Two bright rectangles on a dark map of 8 x 8 cells at 8 x 8 pixels, so that cells are pixels: a high one of 2 x 3, a
# lower one of 3 x 3.
MAP = np.zeros((8, 8))
MAP[1:3, 1:4] = 1.0
MAP[5:8, 5:8] = 0.6
HIGH, LOW = [1 / 8, 1 / 8, 4 / 8, 3 / 8], [5 / 8, 5 / 8, 1, 1]
AT = np.array([0.0, 0.3, 0.6, 0.61, 1.0])


class TestOverlaps:
    def test_the_largest_part_and_any_part(self) -> None:
        # Everything; both, of which the lower is larger; both; the high one; the high one.
        largest, best = overlaps(MAP, [HIGH], 8, AT)
        np.testing.assert_allclose(largest, [6 / 64, 0, 0, 1, 1])
        np.testing.assert_allclose(best, [6 / 64, 1, 1, 1, 1])
        largest, best = overlaps(MAP, [LOW], 8, AT)
        np.testing.assert_allclose(largest, [9 / 64, 1, 1, 0, 0])
        np.testing.assert_allclose(best, [9 / 64, 1, 1, 0, 0])

    def test_the_best_of_several_boxes(self) -> None:
        largest, best = overlaps(MAP, [[0, 0, 0.1, 0.1], HIGH, LOW], 8, AT)
        np.testing.assert_allclose(largest, [9 / 64, 1, 1, 1, 1])
        np.testing.assert_allclose(best, [9 / 64, 1, 1, 1, 1])

    def test_scale_and_offset_do_not_matter(self) -> None:
        for ours, theirs in zip(overlaps(MAP, [HIGH], 8, AT), overlaps(7 * MAP - 3, [HIGH], 8, AT), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_corners_connect(self) -> None:
        cells = np.zeros((4, 4))
        cells[0, 0] = cells[1, 1] = 1
        largest, best = overlaps(cells, [[0, 0, 0.5, 0.5]], 4, np.array([0.5]))
        assert largest.tolist() == best.tolist() == [1]

    def test_of_parts_as_large_the_first(self) -> None:
        cells = np.zeros((4, 4))
        cells[0, 0] = cells[3, 3] = 1
        largest, best = overlaps(cells, [[0.75, 0.75, 1, 1]], 4, np.array([0.5]))
        assert largest.tolist() == [0] and best.tolist() == [1]

    def test_a_flat_map_is_the_whole_image_at_0_alone(self) -> None:
        largest, best = overlaps(np.full((3, 3), -2.0), [[0, 0, 0.5, 1]], 6, np.array([0.0, 0.01, 0.99]))
        assert largest.tolist() == best.tolist() == [0.5, 0, 0]

    def test_upsampled_as_maps_are_drawn(self) -> None:
        cells = np.zeros((8, 8), np.float32)
        cells[2:4, 5:7] = 1
        large = scaled_map(cells)
        assert large.shape == (SIDE, SIDE) and large.min() == 0 and large.max() == 1
        # Half way between cell centres is half way between their values: the cells' own edges.
        largest, _ = overlaps(cells, [[5 / 8, 2 / 8, 7 / 8, 4 / 8]])
        assert largest[50] > 0.9 and THRESHOLDS[largest.argmax()] == pytest.approx(0.5, abs=0.05)

    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 10_000))
    def test_as_threshold_by_threshold(self, seed: int) -> None:
        """All thresholds at once are what each gives by itself."""
        rng = np.random.default_rng(seed)
        cells = rng.integers(0, 4, (5, 6)) * rng.random((5, 6))
        boxes = np.sort(rng.random((2, 2, 2)), 1).reshape(2, 4)
        thresholds = np.array([0, 0.2, 0.5, 0.9])
        largest, best = overlaps(cells, boxes, 12, thresholds)
        large = scaled_map(cells, 12)
        for place, threshold in enumerate(thresholds):
            parts, count = ndimage.label(large >= threshold, np.ones((3, 3)))
            found, sizes = [], []
            for part in range(1, count + 1):
                y, x = np.nonzero(parts == part)
                edges = [[x.min() / 12, y.min() / 12, (x.max() + 1) / 12, (y.max() + 1) / 12]]
                found.append(box_overlap(edges, boxes).max())
                sizes.append(len(x))
            assert largest[place] == pytest.approx(found[int(np.argmax(sizes))])
            assert best[place] == pytest.approx(max(found))


class TestBoxAccuracy:
    def test_one_threshold_for_all(self) -> None:
        """Each pair is right at some threshold, but no more than three of four at one."""
        largest = np.array([[0.9, 0.1, 0.0], [0.5, 0.6, 0.4], [0.1, 0.5, 0.9], [0.2, 0.7, 0.49]])
        best = np.array([[0.9, 0.3, 0.0], [0.5, 0.6, 0.7], [0.1, 0.5, 0.9], [0.2, 0.7, 0.5]])
        found = box_accuracy(largest, best, np.array([4, 4, 4, 9]), np.array([0.0, 0.4, 0.8]))
        # An IoU of exactly 0.5 counts.
        assert (found.max_box_acc, found.threshold) == (75, 0.4)
        assert found.class_mean == pytest.approx(100 * (2 / 3 + 1) / 2)
        assert found.by_overlap == {"0.3": 100, "0.5": 75, "0.7": 50}
        assert found.max_box_acc_v2 == 75

    def test_of_equal_thresholds_the_lowest(self) -> None:
        found = box_accuracy(np.full((2, 3), 0.6), np.full((2, 3), 0.6), np.array([0, 1]), np.array([0.1, 0.2, 0.3]))
        assert (found.max_box_acc, found.threshold, found.class_mean) == (100, 0.1, 100)
        assert found.max_box_acc_v2 == pytest.approx(200 / 3)
