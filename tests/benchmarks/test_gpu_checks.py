"""What the checks of a GPU find, tried on the CPU: results that move, and calls that cover every kernel's variants."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.kernel_losses import large_loss_work
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_ways import ways_of
from tests.support.gpu_ops import PIECES, NotInstalled, check_repeat, every_way, need, small_pieces


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def test_a_result_that_moves_is_found():
    works = [cam_work(2, 5, 8, 4, torch.float32), large_loss_work(5, 7, 3)]
    calls = 2 * len(every_way(works[0])) + 2 * len(every_way(works[1]))
    assert check_repeat(works, 3, "cpu") == f"{calls} calls of ops, 3 times each"
    right, runs = works[1].providers["fused"], []

    def moving(*inputs):
        runs.append(1)
        results = right(*inputs)
        return (results[0] + 1e-6 * (len(runs) > 4), *results[1:])

    moved = dataclasses.replace(works[1], providers={"fused": moving})
    with pytest.raises(AssertionError, match=r"large_loss 5 x 7 k 3 .*fwd: result 0 of run 4 differs"):
        check_repeat([moved], 200, "cpu")


def test_every_way_is_repeated_and_watched():
    names = [name for name, _ in every_way(cam_work(2, 5, 8, 4, torch.float32))]
    assert names == [*ways_of("cam_pool"), "backward sparse"]
    names = ways_of("cam_pool")
    small = small_pieces("meta")
    backward = ways_of("cam_pool_backward")
    pieces = {f"small cam_pool {way}" for way in names} | {f"small cam_pool_backward {way}" for way in backward}
    assert "sparse" in backward and pieces < set(small) and len(small) == len(pieces) + 4
    # Pieces of every check that can be cut, and the step that must not wait for the device.
    assert {name.split()[0] for name in PIECES} == {"ops", "points", "ignore", "sync"}


def test_a_library_that_is_missing_is_said():
    need("torch")
    for name in ("nvidia.nothing", "nothing.at.all"):
        with pytest.raises(NotInstalled, match=name):
            need("torch", name)
