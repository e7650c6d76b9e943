"""What travels from the loader to the methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class MicroBatch:
    """One micro-batch of images as the loader gives it.

    Attributes:
        views: name -> float32 [B, 3, S, S] in channels_last memory, normalised; "weak", "strong" or "eval".
        index: int64 [B] sample indices within the split, on the views' device.
        real: number of leading samples that count; evaluation pads batches to full size, training never pads.
        global_size: real samples of this micro-step over all ranks.
        update_size: real samples of the whole optimizer step over all ranks and accumulation steps.
    """

    views: dict[str, Tensor]
    index: Tensor
    real: int
    global_size: int
    update_size: int


@dataclass
class Batch:
    """One micro-batch for a method.

    Attributes:
        views: as in `MicroBatch`.
        labels: int8 [B, C] codes that the method trains on (1 positive, 0 negative, -1 unknown).
        index: int64 [B].
        global_size: samples of this micro-step over all ranks.
        truth: int8 [B, C] known labels where they are more than `labels` (simulations), for diagnostics and
            oracles only.
        update_statistics: this micro-batch's part of what the method's `update_statistics` made ahead of the update
            (exact accumulation), else None; only the method knows its type (`Method.statistics_of`).
        selected: bool [B, C], the unknown entries that the method's loss took for positives, noted by the loss in an
            epoch's last update at least; None where nothing is noted. The log shows some.
    """

    views: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    global_size: int
    truth: Tensor | None = None
    update_statistics: object = None
    selected: Tensor | None = None
