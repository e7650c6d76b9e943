"""EM: images and classes that have nothing but entropy."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.formulas import (
    EPOCH_1,
    P,
    U,
    batch_of,
    make,
    run,
)


def test_em_on_rows_without_positives_is_negative_and_reported() -> None:
    """Not mended: the loss is negative and pulls to p = 0.5."""
    codes = np.array([[U, U, U], [P, U, U]], np.int8)
    method = make("em", codes)
    out = method.loss(torch.zeros(2, 3), batch_of(codes), EPOCH_1)
    assert out.metrics["rows_without_positive_count"] == 1
    assert method.on_epoch_end(EPOCH_1)["classes_without_positives"] == 2
    empty = np.full((1, 3), U, np.int8)
    loss, gradient = run(make("em", empty), torch.tensor([[-2.0, 0.0, 2.0]]), batch_of(empty))
    assert loss < 0
    assert gradient[0, 0] < 0 and gradient[0, 1].abs() < 1e-7 and gradient[0, 2] > 0
