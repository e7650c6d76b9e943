"""BatchNorm's running statistics of each rank: averaged before an evaluation, saved one by one within an epoch.

A rank sees its own images, so its statistics are its own until they are averaged. DeepSpeed saves those of rank 0.
Averaging at every save would let the time of a save change the figures; so each rank saves its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.runs.layout import saved_rank_state
from spml_fast.training.averaging import WeightAverage
from spml_fast.training.checkpoint import load_rank_states

_PREFIX = "batchnorm."


def average_statistics(classifier: nn.Module, ema: WeightAverage | None) -> None:
    """Have all ranks go on with the mean of their statistics (collective)."""
    for module in (classifier, ema.module if ema is not None else None):
        if module is not None and distributed.world_size() > 1:
            distribute_bn(module, distributed.world_size(), reduce=True)


def _statistics(classifier: nn.Module, ema: WeightAverage | None) -> Iterator[tuple[str, Tensor]]:
    """Name and buffer of what `distribute_bn` averages."""
    for part, module in (("classifier", classifier), ("ema", ema)):
        for name, buffer in module.named_buffers() if module is not None else ():
            if "running_mean" in name or "running_var" in name:
                yield f"{_PREFIX}{part}.{name}", buffer


def own_statistics(classifier: nn.Module, ema: WeightAverage | None) -> dict[str, Tensor]:
    """This rank's statistics by name; nothing when there is one rank, whose statistics DeepSpeed saves."""
    return dict(_statistics(classifier, ema)) if distributed.world_size() > 1 else {}


def restore_statistics(classifier: nn.Module, ema: WeightAverage | None, checkpoint: Path, ranks: int) -> None:
    """Put back what `own_statistics` gave: a rank's own, or the mean where another number of ranks saved them.

    Args:
        classifier: as it was given there.
        ema: as it was given there.
        checkpoint: the checkpoint's folder. One without statistics, of an epoch's end for example, changes nothing.
        ranks: that saved it.
    """
    parts = load_rank_states(checkpoint, ranks) if saved_rank_state(checkpoint, 0).is_file() else []
    for name, buffer in _statistics(classifier, ema):
        saved = [part[name] for part in parts if name in part]
        if len(saved) == distributed.world_size():
            buffer.copy_(saved[distributed.rank()])
        elif saved:
            buffer.copy_(torch.stack(saved).mean(0))
