"""Baselines give the same on any number of ranks and for an update in micro-steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.methods import get_method
from tests.support.formulas import (
    BASELINES,
    CODES,
    EPOCH_3,
    U,
    batch_of,
    make,
    run,
    some_codes,
    some_logits,
)
from tests.support.methods import on_ranks

RANK_OPTIONS: dict[str, dict[str, Any]] = {"p_asl": {"prior": "running", "eta": 0.45, "top_k": 2}}


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("name", BASELINES)
def test_any_number_of_ranks_gives_the_same(name: str, rows: int) -> None:
    """Mean of the ranks' losses and gradients, and the state after two steps, as on one rank."""
    codes = some_codes(rows, 6)
    truth = np.where(codes == U, 0, codes).astype(np.int8)
    logits = [some_logits(rows, 6, seed) for seed in (1, 2)]
    steps = [replace(EPOCH_3, update=8 + i) for i in range(2)]

    def train(parts: list[np.ndarray], rank: int) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]:
        method = make(name, codes, **RANK_OPTIONS.get(name, {}))
        if name == "em_apl":
            method.add(torch.tensor([1, 3]), torch.tensor([2, 5]), torch.tensor([0.1, 0.2]))
        batch = batch_of(codes, parts[rank], rows, truth)
        out = [run(method, z[parts[rank]], batch, step) for z, step in zip(logits, steps, strict=True)]
        return out, method.state_dict() | {"shard": method.rank_state()}

    alone, state = train([np.arange(rows)], 0)
    whole = state.pop("shard")
    parts = np.array_split(np.arange(rows), 2)
    ranks = on_ranks(2, lambda rank: train(parts, rank))
    for i, (loss, gradient) in enumerate(alone):
        torch.testing.assert_close(torch.stack([r[0][i][0] for r in ranks]).mean(), loss, rtol=1e-9, atol=1e-12)
        both = torch.cat([r[0][i][1] for r in ranks]) / 2
        # The table of ROLE is fp32.
        tolerance = 1e-8 if name == "role" else 1e-12
        torch.testing.assert_close(both, gradient, rtol=1e-9, atol=tolerance)
    for key, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(ranks[0][1][key], ranks[1][1][key]), f"{key} differs between ranks"
            torch.testing.assert_close(ranks[0][1][key], value, rtol=1e-5, atol=1e-7)
    for key, value in whole.items() if name == "role" else ():
        # Rank r has the rows of samples r, r + 2, ...
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][1]["shard"][key], value[rank::2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["epr", "role", "p_asl"])
def test_exact_accumulation(name: str) -> None:
    """Two micro-steps of 3 and 5 with the whole update's statistics: the gradient of one step of 8."""
    codes = some_codes(8, 6)
    logits = some_logits(8, 6)
    options: dict[str, Any] = {"reduction": "mean", "top_k": 1} if name == "p_asl" else {}
    whole, gradient = run(make(name, codes, **options), logits, batch_of(codes))
    method = make(name, codes, **options)
    batches = [batch_of(codes, range(3)), batch_of(codes, range(3, 8))]
    parts = list(logits.split([3, 5]))
    for batch, statistics in zip(batches, method.update_statistics(parts, batches, EPOCH_3), strict=True):
        batch.update_statistics = statistics
    parts_of_update = [run(method, z, b) for z, b in zip(parts, batches, strict=True)]
    pieces = torch.cat([g * (len(g) / 8) for _, g in parts_of_update])
    torch.testing.assert_close(pieces, gradient, rtol=1e-6, atol=1e-12)
    assert sum(loss * len(g) / 8 for loss, g in parts_of_update).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in BASELINES if not get_method(n).batch_statistics])
def test_a_loss_without_batch_statistics_takes_nothing_from_the_update(name: str) -> None:
    batches = [batch_of(CODES, range(2)), batch_of(CODES, range(2, 5)), batch_of(CODES, [4])]
    parts = [some_logits(len(b.labels), CODES.shape[1]) for b in batches]
    assert list(make(name, CODES).update_statistics(parts, batches, EPOCH_3)) == [None] * 3
