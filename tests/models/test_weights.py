"""The weights file."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.models.weights import _DTYPES, damaged_weights, load_weights, read_metadata, save_weights, write_weights


def network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)).to(memory_format=torch.channels_last)


def test_weights_round_trip(tmp_path):
    path, source = tmp_path / "model.safetensors", network()
    source[1].running_mean.fill_(3)
    save_weights(path, source, {"epoch": "3"})
    other = network()
    nn.init.zeros_(other[0].weight)
    assert load_weights(path, other) == {"epoch": "3"}
    for key, value in source.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def one_sentence(error, path):
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    return text


def test_weights_of_another_shape(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, network(4), {})
    for other in (network(5), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="does not fit the model") as error:
            load_weights(path, other)
        one_sentence(error, path)


def test_weights_missing_or_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"has the run finished an epoch\?") as error:
        load_weights(path, network())
    one_sentence(error, path)
    save_weights(path, network(), {})
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as error:
            load_weights(path, network())
        one_sentence(error, path)


def test_many_differences_make_no_long_message(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, nn.Sequential(*[nn.Linear(2, 2) for _ in range(500)]), {})
    for other in (network(), nn.Linear(2, 2)):
        with pytest.raises(UserError) as error:
            load_weights(path, other)
        assert len(one_sentence(error, path)) < 600


def test_every_dtype_and_shape_is_what_the_library_reads(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {f"x{k}": torch.arange(7).to(dtype) for k, dtype in enumerate(_DTYPES)}
    state |= {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "view": torch.arange(12.0).view(3, 4).T,
        "ß": torch.ones(1),
    }
    metadata = {"b": "1", "a": 'ü "quoted"'}
    assert write_weights(path, state, metadata) == file_record(path)
    loaded = load_file(path)
    assert loaded.keys() == state.keys() and read_metadata(path) == metadata
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == len(state)


def test_equal_weights_have_equal_bytes_and_the_umasks_mode(tmp_path):
    """The library's own order of the metadata is another one in every process."""
    names = ["version", "epoch", "phase", "val_map"]
    before = os.umask(0o027)
    try:
        for path, order in (("a", names), ("b", names[::-1])):
            save_weights(tmp_path / path, network(), {name: name for name in order})
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {os.stat(tmp_path / name).st_mode & 0o777 for name in "ab"} == {0o640}


def test_damaged_weights_are_told_from_whole_ones(tmp_path):
    path = tmp_path / "model.safetensors"
    assert damaged_weights(path)
    save_weights(path, network(), {})
    assert damaged_weights(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert damaged_weights(path)
