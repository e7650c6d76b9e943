"""Baselines on batches without positives, without labels, of one image, and at extreme logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spml_fast.methods import get_method
from tests.support.formulas import (
    BASELINES,
    N,
    P,
    U,
    batch_of,
    make,
    run,
)

EDGE_CODES = {
    "no positives": np.array([[N, U, U, N], [U, U, N, U]], np.int8),
    "all unknown": np.full((2, 4), U, np.int8),
    "all positive": np.full((2, 4), P, np.int8),
    "one image": np.array([[P, U, N, U]], np.int8),
}


@pytest.mark.parametrize("edge", EDGE_CODES)
@pytest.mark.parametrize("name", BASELINES)
def test_edges_are_finite(name: str, edge: str) -> None:
    """Also at |logit| = 100, where p underflows in fp32; in both forms of the logarithm."""
    codes = EDGE_CODES[edge]
    forms = ("released", "logits") if hasattr(get_method(name).Options(), "log_form") else (None,)
    for form in forms:
        method = make(name, codes, **({"log_form": form} if form else {}))
        if name == "em_apl":
            method.add(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
        for logits in (torch.zeros(codes.shape), torch.tensor([100.0, -100, 100, -100]).expand(codes.shape)):
            loss, gradient = run(method, logits.contiguous(), batch_of(codes, truth=np.maximum(codes, 0)))
            assert torch.isfinite(loss) and torch.isfinite(gradient).all(), (form, loss, gradient)


@pytest.mark.parametrize("name", ["iu", "durand"])
def test_nothing_known_costs_nothing(name: str) -> None:
    loss, gradient = run(make(name, EDGE_CODES["all unknown"]), torch.randn(2, 4), batch_of(EDGE_CODES["all unknown"]))
    assert loss == 0 and (gradient == 0).all()


def test_logits_form_keeps_its_gradient() -> None:
    """Where the guarded form has lost it: that is what the option is for."""
    codes = np.array([[P, U]], np.int8)
    logits = torch.tensor([[-30.0, 30.0]], dtype=torch.float64)
    for name, other in (("wan", {"gamma": 1.0}), ("an_ls", {"smoothing": 0.0})):
        assert run(make(name, codes, **other), logits, batch_of(codes))[1].abs().max() < 1e-7
        exact = run(make(name, codes, log_form="logits", **other), logits, batch_of(codes))[1] * 2
        np.testing.assert_allclose(exact, [[-1, 1]], atol=1e-9)
