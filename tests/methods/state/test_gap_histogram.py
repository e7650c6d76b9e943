"""The histogram of IGNORE's gaps."""

from __future__ import annotations

import json

import numpy as np
import torch

from spml_fast.core.batch import Batch
from spml_fast.methods.state.gap_histogram import GapHistogram
from tests.support.ignore import (
    CODES,
    MASKED,
    STRONG,
    D,
    Z,
    batch_of,
    epoch,
    method_for,
)


def test_gap_histogram_counts_every_entry_by_what_it_is() -> None:
    method = method_for(CODES, gap_histogram=True)
    batch = batch_of(CODES)
    batch.truth = torch.tensor([[1, 1, 0], [0, 1, -1]], dtype=torch.int8)
    weak, strong, masked = (torch.tensor(v, dtype=D) for v in (Z, STRONG, MASKED))
    method.combine(weak, strong, masked, batch, epoch(1))
    method.combine(weak, strong, None, batch, epoch(1))
    histogram = method.on_epoch_end(epoch(1))["gap_histogram"]
    edges = np.array([-np.inf, *histogram["edges"], np.inf])
    # Gaps by hand: observed .2 and .3, hidden 1.5, negatives .2 and .6, not known .7.
    for kind, gaps in {
        "observed_positive": [0.2, 0.3],
        "hidden_positive": [1.5],
        "negative": [0.2, 0.6],
        "not_known": [0.7],
    }.items():
        assert histogram[kind] == np.histogram(gaps, edges)[0].tolist(), kind
    assert json.loads(json.dumps(histogram)) == histogram
    assert sum(map(sum, (method.on_epoch_end(epoch(2))["gap_histogram"][k] for k in histogram if k != "edges"))) == 0


def test_gaps_lie_in_bins_that_are_open_below_and_no_checkpoint_holds_them() -> None:
    """Edges are powers of the square root of two from 1/256 to 64; the last bin has no upper end."""
    gaps = GapHistogram(torch.device("cpu"))
    assert not gaps.state_dict()
    logits = torch.tensor([[2.0**-8, 2.0**-8 + 2.0**-20, 0.0, 64.0, 64.5]])
    batch = Batch({}, torch.full((1, 5), -1, dtype=torch.int8), torch.zeros(1, dtype=torch.int64), 1)
    gaps.add(logits, torch.zeros(1, 5), batch)
    taken = gaps.take()
    assert taken["edges"] == [2 ** (k / 2) for k in range(-16, 13)]
    assert taken["not_known"] == [2, 1, *[0] * 26, 1, 1] and len(taken["not_known"]) == len(taken["edges"]) + 1
