"""Seeds of everything random."""

from __future__ import annotations

import itertools

import pytest
import torch

from spml_fast.core.seeds import rng_seed, seed_device


def test_seeds_are_distinct_and_repeat():
    places = list(itertools.product((0, 1, 1200), (0, 1), range(300), range(8)))
    seeds = {rng_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= s < 2**63 for s in seeds)
    assert rng_seed(5, 1, 2, 3) == rng_seed(5, 1, 2, 3) != rng_seed(5, 1, 3, 2)
    assert rng_seed(5) != rng_seed(5, 0) != rng_seed(5, 0, 0)
    torch.manual_seed(rng_seed(2**63 - 1, 7))


def test_seeds_give_unlike_streams():
    """Neighbouring places do not draw correlated numbers."""
    draws = []
    for update in range(64):
        torch.manual_seed(rng_seed(0, 0, update, 0))
        draws.append(torch.rand(64))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(64)
    assert correlation.abs().max() < 0.6 and abs(float(correlation.mean())) < 0.01


def test_a_device_is_seeded_as_everything_is():
    """Dropout draws from the generator of its device; `torch.initial_seed` is what methods derive their own from."""
    seed = rng_seed(3, 0, 41, 1)
    torch.manual_seed(seed)
    first = torch.nn.functional.dropout(torch.ones(64))
    torch.manual_seed(0)
    seed_device(seed, torch.device("cpu"))
    assert torch.initial_seed() == seed
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64)), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_seeded_as_everything_is():
    seed = rng_seed(3, 0, 41, 1)
    torch.manual_seed(seed)
    first = torch.rand(64, device="cuda")
    torch.manual_seed(0)
    seed_device(seed, torch.device("cuda", torch.cuda.current_device()))
    assert torch.equal(torch.rand(64, device="cuda"), first)
