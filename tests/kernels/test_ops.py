"""Every op runs on the device of its tensors, whichever is current, and on NVIDIA cards alone."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spml_kernels.cam_pool.tiles import cache_of, launch_of
from spml_kernels.common import dispatch, ops
from spml_kernels.common.heuristics import CAM_POOL_BACKWARD_WAYS, CAM_POOL_WAYS, LARGE_LOSS_SELECTS
from spml_kernels.large_loss.op import way_of

from tests.support.paths import ROOT

KERNELS = ROOT / "kernels" / "spml_kernels"


class Current:
    """Stands where `torch.cuda.device` does and notes what was made current; no CUDA is needed."""

    def __init__(self) -> None:
        self.entered: list[torch.device] = []

    @contextlib.contextmanager
    def __call__(self, device):
        self.entered.append(device)
        yield


def test_the_device_of_the_tensors_is_made_current(monkeypatch):
    current = Current()
    monkeypatch.setattr(ops.torch.cuda, "device", current)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(2, device="cuda:1"), torch.empty(3, device="cuda:1")]
    with ops.device_guard("spml::x", (3, *tensors, "word", True)):
        assert current.entered == [torch.device("cuda", 1)]
    with ops.device_guard("spml::x", (torch.empty(2), None)):
        assert len(current.entered) == 1


def test_tensors_on_two_devices_are_refused():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        tensors = torch.empty(2, device="cuda:1"), torch.empty(2, device="cuda:0")
    with pytest.raises(ValueError, match=r"spml::x: its tensors are on cuda:1 and cuda:0; move them to one device"):
        ops.device_guard("spml::x", tensors)


def test_the_guard_is_around_the_op_s_own_function(monkeypatch):
    inside: list[str] = []

    @contextlib.contextmanager
    def guard(name, values):
        inside.append(name)
        yield
        inside.append("left")

    monkeypatch.setattr(ops, "device_guard", guard)

    @ops.define("spml::test_of_the_guard")
    def double(x: torch.Tensor, times: int) -> torch.Tensor:
        """Twice as much."""
        inside.append("function")
        return x * times

    assert torch.equal(double(torch.ones(2), 2), torch.full((2,), 2.0))
    assert inside == ["spml::test_of_the_guard", "function", "left"]
    assert str(torch.ops.spml.test_of_the_guard.default._schema).endswith("(Tensor x, SymInt times) -> Tensor")


def test_no_op_is_registered_without_the_guard():
    for path in KERNELS.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        # hub.py writes another name into that file.
        known = (KERNELS / "common" / "ops.py", KERNELS / "devtools" / "hub.py")
        assert ("custom_op(" in text) == (path in known), path
    names = [
        name for p in KERNELS.rglob("*.py") for name in re.findall(r'@define\("(spml::\w+)"\)', Path(p).read_text())
    ]
    assert len(names) >= 10 and len(set(names)) == len(names)


def test_the_cache_is_that_of_the_tensor_s_card(monkeypatch):
    cards = {torch.device("cuda", 1): SimpleNamespace(L2_cache_size=50 << 20)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    with torch._subclasses.FakeTensorMode():
        tensor = torch.empty(2, device="cuda:1")
    assert cache_of(tensor) == 50 << 20 and cache_of(torch.empty(2)) == 0


def test_rocm_takes_the_reference(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with torch._subclasses.FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    monkeypatch.setenv("SPML_KERNELS", "auto")
    assert not dispatch.use_triton(tensor)
    monkeypatch.setenv("SPML_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="SPML_KERNELS=triton with PyTorch for ROCm"):
        dispatch.use_triton(tensor)


@pytest.mark.parametrize(
    ("variable", "override", "ways"),
    [
        ("SPML_CAM_POOL", dispatch.cam_pool_override, CAM_POOL_WAYS),
        ("SPML_CAM_POOL_BACKWARD", dispatch.cam_pool_backward_override, CAM_POOL_BACKWARD_WAYS),
        ("SPML_LARGE_LOSS", dispatch.large_loss_override, tuple(LARGE_LOSS_SELECTS)),
    ],
)
def test_ways_can_be_named(variable, override, ways, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    assert override() is None
    for word in ("auto", *ways):
        monkeypatch.setenv(variable, word)
        assert override() == (None if word == "auto" else word)
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(ValueError, match=f"{variable} is 'fastest'; it must be one of auto, {ways[0]}"):
        override()


@pytest.mark.parametrize("way", LARGE_LOSS_SELECTS)
def test_the_named_way_is_taken(way, monkeypatch):
    monkeypatch.setenv("SPML_LARGE_LOSS", way)
    assert way_of(512 * 9605) == way_of(10, alone=False) == way


@pytest.mark.parametrize("way", CAM_POOL_WAYS)
def test_the_named_way_of_cam_pool_is_taken(way, monkeypatch):
    monkeypatch.setenv("SPML_CAM_POOL", way)
    assert launch_of(torch.empty(2, 14, 14, 2048, dtype=torch.bfloat16, device="meta"), 5000).way == way
