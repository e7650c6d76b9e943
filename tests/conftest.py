"""Shared fixtures: small digit scenes, and a way to run the scripts of launch/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import warm
from tests.support.markers import marks
from tests.support.paths import ROOT
from tests.support.runs import Run

SMALL = {"train": 192, "val": 60, "test": 90}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they do, before `-m` chooses among them."""
    for item in items:
        for name in sorted(marks(item, ROOT)):
            item.add_marker(name)


@pytest.fixture
def run_script() -> Run:
    """Run a script of launch/ to its end: run_script("train.py", "--option", "value", ranks=2, launcher="torchrun")."""
    return warm.run_script


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred digit scenes as a Manifest."""
    from spml_fast.prepare.datasets.digits import prepare_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder, sizes=SMALL)
    return folder
