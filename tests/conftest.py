"""Shared fixtures: small digit scenes, and a way to run the scripts of launch/."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.markers import marks
from tests.support.paths import ROOT
from tests.support.runs import Run, command, environment, rank_variables
from tests.support.warm import WARM

SMALL = {"train": 192, "val": 60, "test": 90}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they do, before `-m` chooses among them."""
    for item in items:
        for name in sorted(marks(item, ROOT)):
            item.add_marker(name)


@pytest.fixture
def run_script() -> Run:
    """Run a script of launch/ to its end: run_script("train.py", "--option", "value", ranks=2, launcher="torchrun").

    Real processes where a launcher or variables of the environment are named; else forks, which start quicker.
    """

    def run(script: str, *args: object, ranks: int = 1, launcher: str | None = None, **env: str) -> Any:
        words = [str(a) for a in args]
        if launcher is None and not env and not os.environ.get("SPML_TEST_COLD"):
            return WARM.run([str(ROOT / "launch" / script), *words], rank_variables(ranks), 600, environment())
        words = command(script, ranks, launcher or ("python" if ranks == 1 else "torchrun")) + words
        return subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment(**env), cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred digit scenes as a Manifest."""
    from spml_fast.prepare.datasets.digits import prepare_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder, sizes=SMALL)
    return folder
