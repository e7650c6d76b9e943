"""SPLC: when labels are corrected, and which."""

from __future__ import annotations

import math

import numpy as np
import torch

from spml_fast.methods import Progress
from tests.support.formulas import (
    N,
    P,
    U,
    batch_of,
    make,
    run,
)


def test_splc_corrects_from_the_second_epoch_on() -> None:
    codes = np.array([[P, U, U, N]], np.int8)
    # 0.59 and 0.61: tau lies between; the observed negative is never corrected.
    logits = torch.tensor([[2.0, math.log(0.59 / 0.41), math.log(0.61 / 0.39), 3.0]])
    method = make("splc", codes)
    truth = np.array([[P, N, P, N]], np.int8)
    for epoch, signs in ((1, [-1, 1, 1, 1]), (2, [-1, 1, -1, 1]), (30, [-1, 1, -1, 1])):
        out = method.loss(logits, batch_of(codes, truth=truth), Progress(epoch, 30, 0, 1))
        _, gradient = run(method, logits, batch_of(codes), Progress(epoch, 30, 0, 1))
        assert torch.sign(gradient)[0].tolist() == signs
        assert out.metrics["selected_count"] == out.metrics["selected_true_count"] == (epoch > 1)
        assert out.metrics["hidden_positive_count"] == 1
    late = make("splc", codes, change_epoch=3)
    assert [late.corrects(Progress(t, 9, 0, 1)) for t in (1, 3, 4)] == [False, False, True]


def test_splc_a_probability_of_exactly_tau_is_no_correction() -> None:
    codes = np.array([[P, U, U]], np.int8)
    logits = torch.tensor([[0.0, 0.0, 0.01]])
    method, place = make("splc", codes, tau=0.5), Progress(2, 9, 0, 1)
    assert method.loss(logits, batch_of(codes), place).metrics["selected_count"] == 1
    assert torch.sign(run(method, logits, batch_of(codes), place)[1])[0].tolist() == [-1, 1, -1]
