"""What holds of a training step on a GPU and can be told without one: no host sync, no copy, one device.

A step of each method runs on PyTorch's fake CUDA tensors, which have shapes, types and a device and no data: the
operations, the kernels' custom ops among them, are checked and not done. What would wait for a GPU's numbers (`item`,
`nonzero`, a branch on a tensor) fails there, and so do operands on two devices. Backward passes need a real device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spml_fast.core.batch import Batch
from spml_fast.core.config import ModelConfig
from spml_fast.data.labels import LabelStore
from spml_fast.methods import method_names
from spml_fast.models.classifier import Classifier
from tests.support.methods import Rig, at

ROWS = 16
GPU = torch.device("cuda", 0)
SYNCS = (DataDependentOutputException, DynamicOutputShapeException)


class Copies(TorchDispatchMode):
    """Notes every operation that carries data from one device to another; 0-d operands cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A copy of a single number waits as well.
        least = 0 if func is torch.ops.aten._to_copy.default else 1
        given, made = (
            {t.device.type for t in tree_leaves(x) if isinstance(t, Tensor) and t.ndim >= least}
            for x in ((args, kwargs), out)
        )
        if len(given) > 1 or (given and made and given != made):
            line = next((f for f in reversed(traceback.extract_stack()) if "spml_" in f.filename), None)
            self.crossings.append(f"{func}: {given} to {made}, {line.filename}:{line.lineno}" if line else str(func))
        return out


class FakeGpu:
    """Moves whatever holds tensors to a fake GPU, in place."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.moved: dict[int, tuple[object, object]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor.data)
        with self.mode:
            return fake.to(GPU)

    def move(self, thing: Any) -> Any:
        """The thing itself, its tensors replaced; a tensor's fake. Parameters that are shared stay shared."""
        if id(thing) in self.moved:
            return self.moved[id(thing)][1]
        if isinstance(thing, nn.Parameter):
            fake = self.tensor(thing)
            with self.mode:
                made: Any = nn.Parameter(fake, requires_grad=thing.requires_grad)
        elif isinstance(thing, Tensor):
            made = self.tensor(thing)
        elif isinstance(thing, torch.device):
            made = GPU
        elif type(thing) is dict:
            made = thing
            for key, value in thing.items():
                thing[key] = self.move(value)
        elif type(thing) in (list, tuple):
            made = type(thing)(self.move(x) for x in thing)
        else:
            made = thing
            ours = type(thing).__module__.startswith("spml_fast.")
            if isinstance(thing, nn.Module) or (ours and not isinstance(thing, type) and hasattr(thing, "__dict__")):
                # Before its parts, some of which know it.
                self.moved[id(thing)] = thing, thing
                self.move(vars(thing))
        # The thing is kept as well, or its id might come again.
        self.moved[id(thing)] = thing, made
        return made


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels' custom ops, as on an H100; their fakes stand in."""
    monkeypatch.setenv("SPML_KERNELS", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def cases() -> Iterator[tuple[str, dict[str, object]]]:
    """Each method as it comes, and with the options that change what it does in a step."""
    for name in method_names():
        # Its table is trained by a backward of its own within the step.
        if name != "role":
            yield name, {}
    for name in ("ll_r", "ll_cp"):
        yield name, {"batch_semantics": "paper", "paper_batch": 8}
    yield "ll_cp", {"ties": "strict_flips"}
    yield "ll_ct", {"ties": "inclusive"}
    for mode in ("ignore", "negative", "ignore_normalize_classes"):
        yield "p_asl", {"mode": mode}
    yield "p_asl", {"prior": "running"}
    yield "ignore", {"preset": "released"}
    yield "ignore", {"preset": "calr"}
    yield "ignore", {"masked_scale": 0.5, "masked_every": 2, "gap_histogram": True}
    yield "ignore", {"cam_norm": "batch_minmax", "norm_group": 4, "masked_bn": "no_update"}


def run_step(rig: Rig, epoch: int, planned: bool) -> tuple[Tensor, list[str]]:
    """Loss of a step on the fake GPU, and the copies in it; fails where it would wait for the GPU."""
    gpu = FakeGpu()
    gpu.move(vars(rig))
    rig.method.on_epoch_start(at(epoch, 0))
    copies = Copies()
    with gpu.mode:
        rows = torch.arange(ROWS, device=GPU)
        with copies:
            parts = []
            for index in rows.split(ROWS // 2 if planned else ROWS):
                views = {n: v[index].to(memory_format=torch.channels_last) for n, v in rig.images.items()}
                truth = rig.truth.rows(index) if rig.truth is not None else None
                parts.append(Batch(views, rig.store.rows(index), index, len(index), truth))
            if planned:
                with torch.no_grad():
                    forwards = [rig.method.statistics_forward(rig.classifier, b, at(epoch, 1)) for b in parts]
                    for batch, statistics in zip(
                        parts, rig.method.update_statistics(forwards, parts, at(epoch, 1)), strict=True
                    ):
                        batch.update_statistics = statistics
            outputs = [rig.method(rig.classifier, b, at(epoch, 1)) for b in parts]
    for out in outputs:
        assert {t.device for t in (out.loss, *out.metrics.values())} == {GPU}
    return outputs[0].loss, copies.crossings


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(*c, id="-".join(map(str, (c[0], *c[1].values())))) for c in cases()]
)
def test_a_step_on_a_gpu_stays_there(name: str, options: dict[str, object]) -> None:
    # Epoch 1 is every method's warm-up, where there is one.
    for epoch in (1, 6):
        loss, copies = run_step(Rig(name, **options), epoch, planned=False)
        assert loss.requires_grad and loss.shape == () and not copies


@pytest.mark.parametrize("name", [n for n in method_names() if n != "role" and Rig(n).method.batch_statistics])
def test_exact_accumulation_on_a_gpu_stays_there(name: str) -> None:
    loss, copies = run_step(Rig(name), 6, planned=True)
    assert loss.requires_grad and not copies


@pytest.mark.parametrize("name", ["an", "ignore"])
@pytest.mark.parametrize(
    ("head", "options"), [("ml_decoder", {"groups": 2, "hidden": 32}), ("query2label", {"preset": "tiny"})]
)
def test_heads_with_queries_on_a_gpu_stay_there(name: str, head: str, options: dict[str, object]) -> None:
    rig = Rig(name)
    model = ModelConfig(backbone="test_resnet", pretrained=False, freeze_bn=True, head=head, head_options=options)
    rig.classifier = Classifier(model, rig.store.num_classes, 32).train()
    loss, copies = run_step(rig, 6, planned=False)
    assert loss.requires_grad and not copies


def test_corrections_are_collected_and_shown_on_the_gpu() -> None:
    rig, gpu = Rig("ll_cp"), FakeGpu()
    rig.store.correct(torch.tensor([1, 2]), torch.tensor([3, 4]), 1)
    rig.store.commit()
    gpu.move(rig.store)
    with gpu.mode, Copies() as copies:
        index = torch.arange(4, device=GPU)
        assert rig.store.rows(index).device == GPU
        rig.store.correct(index, index, 1, index > 1)
    assert not copies.crossings


def test_what_waits_for_the_gpu_is_found() -> None:
    gpu = FakeGpu()
    with gpu.mode:
        there, store = torch.ones(4, device=GPU), gpu.move(LabelStore(Rig("an").observed))
        for wait in (lambda: there.sum().item(), lambda: there[there > 0], lambda: store.class_counts(1)):
            with pytest.raises(SYNCS):
                wait()
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            there + torch.ones(4)
        for copy in (
            lambda: torch.tensor([1.0], device=GPU),
            lambda: there.sum().cpu(),
            lambda: there[torch.arange(2)],
            lambda: there[[0, 1]],
        ):
            with Copies() as copies:
                copy()
            assert len(copies.crossings) == 1, copy
