"""How BatchNorm behaves within a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from timm.layers import convert_sync_batchnorm
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

BnMode = Literal["update", "no_update", "eval"]


def synchronised(module: nn.Module) -> nn.Module:
    """The module with BatchNorm statistics over all ranks in training (GPUs only)."""
    return convert_sync_batchnorm(module)


@contextlib.contextmanager
def bn_behaviour(module: nn.Module, mode: BnMode) -> Iterator[None]:
    """Inside, BatchNorm of a module in training mode behaves as said.

    Args:
        module: whose BatchNorms are meant; those in evaluation mode are left alone.
        mode: `update` as always; `no_update` normalises by the batch without moving the running statistics; `eval`
            normalises by the running statistics.
    """
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.training] if mode != "update" else []
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.training = mode == "no_update"
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = True
