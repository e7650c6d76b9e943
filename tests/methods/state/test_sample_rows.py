"""Rows of single samples, spread over ranks."""

from __future__ import annotations

import pytest
import torch

from spml_fast.core.errors import UserError
from spml_fast.methods.state import sample_rows
from tests.support.methods import on_ranks


@pytest.mark.parametrize(("samples", "rows"), [(0, [0, 0, 0, 0]), (2, [1, 1, 0, 0]), (9, [3, 2, 2, 2])])
def test_every_sample_has_a_row_on_one_rank(samples: int, rows: list[int]) -> None:
    assert on_ranks(4, lambda rank: sample_rows.owned_count(samples)) == rows


@pytest.mark.parametrize("samples", [4, 6])
def test_rows_of_another_number_of_samples_are_refused(samples: int) -> None:
    shards = [torch.arange(3), torch.arange(2)]
    assert sample_rows.reshard(shards, 5).tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(UserError, match=f"a row for each of 5 images, but the training split has {samples};"):
        sample_rows.reshard(shards, samples)
