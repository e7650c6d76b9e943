"""What the metrics' tests share."""

from __future__ import annotations

import pytest

from spml_fast.evaluation import average_precision, entries


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few entries, so that small arrays go through many of them."""
    for module in (entries, average_precision):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 7)
    monkeypatch.setattr(average_precision, "PAIR_BLOCK_ENTRIES", 7)
    monkeypatch.setattr(average_precision, "_NEAR_ENTRIES", 4)
