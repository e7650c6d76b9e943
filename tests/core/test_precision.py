"""Autocast is on, or off, where it is asked for; algorithms are timed or must repeat."""

from __future__ import annotations

import os

import pytest
import torch

from spml_fast.core import precision
from spml_fast.core.precision import autocast, autocast_dtype, no_autocast

CPU = torch.device("cpu")


def test_autocast_follows_the_dtype():
    a = torch.ones(4, 4)
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        with autocast(CPU, dtype):
            assert (a @ a).dtype == expected


def test_no_autocast_wins_within():
    a = torch.ones(4, 4)
    with autocast(CPU, torch.bfloat16):
        with no_autocast(CPU):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_dtype_of_the_option():
    assert autocast_dtype("fp32", CPU) is None and autocast_dtype("bf16", CPU) == torch.bfloat16


def test_networks_in_use_take_fp32_where_bf16_is_emulated(monkeypatch):
    for able, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(precision, "has_bf16", lambda device, able=able: able)
        assert precision.inference_dtype("bf16", CPU) == expected and precision.inference_dtype("fp32", CPU) is None
        assert autocast_dtype("bf16", CPU) == torch.bfloat16, "a training does what it was asked to"


@pytest.fixture
def algorithms(monkeypatch):
    """Whether cuDNN times, and whether algorithms must repeat; as they were, afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield lambda: (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(False)


def test_algorithms_are_timed_on_gpus_unless_they_must_repeat(algorithms):
    precision.set_cudnn_policy(torch.device("cpu"), True)
    assert algorithms() == (False, False)
    precision.set_cudnn_policy(torch.device("cuda"), False)
    assert algorithms() == (True, False)
    with precision.no_cudnn_benchmark():
        assert algorithms() == (False, False)
    assert algorithms() == (True, False) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    precision.set_cudnn_policy(torch.device("cuda"), True)
    assert algorithms() == (False, True) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
