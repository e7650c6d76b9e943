"""ASL: the probability margin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spml_fast.methods.asl import asl_point
from tests.support.formulas import (
    N,
    U,
    batch_of,
    make,
    run,
)


def test_asl_costs_nothing_up_to_the_margin() -> None:
    """Exactly: value and gradient, attached weights included."""
    codes = np.full((1, 3), U, np.int8)
    logits = torch.tensor([[math.log(0.049 / 0.951), math.log(0.0499 / 0.9501), math.log(0.0501 / 0.9499)]])
    for weight in ("detached", "attached"):
        method = make("asl", codes, focal_weight=weight, gamma_negative=0.5)
        loss, gradient = run(method, logits, batch_of(codes))
        assert (gradient[0, :2] == 0).all() and gradient[0, 2] > 0 and loss > 0
        assert run(method, logits[:, :2], batch_of(codes[:, :2]))[0] == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("attached", [0.0, 1.0])
def test_a_probability_of_exactly_the_margin_costs_nothing(gamma: float, attached: float) -> None:
    """Nor has it a slope, which a power of 0 would make infinite."""
    z = torch.zeros(3, requires_grad=True)
    loss = asl_point(z, torch.tensor([U, N, U], dtype=torch.int8), 0.0, gamma, 0.5, 1e-8, attached)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.tolist() == [0, 0, 0] and gradient.tolist() == [0, 0, 0]


def test_the_clamp_holds_with_a_smaller_margin() -> None:
    """1 - pm = 1 - p + m comes down to the margin 1e-9; the logarithm stays that of 1e-8, without slope."""
    z = torch.tensor([40.0], dtype=torch.float64, requires_grad=True)
    loss = asl_point(z, torch.tensor([U], dtype=torch.int8), 0.0, 0.0, 1e-9, 1e-8, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-12) and gradient.item() == 0
