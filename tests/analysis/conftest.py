"""Runs with random weights whose maps are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib import font_manager

from spml_fast.data.manifest import Manifest
from tests.support.explain import make_run


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAM run with random weights and large logits."""
    return make_run(tmp_path_factory.mktemp("explain") / "run", small_digits, "digits.yaml", 30)


@pytest.fixture(scope="module")
def ignore(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of IGNORE with other random weights."""
    folder = tmp_path_factory.mktemp("ignore") / "ignore"
    return make_run(folder, small_digits, "digits.yaml", 30, "--method", "ignore", seed=4)


@pytest.fixture(scope="module")
def image_path(small_digits: Path) -> Path:
    """A digit scene."""
    return Path(Manifest(small_digits).split("test").path(0))


@pytest.fixture
def plain_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and no fonts but those that come with matplotlib."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
