"""Methods are tested on PyTorch's own operations; kernels have tests of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ops, whatever the environment says."""
    monkeypatch.setenv("SPML_KERNELS", "reference")
