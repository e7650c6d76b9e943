"""Repeat-factor sampling: factors by hand, epochs of one length with the right mean."""

from __future__ import annotations

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.repeat_factor import RepeatFactorSampler, repeat_factors
from spml_fast.data.sampler import TrainSampler, Windows


def test_repeat_factors_by_hand():
    # Class 0 in all four images, class 1 in one of four, class 2 observed as a negative only.
    codes = np.array([[1, -1, 0], [1, 1, -1], [1, 0, -1], [1, -1, 0], [-1, 0, 0]], np.int8)
    factors = repeat_factors(SparseLabels.from_dense(codes), 0.5)
    assert factors.tolist() == pytest.approx([1, np.sqrt(0.5 / 0.2), 1, 1, 1])
    assert repeat_factors(SparseLabels.from_dense(codes), 1e-6).tolist() == [1.0] * 5
    with pytest.raises(UserError, match="repeat_threshold is 0"):
        repeat_factors(SparseLabels.from_dense(codes), 0)


@pytest.mark.parametrize("windows", [None, Windows(64, 8)])
def test_repeated_epochs_have_one_length_and_the_right_mean(windows):
    rng = np.random.default_rng(0)
    factors = (1 + rng.exponential(1.0, 300) * (rng.random(300) < 0.4)).astype(np.float32)
    order = RepeatFactorSampler(factors, 300, 32, seed=5, windows=windows)
    counts = np.stack([np.bincount(order.permutation(e), minlength=300) for e in range(200)])
    assert (counts.sum(1) == np.ceil(factors.sum(dtype=np.float64))).all() and order.size == counts[0].sum()
    assert (counts >= np.floor(factors)).all() and (counts <= np.ceil(factors * (1 + 1 / 300))).all()
    np.testing.assert_allclose(counts.mean(0), factors, atol=0.15)
    assert counts.mean() == pytest.approx(factors.mean(), rel=1 / 300)
    again = RepeatFactorSampler(factors, 300, 32, seed=5, windows=windows)
    assert np.array_equal(order.permutation(7), again.permutation(7))
    assert not np.array_equal(order.permutation(7), order.permutation(8))
    if windows is None:
        # Repeats of an image do not follow each other more often than chance has them.
        epochs = [order.permutation(e) for e in range(50)]
        assert np.mean([(p[1:] == p[:-1]).sum() for p in epochs]) < 5


def test_ranks_share_a_repeated_epoch_and_plain_factors_change_nothing():
    factors = np.linspace(1, 3, 50).astype(np.float32)
    whole = [u[0].index for u in RepeatFactorSampler(factors, 50, 20, seed=1).epoch(3)]
    parts = [[u[0].index for u in RepeatFactorSampler(factors, 50, 20, 1, 4, r, 1).epoch(3)] for r in range(4)]
    assert all(np.array_equal(w, np.concatenate(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    plain = RepeatFactorSampler(np.ones(50, np.float32), 50, 20, seed=1)
    assert sorted(plain.permutation(2)) == list(range(50))
    assert plain.updates_per_epoch == TrainSampler(50, 20).updates_per_epoch
