"""Files of tensors: checksums, damage, and code that is not run."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch

from spml_fast.core.errors import UserError
from spml_fast.core.io import FileNotWritten, file_record
from spml_fast.training.tensor_files import read_tensors, write_tensors
from tests.support.payload import Payload

STATE = {"w": torch.arange(5000.0), "n": 3, "name": "x", "none": None, "pair": (1.5, [True])}


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip_with_the_checksum(tmp_path, mmap):
    record = write_tensors(tmp_path / "a.pt", STATE)
    assert record == file_record(tmp_path / "a.pt")
    state = read_tensors(tmp_path / "a.pt", mmap=mmap)
    assert torch.equal(state.pop("w"), STATE["w"]) and state == {k: v for k, v in STATE.items() if k != "w"}


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_is_not_run(tmp_path, form):
    made, path = tmp_path / "made", tmp_path / "a.pt"
    state = {**STATE, "payload": Payload(made)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state["payload"]))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "was not loaded" in str(error.value) and "\n" not in str(error.value)
    assert not made.exists()
    # The payload is a real one.
    torch.load(path, weights_only=False) if form != "plain pickle" else pickle.loads(path.read_bytes())
    assert made.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02"])
def test_damage_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged") as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    write_tensors(path, STATE)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged"):
        read_tensors(path)


def test_a_full_disk(tmp_path):
    with pytest.raises(FileNotWritten) as error:
        write_tensors(Path("/dev/full"), STATE)
    assert error.value.errno == errno.ENOSPC
    assert error.value.size == pytest.approx(write_tensors(tmp_path / "a", STATE).size, abs=300)
