"""an, full and partial: their formulas, and the labels that they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.methods import get_method
from tests.support.large_loss import cross_entropy, double_batch, make, run
from tests.support.methods import at


@pytest.mark.parametrize("name", ["an", "full"])
def test_assumed_negative_formula(name):
    logits, codes = double_batch()
    out, gradient = run(make(name), logits, codes, at(1, 0))
    loss, slope = cross_entropy(logits, codes.numpy() == 1)
    assert out.loss.item() == pytest.approx(loss.mean(), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope / loss.size, rtol=1e-11, atol=1e-16)


def test_partial_formula():
    logits, codes = double_batch()
    out, gradient = run(make("partial"), logits, codes, at(1, 0))
    known = codes.numpy() != -1
    loss, slope = cross_entropy(logits, codes.numpy() == 1)
    assert out.loss.item() == pytest.approx(loss[known].mean(), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), np.where(known, slope, 0) / known.sum(), rtol=1e-11, atol=1e-16)


def test_partial_without_known_labels_is_zero():
    logits, codes = double_batch(unknown=1.0)
    out, gradient = run(make("partial"), logits, codes, at(1, 0))
    assert out.loss.item() == 0 and (gradient == 0).all()


def test_labels_that_do_not_suit_a_method():
    dense = np.array([[1, -1, 0], [0, 1, 0]], dtype=np.int8)
    full, partial = get_method("full"), get_method("partial")
    for default in (-1, 0):
        with pytest.raises(UserError, match="full needs every label"):
            full.check_labels(SparseLabels.from_dense(dense, default), full.Options(name="full"))
        full.check_labels(SparseLabels.from_dense(abs(dense), default), full.Options(name="full"))
    singles = SparseLabels.from_positives([[0], [2]], 3, default=-1)
    with pytest.raises(UserError, match="no observed negative"):
        partial.check_labels(singles, partial.Options(name="partial"))
    partial.check_labels(SparseLabels.from_dense(dense), partial.Options(name="partial"))
    partial.check_labels(SparseLabels.from_positives([[0], [2]], 3, default=0), partial.Options(name="partial"))
