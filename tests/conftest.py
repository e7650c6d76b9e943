"""Shared fixtures: small digit scenes, and a way to run the scripts of launch/. How many workers share the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A test has one core to itself, and the same sums wherever it runs. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support import warm
from tests.support.markers import marks
from tests.support.order import shared
from tests.support.paths import ROOT
from tests.support.runs import Run

SMALL = {"train": 192, "val": 60, "test": 90}
# What a worker, the process that its runs are forked from, and a run of two ranks take together.
WORKER_BYTES = 4 << 30


def pytest_configure() -> None:
    """Tests start some hundred processes: where Python is told to keep no bytecode, each compiles the package again."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core where folders are run; none, so that `-s` and breakpoints work, where files are named."""
    if not any(Path(str(argument).partition("::")[0]).is_dir() for argument in config.args):
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    workers = min(len(os.sched_getaffinity(0)), memory // WORKER_BYTES)
    return workers if workers > 1 else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark tests by what they do, before `-m` chooses among them; then put them in the order that workers share."""
    for item in items:
        for name in sorted(marks(item, ROOT)):
            item.add_marker(name)
    yield
    if hasattr(config, "workerinput"):
        items[:] = shared(items, config.workerinput["workercount"])


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
