"""Autocast is on, or off, where it is asked for."""

from __future__ import annotations

import torch

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
