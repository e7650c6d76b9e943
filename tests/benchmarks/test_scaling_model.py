"""The model of steps over many GPUs: its arithmetic, and that collectives are noted with whose they are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling_model import Collective, Links, counted
from spml_fast.training.gradient_buckets import BUCKET_BYTES, LAST_BUCKET_BYTES

LINKS = Links(inside=300.0, between=40.0, start=20.0, hop=10.0)


def test_one_gpu_sends_nothing() -> None:
    assert LINKS.seconds(Collective("gradients", "all_reduce", 10**9), 1) == 0


def test_an_all_reduce_moves_almost_twice_its_bytes() -> None:
    within = LINKS.seconds(Collective("gradients", "all_reduce", 300 * 10**6), 8)
    assert math.isclose(within, 20e-6 + 2 * 7 / 8 * 1e-3)
    # Two machines: the slower links, and one hop.
    across = LINKS.seconds(Collective("gradients", "all_reduce", 40 * 10**6), 16)
    assert math.isclose(across, 30e-6 + 2 * 15 / 16 * 1e-3)


def test_an_all_gather_moves_what_the_others_give() -> None:
    assert math.isclose(LINKS.seconds(Collective("method", "all_gather", 40 * 10**3), 64), 50e-6 + 63 * 1e-6)


def test_of_gradients_that_are_summed_meanwhile_the_last_bucket_is_seen() -> None:
    last = LINKS.seconds(Collective("gradients", "all_reduce", LAST_BUCKET_BYTES), 16)
    size = LAST_BUCKET_BYTES + 2 * BUCKET_BYTES + 12
    assert LINKS.visible(size, 16, backward=1.0) == last
    # A backward that is over at once: every bucket, with its start.
    whole = LINKS.seconds(Collective("gradients", "all_reduce", size), 16)
    assert math.isclose(LINKS.visible(size, 16, backward=0.0), whole + 3 * 30e-6)
    assert math.isclose(LINKS.visible(size, 16, backward=1e-3), whole + 3 * 30e-6 - 1e-3)
    assert LINKS.visible(12, 16, backward=1.0) == LINKS.seconds(Collective("gradients", "all_reduce", 12), 16)
    assert LINKS.visible(size, 1, backward=0.0) == 0


def test_collectives_are_noted_as_whoever_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: made.append(tensor))
    monkeypatch.setattr(dist, "all_gather", lambda parts, tensor: made.append(tensor))
    owner, found = ["method"], []
    with counted(owner, found):
        dist.all_reduce(torch.zeros(3, dtype=torch.float64))
        owner[0] = "gradients"
        dist.all_reduce(tensor=torch.zeros(5))
        owner[0] = "method"
        dist.all_gather([], torch.zeros(2, dtype=torch.int8))
    dist.all_reduce(torch.zeros(7))
    assert found == [
        Collective("method", "all_reduce", 24),
        Collective("gradients", "all_reduce", 20),
        Collective("method", "all_gather", 2),
    ]
    # All of them were made.
    assert len(made) == 4
