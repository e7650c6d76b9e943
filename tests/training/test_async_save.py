"""Checkpoints that are written while training goes on hold what was there when they were begun."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from spml_fast.core.io import file_record
from spml_fast.training.async_save import BackgroundSave, HostCopy
from spml_fast.training.tensor_files import read_tensors, write_tensors


def test_a_copy_is_equal_and_does_not_change():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    state = {
        "module": OrderedDict(weight=weight, tied=weight, half=torch.randn(3, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "none": None,
        "empty": [torch.empty(0), torch.empty(0, dtype=torch.int64)],
    }
    copy = HostCopy()(state)
    before = weight.clone()
    weight.zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 7
    state["optimizer"]["state"][0]["step"] += 1
    assert torch.equal(copy["module"]["weight"], before) and copy["module"]["tied"] is copy["module"]["weight"]
    assert copy["module"]["weight"].stride() == before.stride() and type(copy["module"]) is OrderedDict
    assert copy["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert copy["optimizer"]["state"][0]["step"] == 3 and copy["none"] is None
    assert [t.dtype for t in copy["empty"]] == [torch.float32, torch.int64]
    assert copy["module"]["half"].dtype == torch.bfloat16


def test_a_part_of_a_tensor_is_another_tensor():
    whole = torch.arange(6.0)
    copy = HostCopy()([whole, whole[:3], whole.view(2, 3), whole[1:4]])
    assert [t.tolist() for t in copy] == [whole.tolist(), [0, 1, 2], [[0, 1, 2], [3, 4, 5]], [1, 2, 3]]


def test_states_that_share_tensors_share_their_copies():
    """The best weights beside the module that they are of; what is gone by then takes nobody's place."""
    copy, module = HostCopy(), {"a": torch.randn(5), "b": torch.randn(5)}
    first = copy({**{f"classifier.{name}": tensor for name, tensor in module.items()}, "gone": torch.randn(5)})
    second = copy(module | {"new": torch.zeros(5)})
    assert second["a"] is first["classifier.a"] and second["b"] is first["classifier.b"]
    assert torch.equal(second["new"], torch.zeros(5))


def test_files_are_written_with_their_checksums_in_a_thread(tmp_path: Path):
    go = threading.Event()

    def write(path, state):
        assert go.wait(60) and threading.current_thread() is not threading.main_thread()
        return write_tensors(path, state)

    save = BackgroundSave([(tmp_path / f"{n}.pt", {"n": torch.tensor(n)}) for n in range(2)], write)
    assert save.busy and not list(tmp_path.iterdir())
    go.set()
    save.wait()
    assert not save.busy and not save.errors
    for n in range(2):
        assert save.records[f"{n}.pt"] == file_record(tmp_path / f"{n}.pt")
        assert read_tensors(tmp_path / f"{n}.pt") == {"n": torch.tensor(n)}


def test_a_disk_that_does_not_take_it_is_an_error_of_the_save(tmp_path: Path):
    save = BackgroundSave([(Path("/dev/full"), torch.zeros(10**6)), (tmp_path / "b.pt", torch.ones(1))], write_tensors)
    save.wait()
    assert [error.errno for error in save.errors] == [errno.ENOSPC] and list(save.records) == ["b.pt"]


def test_other_failures_are_raised_where_the_save_is_finished(tmp_path: Path):
    save = BackgroundSave([(tmp_path / "a.pt", lambda: None)], write_tensors)
    with pytest.raises(Exception, match="pickle"):
        save.wait()
