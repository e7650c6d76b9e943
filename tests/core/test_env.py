"""Environment variables and their defaults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spml_fast.core import env

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Nothing of a launcher; all of it is as before afterwards, whoever changed it."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in NAMES or name.startswith("SLURM"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_process_alone():
    assert (env.rank_name(), env.local_rank(), env.world_size(), env.local_world_size()) == ("0", 0, 1, 1)
    assert not env.has_rank() and not env.has_master_address() and not env.has_master_port()
    assert env.local_size() is None and env.slurm_step() is None
    env.default_ranks()
    assert {n: os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }


def test_defaults_leave_what_a_launcher_set():
    env.set_ranks("3", "1", "4")
    os.environ.update(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234", LOCAL_WORLD_SIZE="2", LOCAL_SIZE="9")
    env.default_ranks()
    env.default_master_port(99)
    env.default_local_world_size("7")
    assert (env.rank_name(), env.local_rank(), env.world_size(), env.local_world_size()) == ("3", 1, 4, 2)
    assert os.environ["MASTER_ADDR"] == "10.0.0.1" and os.environ["MASTER_PORT"] == "1234" and env.local_size() == "9"


def test_slurm_step(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert env.slurm_step() is None, "a shell of an allocation has no step"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert env.slurm_step() == env.SlurmStep("2", "0", "4", "4", "127.0.0.1", 0)


def test_cache_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert env.cache_home() == Path("/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert env.cache_home() == Path.home() / ".cache"


@pytest.mark.parametrize("before", [None, "triton"])
def test_reference_kernels_within_the_block_alone(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("SPML_KERNELS", raising=False)
    else:
        monkeypatch.setenv("SPML_KERNELS", before)
    with pytest.raises(ValueError), env.reference_kernels():
        assert os.environ["SPML_KERNELS"] == "reference"
        raise ValueError
    assert os.environ.get("SPML_KERNELS") == before
