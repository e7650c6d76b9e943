"""ASL: the probability margin."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.support.formulas import (
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
