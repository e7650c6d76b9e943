"""The weights file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spml_fast.core.errors import UserError
from spml_fast.models.weights import load_weights, save_weights


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
