"""The environment that launchers leave."""

from __future__ import annotations

import os

import pytest

from spml_fast.training.cluster import first_slurm_host, read_slurm_environment


@pytest.fixture
def environment(monkeypatch):
    """The environment without anything of a launcher; all of it is as before afterwards, whoever changed it."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER_", "LOCAL_")) or name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    yield monkeypatch
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("gpu[12,15-17]", "gpu12"),
        ("login1,gpu[003-007]", "login1"),
        ("gpu[1-2]-ib,x", "gpu1-ib"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("node-a-[7]", "node-a-7"),
        ("10.0.0.1", "10.0.0.1"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_first_host_of_slurms_list(nodes, first):
    assert first_slurm_host(nodes) == first


def slurm(environment, **values):
    defaults = {
        "PROCID": "5",
        "LOCALID": "1",
        "STEP_NUM_TASKS": "8",
        "STEP_TASKS_PER_NODE": "4(x2)",
        "STEP_NODELIST": "gpu[003-004]",
        "JOB_ID": "123456",
    }
    for name, value in (defaults | values).items():
        environment.setenv(f"SLURM_{name}", value)


def test_srun_is_enough(environment):
    slurm(environment)
    read_slurm_environment()
    found = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003",
    }
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000


def test_jobs_on_one_machine_get_their_own_ports(environment):
    ports = []
    for job in ("100", "101"):
        environment.delenv("RANK", raising=False)
        environment.delenv("MASTER_PORT", raising=False)
        slurm(environment, JOB_ID=job)
        read_slurm_environment()
        ports.append(os.environ["MASTER_PORT"])
    assert ports[0] != ports[1]


def test_another_launchers_variables_are_kept(environment):
    slurm(environment)
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    read_slurm_environment()
    assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "2" and "MASTER_ADDR" not in os.environ


def test_an_address_that_is_given_is_kept(environment):
    slurm(environment)
    environment.setenv("MASTER_ADDR", "10.1.1.1")
    environment.setenv("MASTER_PORT", "29500")
    read_slurm_environment()
    assert os.environ["MASTER_ADDR"] == "10.1.1.1" and os.environ["MASTER_PORT"] == "29500"


def test_a_shell_or_a_single_task_is_not_adopted(environment):
    read_slurm_environment()
    assert "RANK" not in os.environ
    slurm(environment, STEP_NUM_TASKS="1")
    read_slurm_environment()
    assert "RANK" not in os.environ
