"""Bytes and launches of the ops at the shapes that matter, by formula and without running anything."""

from __future__ import annotations

import pytest
import torch
from spml_kernels.common.heuristics import ALIGNED, CAM_POOL_WAYS
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED, cdiv
from spml_kernels.devtools.counting import Moved, count, total
from spml_kernels.devtools.traffic import moved

from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_maps import IN_CACHE, cam_work
from benchmarks.kernel_works import OPS, works

WORKS = works(list(OPS))
needs_triton = pytest.mark.skipif(
    not HAVE_TRITON or INTERPRETED, reason="meta tensors are for kernels that are not interpreted"
)


def traffic(work: KernelWork, provider: str, mode: str) -> Moved:
    return total(count(make_call(work, provider, mode, work.inputs("meta"))), moved)


def one(function) -> Moved:
    (launch,) = count(function)
    assert launch.moved is not None
    return launch.moved


def test_operands_and_results_of_an_operation():
    x, row = torch.zeros(4, 6), torch.zeros(6)
    assert one(lambda: x + row) == Moved(96 + 24, 96 + 24, 96)
    assert one(lambda: x @ x.T) == Moved(192, 192, 64)
    # A repeated row is read once, and a half is half as long.
    assert one(lambda: row.expand(4, 6) + x) == Moved(24 + 96, 24 + 96, 96)
    assert one(lambda: x.to(torch.float16)) == Moved(96, 96, 48)


def test_views_and_allocations_are_no_launches():
    x = torch.zeros(4, 6)
    assert count(lambda: (x.view(2, 12), x[1:].T, x.expand(3, 4, 6), x.detach(), torch.empty(9), x[:0] + 1)) == []


def test_what_is_overwritten_is_not_read_and_gathers_read_what_they_give():
    x, place, values = torch.zeros(100, 8), torch.tensor([3, 5]), torch.ones(2, 8)
    assert one(lambda: x.zero_()) == Moved(0, 0, 3200)
    assert one(lambda: x.mul_(2)) == Moved(3200, 3200, 3200)
    assert one(lambda: x[place]) == Moved(16 + 64, 16 + 64, 64)
    assert one(lambda: x.index_put_((place,), values)) == Moved(16 + 64, 16 + 64, 64)


def test_backward_is_counted():
    x = torch.zeros(4, 6, requires_grad=True)
    names = [launch.name for launch in count(lambda: torch.autograd.grad((x * x).sum(), x))]
    # Product, sum, the sum's upstream 1, two products, their sum.
    assert names[:3] == ["aten.mul.Tensor", "aten.sum.default", "aten.ones_like.default"]
    assert names.count("aten.mul.Tensor") == 3 and names.count("aten.add.Tensor") == 1


@needs_triton
@pytest.mark.parametrize("op", sorted({w.op for w in WORKS}))
def test_ops_move_no_more_than_their_floor_and_what_is_named(op, monkeypatch):
    """Distinct bytes read and bytes written, of kernels and of the PyTorch operations between them."""
    monkeypatch.setenv("SPML_KERNELS", "triton")
    for work in (w for w in WORKS if w.op == op):
        for mode in ("fwd", "step") if work.leaves else ("fwd",):
            named = work.floor[mode] + sum(work.residuals.get(mode, {}).values())
            # A kilobyte for partial sums and scalars, which only the smallest shapes feel.
            assert traffic(work, "fused", mode).least <= 1.05 * named + 1024, (work.name, mode)


@needs_triton
@pytest.mark.parametrize(
    "shape",
    [(128, 14, 2048, 80), (512, 7, 2048, 80), (16, 14, 2048, 20), (64, 16, 768, 81), (128, 7, 1280, 312)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("way", CAM_POOL_WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_classes_read_features_once_in_each_direction(shape, way, dtype, monkeypatch):
    """Within 1.05 of the floor, in at most six launches forward and backward together, or seven by PyTorch's products.

    With few channels the gradient of the map, which the cache is to hold, is more than that, and the map is for
    PyTorch's products.
    """
    monkeypatch.setenv("SPML_KERNELS", "triton")
    monkeypatch.setenv("SPML_CAM_POOL", way)
    work = cam_work(*shape, dtype)
    batch, side, channels, classes = shape
    vendor = way == "vendor"
    for mode, most in (("fwd", 2 + vendor), ("step", 6 + vendor)):
        launches = count(make_call(work, "fused", mode, work.inputs("meta")))
        # What starts the backward is the caller's.
        launches = [launch for launch in launches if "ones_like" not in launch.name]
        assert len(launches) <= most, [launch.name for launch in launches]
        cached = work.residuals[mode].get(IN_CACHE, 0) if channels < 1024 or 16 * classes > channels else 0
        if vendor:
            cached += 8 * batch * side**2 * cdiv(classes, ALIGNED) * ALIGNED
        assert total(launches, moved).least - cached <= 1.05 * work.floor[mode] + 1024


@needs_triton
def test_ops_move_less_than_pytorch(monkeypatch):
    # In fp16 tiny gradients of the features are kept by products in fp32, which plain PyTorch does not have: with few
    # classes they cost more than is saved.
    for work in (w for w in WORKS if "eager" in w.providers):
        costly = work.shape.startswith("fp16") and " C 80 " in work.shape
        for mode in ("fwd", "step") if work.leaves and not costly else ("fwd",):
            monkeypatch.setenv("SPML_KERNELS", "triton")
            fused = traffic(work, "fused", mode)
            monkeypatch.setenv("SPML_KERNELS", "reference")
            # The map itself is written and read by PyTorch; its gradient stays in cache here, a chunk at a time.
            cached = work.residuals.get(mode, {}).get(IN_CACHE, 0)
            assert fused.least - cached < traffic(work, "eager", mode).least, (work.name, mode)


@needs_triton
def test_kernels_on_the_cpu_are_refused(monkeypatch):
    from spml_kernels.label_loss.op import label_loss_op

    from spml_fast.methods.assume_negative import AssumeNegative

    logits, codes = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 or on meta"):
        count(lambda: label_loss_op(logits, codes, AssumeNegative.point.key, []))


@needs_triton
def test_a_kernel_without_a_formula_is_named(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "triton")
    monkeypatch.setattr("spml_kernels.devtools.traffic._FORMULAS", {})
    with pytest.raises(KeyError, match="_label_rows_kernel has no formula"):
        traffic(next(w for w in WORKS if w.op == "label_rows"), "fused", "fwd")
