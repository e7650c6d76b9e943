"""Sorting only the entries that share a bin with a positive changes no bit of average precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.evaluation import average_precision as module
from spml_fast.evaluation import selection
from spml_fast.evaluation.average_precision import average_precision
from spml_fast.evaluation.selection import select_entries

Scores = npt.NDArray[np.float32]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries are selected from, too."""
    monkeypatch.setattr(selection, "_FEWEST", 2)


def everything_sorted(scores: Scores, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    known = np.full(scores.shape[1], len(scores))
    return module._block_ap(scores, codes, known, "sklearn")


def draws(seed: int, rows: int, classes: int, kind: str) -> tuple[Scores, npt.NDArray[np.int8]]:
    """Scores of some distribution, and codes with few positives that score higher."""
    rng = np.random.default_rng(seed)
    codes = (rng.random((rows, classes)) < 0.05).astype(np.int8)
    scores = rng.normal(size=(rows, classes)) * 3 + codes
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "saturated":
        scores = np.clip(scores, -2, 2)
    elif kind == "outlier":
        scores[0] = 1e30
    elif kind == "tiny":
        scores *= 1e-38
    elif kind == "far":
        scores = scores * 1e-4 + 1000
    elif kind == "zeros":
        scores = np.where(scores < 0, -0.0, 0.0)
    return scores.astype(np.float32), codes


KINDS = ("plain", "ties", "saturated", "outlier", "tiny", "far", "zeros")


@pytest.mark.usefixtures("always")
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 200), st.integers(1, 5), st.sampled_from(KINDS))
def test_the_same_bits(seed: int, rows: int, classes: int, kind: str) -> None:
    scores, codes = draws(seed, rows, classes, kind)
    expected = everything_sorted(scores, codes)
    np.testing.assert_array_equal(average_precision(scores, codes).ap, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_at_size(kind: str) -> None:
    scores, codes = draws(0, 20_001, 7, kind)
    np.testing.assert_array_equal(average_precision(scores, codes).ap, everything_sorted(scores, codes))


def test_classes_that_are_not_annotated_everywhere() -> None:
    """In a block with others that are; unknown rows of the highest scores count for nothing."""
    scores, codes = draws(4, 20_001, 5, "plain")
    codes[:, 2][scores[:, 2] > 2] = -1
    expected = [
        module._block_ap(scores[:, [c]], codes[:, [c]], (codes[:, [c]] >= 0).sum(0), "sklearn") for c in range(5)
    ]
    np.testing.assert_array_equal(average_precision(scores, codes).ap, np.concatenate(expected))
    assert average_precision(scores, np.abs(codes)).ap[2] != expected[2]


def test_scores_that_fp32_cannot_tell_apart() -> None:
    scores, codes = draws(5, 20_001, 2, "plain")
    fine = 1 + 1e-9 * scores.astype(np.float64)
    np.testing.assert_array_equal(average_precision(fine, codes).ap, everything_sorted(scores, codes))


def test_not_all_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it pays, it is done; float64, whose bits do not fit, is sorted whole."""
    scores, codes = draws(0, 20_001, 7, "plain")
    expected = everything_sorted(scores, codes)

    def refuse(*_: object) -> None:
        raise AssertionError("everything is sorted")

    monkeypatch.setattr(module, "_block_ap", refuse)
    np.testing.assert_array_equal(average_precision(scores, codes).ap, expected)
    for other in (scores.astype(np.float64), scores):
        with pytest.raises(AssertionError, match="everything is sorted"):
            average_precision(other, codes, "sklearn" if other is not scores else "rank")


def test_a_part_is_selected() -> None:
    scores, codes = draws(1, 20_000, 3, "plain")
    flat, positive = np.ascontiguousarray(scores.T), np.ascontiguousarray(codes.T == 1)
    found = select_entries(flat, positive)
    assert found is not None and len(found.entries) < 0.25 * flat.size
    # Every positive is there, and so many entries of its class rank above it or are equal to it.
    assert np.isin(np.flatnonzero(positive), found.entries).all()
    rest = np.setdiff1d(np.arange(flat.size), found.entries)
    at = 0
    for c in range(3):
        others = flat[c][rest[rest // 20_000 == c] % 20_000]
        ranked = np.sort(flat[c][positive[c]])[::-1]
        np.testing.assert_array_equal(found.skipped[at : at + len(ranked)], [(others > s).sum() for s in ranked])
        assert not np.isin(others, ranked).any()
        at += len(ranked)


def test_where_all_are_sorted() -> None:
    scores, codes = draws(2, 5_000, 2, "plain")
    flat, positive = np.ascontiguousarray(scores.T), np.ascontiguousarray(codes.T == 1)
    assert select_entries(flat, positive) is not None
    infinite = flat.copy()
    infinite[1, 3] = np.inf
    assert select_entries(infinite, positive) is None
    assert select_entries(flat[:, :4000].copy(), positive[:, :4000].copy()) is None, "few entries"
    assert select_entries(flat, ~positive) is None, "many positives"
    assert select_entries(np.zeros_like(flat), positive) is None, "one bin"
    infinite_too = scores.copy()
    infinite_too[7, 0], infinite_too[9, 1] = np.inf, -np.inf
    np.testing.assert_array_equal(average_precision(infinite_too, codes).ap, everything_sorted(infinite_too, codes))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two classes, rows in chunks; several threads and one."""
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 20_000)
    monkeypatch.setattr("spml_fast.evaluation.entries.BLOCK_ENTRIES", 20_000)
    scores, codes = draws(3, 10_000, 9, "ties")
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        result = average_precision(scores, codes)
        found[threads] = np.concatenate([result.ap, result.positives, result.negatives])
    np.testing.assert_array_equal(found[1], found[3])
    np.testing.assert_array_equal(found[1][:9], everything_sorted(scores, codes))
