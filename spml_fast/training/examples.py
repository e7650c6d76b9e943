"""A few of the labels that a method rejects or corrects, for the log: those of an epoch's last batch."""

from __future__ import annotations

from typing import Any

import torch

from spml_fast.core.batch import Batch
from spml_fast.data.labels import UNKNOWN
from spml_fast.data.manifest import Split

# Images of an epoch whose selected labels are noted.
IMAGES = 6


def selected_examples(batch: Batch, split: Split) -> list[list[Any]]:
    """Some of the labels that the last step on this batch took for positives.

    Args:
        batch: with what the method has noted on it.
        split: the training split.

    Returns:
        [sample, path, class, whether it is positive (None where that is not known)] of at most `IMAGES` images, evenly
        spaced among those of the batch that have any, and of each the first class. Of this rank's part; empty where the
        method selects nothing.
    """
    if batch.selected is None:
        return []
    rows = torch.nonzero(batch.selected.any(1))[:, 0]
    if not len(rows):
        return []
    chosen = rows[torch.linspace(0, len(rows) - 1, min(IMAGES, len(rows)), device=rows.device).round().long()]
    # The first True of a row.
    classes = batch.selected[chosen].to(torch.uint8).argmax(1)
    truth = None if batch.truth is None else batch.truth[chosen, classes].tolist()
    index = batch.index[chosen].tolist()
    return [
        [sample, split.relative_path(sample), class_id, _truth(truth, place)]
        for place, (sample, class_id) in enumerate(zip(index, classes.tolist(), strict=True))
    ]


def _truth(truth: list[int] | None, place: int) -> bool | None:
    return None if truth is None or truth[place] == UNKNOWN else truth[place] == 1
