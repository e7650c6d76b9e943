"""Checks of the ops on a GPU: against fp64 on the CPU, against themselves, and without waiting for the device.

`tests/gpu_check.py` runs them one after the other; `PIECES` are the same in parts that can be compiled side by side.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import get_args

import torch
from spml_kernels.common import heuristics

from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_ways import chosen, ways_of
from benchmarks.machine import installed


class NotInstalled(Exception):
    """A library that a check needs is not on this machine."""


def need(*modules: str) -> None:
    """Raise `NotInstalled` unless all modules can be found."""
    for name in modules:
        if not installed(name):
            raise NotInstalled(name)


OPS_SHAPES = (((3, 7, 7, 96), 10), ((2, 14, 14, 512), 80), ((5, 5, 3, 2048), 312), ((12, 14, 14, 256), 700))


def check_ops(shapes: tuple[tuple[tuple[int, ...], int], ...] = OPS_SHAPES) -> str:
    """cam_pool in every way, cam_map, large_loss and label_rows on the GPU against fp64 on the CPU."""
    from spml_kernels import cam_map, cam_pool, label_rows, large_loss, select_large
    from spml_kernels.large_loss.op import Scheme

    worst = 0.0
    for shape, classes in shapes:
        torch.manual_seed(0)
        features = torch.randn(shape, dtype=torch.float64)
        weight = torch.randn(classes, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
        bias = torch.randn(classes, dtype=torch.float64)
        for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 4e-2)):
            inputs = [features, weight, bias]
            low = [t.to(dtype).cuda().requires_grad_() for t in inputs]
            high = [t.detach().cpu().double().requires_grad_() for t in low]
            results = []
            ways = [(op, way) for op in ("cam_pool", "cam_pool_backward") for way in ways_of(op)]
            for tensors, taken in ((high, None), *((low, way) for way in ways for _ in range(2))):
                with chosen(*taken) if taken else contextlib.nullcontext():
                    mean, relu = cam_pool(tensors[0], tensors[1], tensors[2])
                    assert relu is not None
                    loss = (mean.double() * 0.7 + relu.double() * 2).sum()
                    # The backward's way is chosen when it runs.
                    grads = torch.autograd.grad(loss, tensors)
                results.append([mean, relu, *grads])
            for named, first, second in zip(ways, results[1::2], results[2::2], strict=True):
                for reference, value, again in zip(results[0], first, second, strict=True):
                    assert torch.equal(value, again), f"{named}: two runs differ"
                    scale = reference.abs().mean()
                    error = float((reference - value.cpu().double()).abs().mean() / scale)
                    worst = max(worst, error if dtype == torch.float32 else 0)
                    assert error < tolerance, f"{named} {shape} {dtype}: relative error {error}"
            ids = torch.randint(-1, classes, (shape[0], 2))
            maps = [
                cam_map(x.detach(), w.detach(), b.detach(), picked).cpu().double()
                for (x, w, b), picked in ((low, ids.cuda()), (high, ids))
            ]
            assert float((maps[0] - maps[1]).abs().mean()) < tolerance
        logits, codes = torch.randn(64, classes), torch.randint(-1, 2, (64, classes), dtype=torch.int8)
        for k in (0, 1, 17, 64 * classes):
            args = (torch.tensor(k), 64 * classes)
            expected, threshold = select_large(logits, codes, *args)
            for way in ways_of("large_loss"):
                with chosen("large_loss", way):
                    found, level = select_large(logits.cuda(), codes.cuda(), args[0].cuda(), args[1])
                assert torch.equal(expected, found.cpu()) and torch.equal(threshold, level.cpu()), f"large_loss {way}"
            for scheme in get_args(Scheme):
                one = large_loss(logits.double(), codes, expected, scheme)
                two = large_loss(logits.cuda(), codes.cuda(), found, scheme)
                assert abs(float(one) - float(two)) <= 1e-5 * abs(float(one))
        listed = codes != -1
        rows, columns = torch.nonzero(listed, as_tuple=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
        index, most = torch.randperm(64), int(listed.sum(1).max())
        arrays = (indptr.cuda(), columns.to(torch.int16).cuda(), codes[rows, columns].cuda())
        dense = label_rows(arrays[0], arrays[1], arrays[2], index.cuda(), classes, -1, most)
        assert torch.equal(dense.cpu(), codes[index])
    return f"largest fp32 relative error {worst:.1e}"


POINT_SHAPES = ((1, 1), (16, 80), (33, 81), (128, 5000))
POINT_DTYPES = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2))


def check_points(
    shapes: tuple[tuple[int, int], ...] = POINT_SHAPES,
    dtypes: tuple[tuple[torch.dtype, float], ...] = POINT_DTYPES,
) -> str:
    """label_loss and its gradient on the GPU against fp64 on the CPU, twice for bit-equality."""
    need("timm")
    from spml_kernels import label_loss

    from spml_fast.methods.pointwise import point_examples

    torch.manual_seed(0)
    worst = 0.0
    points = [(e.point, e.params) for e in point_examples() if e.point.kernel is not None]
    for shape in shapes:
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        for dtype, tolerance in dtypes:
            logits = (torch.randn(shape) * 4).to(dtype)
            for point, params in points:
                results = []
                for leaf, known in ((logits.double(), codes), *[(logits.cuda(), codes.cuda())] * 2):
                    leaf = leaf.clone().requires_grad_()
                    loss = label_loss(leaf, known, point, params)
                    results.append([loss, *torch.autograd.grad(loss * 0.37, leaf)])
                for reference, value, again in zip(*results, strict=True):
                    assert torch.equal(value, again), f"label_loss {point.name}: two runs differ"
                    off = (reference - value.cpu().double()).detach().square().mean().sqrt()
                    error = float(off / reference.detach().square().mean().sqrt().clamp(min=1e-30))
                    worst = max(worst, error if dtype == torch.float32 else 0)
                    assert error < tolerance, f"label_loss {point.name} {shape} {dtype}: relative error {error}"
    return f"largest fp32 relative error {worst:.1e}"


# Cells and pixels of a side, channels, classes of an image; type of features and images.
MASK_CASES = (
    ((14, 448, 2048, 1), torch.bfloat16),
    ((14, 448, 512, 4), torch.float32),
    ((7, 225, 96, 2), torch.float16),
)
IGNORE_TABLES = ((16, 80), (128, 81), (128, 5000))


def check_ignore(
    masks: tuple[tuple[tuple[int, int, int, int], torch.dtype], ...] = MASK_CASES,
    tables: tuple[tuple[int, int], ...] = IGNORE_TABLES,
) -> str:
    """Masked images and IGNORE's two passes on the GPU against fp64 on the CPU, twice for bit-equality."""
    from spml_kernels import cam_mask, ignore_loss, ignore_statistics
    from spml_kernels.cam_mask.op import MapNorm
    from spml_kernels.ignore_loss.op import LossForm

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()

    torch.manual_seed(0)
    worst = 0.0
    for (cells, side, channels, number), dtype in masks:
        features = torch.randn(20, cells, cells, channels).to(dtype).cuda()
        weight, bias = torch.randn(80, channels).cuda() / channels**0.5, torch.randn(80).cuda()
        classes = torch.randint(-1, 80, (20, number)).cuda()
        for layout in (torch.channels_last, torch.contiguous_format):
            images = torch.randn(20, 3, side, side, device="cuda").to(dtype).to(memory_format=layout)
            for norm in get_args(MapNorm):
                one, two = (cam_mask(features, weight, bias, classes, images, 0.8, norm, 16) for _ in range(2))
                assert torch.equal(one, two), f"cam_mask {norm}: two runs differ"
                assert one.is_contiguous(memory_format=layout)
                x, w, b, ids, pixels = (exact(t) for t in (features, weight, bias, classes, images))
                wanted = cam_mask(x, w, b, ids, pixels, 0.8, norm, 16)
                # Pixels at the threshold itself may fall to either side.
                difference = float((one.cpu().double() != wanted).double().mean())
                worst = max(worst, difference)
                assert difference < 1e-3, f"cam_mask {norm} {dtype} {layout}: {difference:.2%} of the pixels differ"
    error = 0.0
    for rows, classes_in_all in tables:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            weak, strong, masked = (torch.randn(rows, classes_in_all).mul(4).to(dtype).cuda() for _ in range(3))
            codes = torch.randint(-1, 2, (rows, classes_in_all), dtype=torch.int8).cuda()
            gap, average = torch.tensor(2.0).cuda(), torch.randn(classes_in_all).cuda()
            for form in get_args(LossForm):
                results = []
                for give in (exact, torch.Tensor.clone, torch.Tensor.clone):
                    leaves = [give(t).requires_grad_() for t in (weak, strong)]
                    views, known, limit, averages = (give(t) for t in (masked, codes, gap, average))
                    terms = ignore_loss(leaves[0], leaves[1], views, known, limit, averages, form, truth=known.abs())
                    loss = terms.spbc / rows + terms.ign / (rows * classes_in_all) - terms.reg / (rows * 7)
                    grads = torch.autograd.grad(loss, leaves)
                    results.append([*terms, *grads, ignore_statistics(leaves[0], views, known)])
                for reference, value, again in zip(*results, strict=True):
                    assert torch.equal(value, again), "ignore_loss: two runs differ"
                    off = (reference.double() - value.cpu().double()).detach().square().mean().sqrt()
                    off = float(off / reference.detach().double().square().mean().sqrt().clamp(min=1e-30))
                    error = max(error, off if dtype == torch.float32 else 0)
                    assert off < tolerance, f"ignore_loss {rows} x {classes_in_all} {dtype} {form}: error {off}"
    return f"masks differ at {worst:.1e} of the pixels, largest fp32 relative error of the losses {error:.1e}"


def _small_cam_pool(device: str, op: str, way: str) -> None:
    from spml_kernels import cam_pool

    torch.manual_seed(0)
    for dtype, batch, classes in ((torch.float16, 3, 70), (torch.bfloat16, 16, 70), (torch.float32, 3, 9)):
        with chosen(op, way):
            tensors = [torch.randn(batch, 5, 7, 40), torch.randn(classes, 40), torch.randn(classes)]
            leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
            mean, relu = cam_pool(leaves[0], leaves[1], leaves[2])
            assert relu is not None
            torch.autograd.grad((mean * 0.7 + relu).sum(), leaves)


def _small_losses(device: str, rows: int, classes: int) -> None:
    from spml_kernels import ignore_loss, ignore_statistics, label_loss, label_rows
    from spml_kernels.large_loss.op import _KEPT, Ties, large_loss_step

    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device, requires_grad=True)
    codes = torch.randint(-1, 2, (rows, classes), dtype=torch.int8, device=device)
    for ties, way in itertools.product(get_args(Ties), ways_of("large_loss")):
        with chosen("large_loss", way):
            step = large_loss_step(logits, codes, torch.tensor(11, device=device), 13, "correct", ties)
        torch.autograd.grad(step.loss, logits)
    torch.autograd.grad(label_loss(logits, codes, _KEPT), logits)
    listed = codes.cpu() != -1
    entry = torch.nonzero(listed, as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    arrays = (indptr.to(device), entry[1].to(device, torch.int16), codes.cpu()[entry].to(device))
    index, most = torch.randperm(rows).to(device), int(listed.sum(1).max())
    label_rows(arrays[0], arrays[1], arrays[2], index, classes, -1, most)
    weak, strong = (torch.randn(rows, classes, device=device, requires_grad=True) for _ in range(2))
    masked, average = torch.randn(rows, classes, device=device), torch.randn(classes, device=device)
    gap = torch.tensor(1.0, device=device)
    terms = ignore_loss(weak, strong, masked, codes, gap, average, "logits", truth=codes.abs())
    torch.autograd.grad(terms.spbc + terms.ign - terms.reg, (weak, strong))
    ignore_statistics(weak, masked, codes)


def _small_masks(device: str, layout: torch.memory_format) -> None:
    from spml_kernels import cam_mask
    from spml_kernels.cam_mask.op import MapNorm

    torch.manual_seed(0)
    features, weight, bias = (t.to(device) for t in (torch.randn(3, 5, 5, 33), torch.randn(9, 33), torch.randn(9)))
    ids = torch.tensor([[3, -1], [-1, -1], [0, 8]]).to(device)
    images = torch.randn(3, 3, 37, 37).to(device).to(memory_format=layout)
    for norm in get_args(MapNorm):
        cam_mask(features, weight, bias, ids, images, 0.5, norm, 2)


def small_pieces(device: str) -> dict[str, Callable[[], None]]:
    """`small_calls` in parts, by name."""
    pieces: dict[str, Callable[[], None]] = {}
    for op in ("cam_pool", "cam_pool_backward"):
        for way in ways_of(op):
            pieces[f"small {op} {way}"] = functools.partial(_small_cam_pool, device, op, way)
    # One program holds the first of the two.
    for rows, classes in ((3, 7), (28, 601)):
        pieces[f"small losses {rows} x {classes}"] = functools.partial(_small_losses, device, rows, classes)
    for layout in (torch.channels_last, torch.contiguous_format):
        pieces[f"small masks {layout}"] = functools.partial(_small_masks, device, layout)
    return pieces


def small_calls(device: str) -> None:
    """Every op once or twice at small odd shapes, forward and backward, for a tool that watches what kernels access."""
    for call in small_pieces(device).values():
        call()


def usual_works() -> list[KernelWork]:
    """Every op at its largest usual shape and at a small one."""
    from benchmarks.kernel_works import OPS, works

    need("timm")
    return works(list(OPS), small=True)


def every_way(work: KernelWork) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Names and contexts of the ways of a work's op; one without a name where there is but one way."""
    found = [(way, chosen(work.op, way)) for way in ways_of(work.op)]
    # The shipped backward is that of every way of the forward.
    backward = [way for way in ways_of(f"{work.op}_backward") if way != heuristics.CAM_POOL_BACKWARD]
    found += [(f"backward {way}", chosen(f"{work.op}_backward", way)) for way in backward]
    return found or [("", contextlib.nullcontext())]


def check_repeat(given: list[KernelWork] | None = None, runs: int = 200, device: str = "cuda") -> str:
    """Values and gradients of every op, `runs` times: an error that moves is a race."""
    number = 0
    for work in given if given is not None else usual_works():
        inputs = work.inputs(device)
        for way, context in every_way(work):
            with context:
                for mode in dict.fromkeys(("fwd", work.main_mode)):
                    call = make_call(work, "fused", mode, inputs)
                    first = call()
                    for run in range(1, runs):
                        equal = [torch.equal(a, b) for a, b in zip(first, call(), strict=True)]
                        assert all(equal), f"{work.name} {way} {mode}: result {equal.index(False)} of run {run} differs"
                    number += 1
    return f"{number} calls of ops, {runs} times each"


def check_devices(given: list[KernelWork] | None = None) -> str:
    """The same bits on a stream of its own, and on a card that is not the current one."""
    cards = torch.cuda.device_count()
    for work in given if given is not None else usual_works():
        results = []
        for device, stream in [("cuda:0", False), ("cuda:0", True), *[("cuda:1", False)] * (cards > 1)]:
            inputs = [t.to(device) for t in work.inputs("cuda:0")]
            calls = [make_call(work, "fused", mode, inputs) for mode in dict.fromkeys(("fwd", work.main_mode))]
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()) if stream else contextlib.nullcontext():
                results.append([r.cpu() for call in calls for r in call()])
        same = [torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)]
        assert all(same), f"{work.name}: results differ"
    return "two streams" + (" and two cards" if cards > 1 else "; one card alone")


def check_sync() -> str:
    """Method and head of a training step with synchronisation forbidden."""
    need("timm")
    from spml_fast.core.batch import Batch
    from spml_fast.core.config import ModelConfig
    from spml_fast.data.labels import LabelStore, SparseLabels
    from spml_fast.methods import Progress, get_method
    from spml_fast.models.classifier import Classifier

    store = LabelStore(SparseLabels.from_positives([[i % 10] for i in range(256)], 10, -1), "cuda")
    model = ModelConfig(backbone="resnet18", pretrained=False)
    classifier = Classifier(model, 10, 64).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    index = torch.arange(32, device="cuda")
    progress = Progress(5, 10, 40, 10)
    names = ("an", "ll_r", "ll_ct", "ll_cp", "ignore")
    for name in names:
        cls = get_method(name)
        method = cls(cls.Options(name=name), store).cuda()

        def step(method: torch.nn.Module = method) -> None:
            batch = Batch({"weak": images, "strong": images}, store.rows(index), index, 32)
            method(classifier, batch, progress).loss.backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none in " + ", ".join(names)


# Correctness in pieces of some seconds, for a machine with cores to compile them side by side.
PIECES: dict[str, Callable[[], str]] = {
    **{f"ops {shape}": functools.partial(check_ops, (shape,)) for shape in OPS_SHAPES},
    **{
        f"points {shape} {dtype[0]}": functools.partial(check_points, (shape,), (dtype,))
        for shape in POINT_SHAPES
        for dtype in POINT_DTYPES
    },
    **{f"ignore mask {case}": functools.partial(check_ignore, (case,), ()) for case in MASK_CASES},
    **{f"ignore {table}": functools.partial(check_ignore, (), (table,)) for table in IGNORE_TABLES},
    "sync": check_sync,
}
