"""The ops at the shapes that matter: inputs, rivals, and the bytes and operations that cannot be done without.

`works` is what `bench_kernels.py` times and counts and what the tests of the byte counter check. A further op joins by
a function here that yields its `KernelWork`s, in `OPS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from spml_kernels import (
    cam_mask,
    cam_pool,
    ignore_loss,
    ignore_statistics,
    label_loss,
    label_rows,
    large_loss_step,
)
from spml_kernels.cam_mask.reference import cam_mask_reference
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.reference import cam_pool_reference
from spml_kernels.common.heuristics import SKIP, WORD, cam_pool_launch, columns_launch, large_loss_single_launch
from spml_kernels.common.jit import cdiv
from spml_kernels.devtools.aot import Case
from spml_kernels.devtools.cases.label_loss import aot_cases as label_loss_cases
from spml_kernels.ignore_loss.reference import ignore_loss_reference, ignore_statistics_reference
from spml_kernels.label_loss.reference import label_loss_reference
from spml_kernels.label_rows.reference import label_rows_reference
from spml_kernels.large_loss.op import BINS
from spml_kernels.large_loss.reference import large_loss_reference, list_selected_reference, select_large_reference
from torch import Tensor

Call = Callable[..., tuple[Tensor, ...]]
Specs = list[tuple[tuple[int, ...], torch.dtype]]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class KernelWork:
    """One op at one shape.

    Attributes:
        op, shape: names of the row.
        specs: shape and type of every input; what has three channels second is an image, channels innermost in memory.
        draw: makes the inputs on a device.
        leaves: how many of the first inputs get gradients; 0 for an op without.
        providers: name -> function of the inputs. `eager` is what one would write in PyTorch, in the inputs' types;
            `fused` the public op.
        exact: the reference, for comparison with fp64.
        heads: how many of the first results gradients flow from; 0 for all.
        floor: bytes of forward (fwd) and of forward and backward together (step) that any kernels must move: inputs and
            outputs once, a tensor kept for the backward written and read once.
        residuals: name -> bytes that the fused op moves beyond them, by design.
        flops: of the matrix products that must be done, by mode.
        products: how many products of the operands' type one product takes (fp32 is made of three of tf32).
        tolerance: of the comparison, largest relative error of root mean squares.
        value_tolerance: the same of values alone, where they are held to more than gradients; 0 for the same.
        cam: bytes of the map in bf16; 0 for ops without one.
    """

    op: str
    shape: str
    specs: Specs
    draw: Callable[[str], list[Tensor]]
    leaves: int
    providers: dict[str, Call]
    exact: Call
    floor: dict[str, float]
    heads: int = 0
    residuals: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    products: int = 1
    tolerance: float = 1e-5
    value_tolerance: float = 0.0
    cam: float = 0.0

    def inputs(self, device: str) -> list[Tensor]:
        """Inputs on `device`; on `meta` shapes alone."""
        if device != "meta":
            return self.draw(device)
        found = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.specs]
        return [t.to(memory_format=torch.channels_last) if t.dim() == 4 and t.shape[1] == 3 else t for t in found]

    @property
    def modes(self) -> tuple[str, ...]:
        """What there is to run: forward, backward, both."""
        return ("fwd", "bwd", "step") if self.leaves else ("fwd",)

    def differentiable(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results that gradients flow from."""
        return results[: self.heads or len(results)]

    @property
    def name(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"


def make_call(work: KernelWork, provider: str, mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """A function without arguments that runs one provider: `fwd` keeps nothing, `bwd` and `step` give gradients."""
    function = work.providers[provider]
    if provider == "matmul":
        return _products(mode, inputs)
    if mode == "fwd":
        plain = [t.detach() for t in inputs]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*plain)

        return forward
    leaves = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(inputs)]
    wanted = leaves[: work.leaves]
    start = upstreams(work.differentiable(function(*leaves)))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(work.differentiable(function(*leaves)), wanted, start)

    if mode == "step":
        return step
    values = work.differentiable(function(*leaves))
    return lambda: torch.autograd.grad(values, wanted, start, retain_graph=True)


def _products(mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """The bare products of cam_pool's size: one forward, two backward."""
    features, weight = inputs[0].flatten(0, 2), inputs[1]
    cam = torch.zeros(len(features), len(weight), dtype=features.dtype, device=features.device).normal_()
    out = torch.empty_like(cam)

    def forward() -> Tensor:
        return torch.mm(features, weight.T, out=out)

    def backward() -> tuple[Tensor, Tensor]:
        return cam @ weight, cam.T @ features

    return {"fwd": forward, "bwd": backward, "step": lambda: (forward(), backward())}[mode]


def upstreams(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients to start from, of the outputs' shapes, neither 0 nor 1."""
    if outputs[0].is_meta:
        return [torch.empty_like(t) for t in outputs]
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    return [
        torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype) for t in outputs
    ]


def _compiled(function: Call) -> Call:
    """torch.compile of a function, made when it is first called: loading the compiler takes seconds."""
    made: list[Call] = []

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if not made:
            # A graph break or too many shapes would time PyTorch under the compiler's name.
            made.append(torch.compile(function, dynamic=False, fullgraph=True))
        return made[0](*inputs)

    return call


def size(specs: Specs) -> int:
    """Bytes of tensors of these shapes and types."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)


# ---- cam_pool


def _cam_inputs(specs: Specs, sparse: bool, device: str) -> list[Tensor]:
    """Features (positive where they matter), weights and bias.

    Sparse: all but a few classes of an image are negative everywhere, and those are positive in half of their cells,
    so that one cell in a hundred is positive. Dense: about half of them, in no order.
    """
    (shape, dtype), ((classes, channels), _), (_, bias_dtype) = specs
    batch, side = shape[0], shape[1]
    draw: dict[str, Any] = {"generator": torch.Generator(device=device).manual_seed(0), "device": device}
    features = torch.randn(shape, **draw)
    weight = torch.randn(classes, channels, **draw) / channels**0.5
    bias = torch.zeros(classes, device=device)
    if sparse:
        # One channel per group of classes switches them on in a fiftieth of the images.
        bias -= 8.0
        groups = min(50, channels, classes)
        for group in range(groups):
            weight[group::groups, group] = 4.0
            features[..., group] = 0.0
            chosen = torch.arange(group % batch, batch, 50, device=device)
            features[chosen, : max(side // 2, 1), :, group] = 4.0
    return [features.to(dtype), weight.to(dtype), bias.to(bias_dtype)]


def _cam_plain(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both means as one would write them: the product in the features' type, sums over cells in fp32."""
    cells = features.flatten(1, 2)
    pooled = cells.mean(1, dtype=torch.float32)
    cam = torch.nn.functional.linear(cells, weight, bias.to(cells.dtype))
    mean = torch.nn.functional.linear(pooled, weight.float(), bias.float())
    return mean, cam.relu().mean(1, dtype=torch.float32)


def _both(means: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(m for m in means if m is not None)


def cam_work(
    batch: int, side: int, channels: int, classes: int, dtype: torch.dtype, sparse: bool = False
) -> KernelWork:
    """cam_pool at one shape."""
    specs: Specs = [
        ((batch, side, side, channels), dtype),
        ((classes, channels), dtype),
        ((classes,), torch.float32),
    ]
    rows, cells, half = batch * side * side, side * side, dtype != torch.float32
    flops = 2.0 * rows * classes * channels
    outputs = 2 * batch * classes * 4
    signs = 4 * cdiv(rows, WORD) * cdiv(classes, SKIP) * SKIP
    weight = size(specs[1:2])
    providers: dict[str, Call] = {"fused": lambda *t: _both(cam_pool(*t)), "chunked": cam_pool_chunked}
    if not sparse:
        # The others do not care about signs.
        providers |= {"eager": _cam_plain, "compile": _compiled(_cam_plain), "matmul": _cam_plain}
    launch = cam_pool_launch(batch, cells, classes, channels, half)
    touched = [(p * cells + cells - 1) // launch.forward.rows - p * cells // launch.forward.rows for p in range(batch)]
    slots = 8 * classes * sum(n + 1 for n in touched if n)
    slotted = {"sums of images that lie in several tiles, written and read": 2.0 * slots}
    share = 2.0 * batch * cdiv(classes, SKIP) * SKIP * dtype.itemsize
    beyond = {**slotted, "signs read again by the second product": signs}
    beyond["shares of cells, written and read by both products"] = 3 * share
    if dtype == torch.float16:
        beyond["largest gradient"] = 4.0 * outputs
    if launch.splits > 1:
        beyond["parts of the gradients of weights and bias, written and read"] = (
            8.0 * launch.splits * classes * (channels + 1)
        )
    if launch.skip_empty_tiles:
        rounded = dtype == torch.float16
        beyond["signs read again for the list of squares"] = signs
        beyond["weights read again for the mean part"] = weight + (8.0 * classes * channels if rounded else 0.0)
        beyond["mean features and mean part of images, written and read"] = 16.0 * batch * channels
    return KernelWork(
        op="cam_pool",
        shape=f"{NAMES[dtype]} B {batch} HW {side}x{side} K {channels} C {classes} {'sparse' if sparse else 'dense'}",
        specs=specs,
        draw=lambda device: _cam_inputs(specs, sparse, device),
        leaves=3,
        providers=providers,
        exact=lambda *t: _both(cam_pool_reference(*t, True)),
        # A step reads features and weights forward and backward, and the upstream gradients; it writes the gradients.
        floor={"fwd": size(specs) + outputs, "step": 3 * size(specs) + 2 * outputs + 2 * signs},
        residuals={
            "fwd": slotted,
            "step": beyond,
        },
        flops={"fwd": flops, "bwd": 2 * flops, "step": 3 * flops},
        products=1 if half else 3,
        tolerance=1e-2 if half else 1e-4,
        # Sums are fp32 in every type; a cell too few or too many moves a mean by more than this.
        value_tolerance=5e-4 if half else 0.0,
        cam=2.0 * rows * classes,
    )


def cam_works(small: bool) -> Iterator[KernelWork]:
    """Dense and sparse signs; the large vocabulary first, since it has the goals."""
    shapes = [(128, 14, 2048, 5000), (128, 14, 2048, 80)]
    if not small:
        shapes += [(16, 14, 2048, 20), (64, 16, 768, 81), (128, 7, 1280, 312), (512, 7, 2048, 80)]
        shapes += [(32, 32, 512, 5000), (64, 14, 2048, 9605), (1, 14, 2048, 5000), (128, 8, 96, 10)]
    for shape, sparse in itertools.product(shapes, (False, True)):
        yield cam_work(*shape, torch.bfloat16, sparse)
    if not small:
        yield cam_work(*shapes[1], torch.float32)
        for shape in shapes[:2]:
            yield cam_work(*shape, torch.float16)


# ---- losses over logits and codes


def _loss_specs(rows: int, classes: int) -> Specs:
    return [((rows, classes), torch.float32), ((rows, classes), torch.int8)]


def loss_inputs(rows: int, classes: int, device: str) -> list[Tensor]:
    """Logits and codes: one observed positive a row, everything else unknown."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device) * 2 - 3
    codes = torch.full((rows, classes), -1, dtype=torch.int8, device=device)
    codes[torch.arange(rows, device=device), torch.arange(rows, device=device) % classes] = 1
    return [logits, codes]


def label_loss_work(rows: int, classes: int, point: Any, params: tuple[float, ...]) -> KernelWork:
    """One point-wise loss."""

    def reference(z: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        return (label_loss_reference(z, codes, point.reference, params),)

    specs = _loss_specs(rows, classes)
    least, logits = size(specs), size(specs[:1])
    return KernelWork(
        op="label_loss",
        shape=f"{point.name} {rows} x {classes}",
        specs=specs,
        draw=lambda device: loss_inputs(rows, classes, device),
        leaves=1,
        providers={
            "eager": reference,
            "compile": _compiled(reference),
            "fused": lambda z, codes: (label_loss(z, codes, point, params),),
        },
        exact=reference,
        # The gradient is written beside the loss; the backward reads it and writes it times the upstream factor.
        floor={"fwd": least, "step": least + 3 * logits},
    )


def _tables(small: bool) -> list[tuple[int, int]]:
    return [(128, 5000), (16, 80)] if small else [(128, 5000), (16, 20), (16, 80), (128, 81), (512, 312), (512, 9605)]


def label_loss_works(small: bool) -> Iterator[KernelWork]:
    """Assume-negative at every size; each other method's usual parameters where bytes matter."""
    from spml_fast.methods.pointwise import point_examples

    usual = {example.point.name: example for example in reversed(point_examples())}
    for table in _tables(small):
        yield label_loss_work(*table, usual["an"].point, usual["an"].params)
    tables = [(128, 5000)] if small else [(128, 5000), (512, 9605)]
    for table, name in itertools.product(tables, sorted(usual)):
        if name != "an":
            yield label_loss_work(*table, usual[name].point, usual[name].params)


def method_cases(arch: int) -> Iterator[Case]:
    """The point function of every method at one large shape, for compiles without a GPU."""
    from spml_fast.methods.pointwise import point_examples

    points = {e.point.name: (e.point, len(e.params)) for e in point_examples() if e.point.kernel is not None}
    wanted = tuple(f"{name} fp32 {128 * 9605} entries" for name in points)
    yield from (case for case in label_loss_cases(arch, list(points.values())) if case.shape in wanted)


def large_loss_work(rows: int, classes: int, k: int, listed: bool = True) -> KernelWork:
    """Selection of the k largest, loss, gradient and, with `listed`, the list of them."""

    def plain(z: Tensor, codes: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        selected, _ = select_large_reference(z, codes, number, k, "exact", lambda t: t[None], 0)
        found = list_selected_reference(selected, k) if listed else ()
        return (large_loss_reference(z, codes, selected, "reject"), selected, *found)

    def fused(z: Tensor, codes: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        step = large_loss_step(z, codes, number, k, "reject", length=k if listed else 0)
        found = (step.rows, step.classes, step.valid) if listed else ()
        return (step.loss, step.selected, *found)

    specs = _loss_specs(rows, classes)
    data, logits = size(specs), size(specs[:1])
    # The threshold is known when everything has been read, and only then can anything be written. What one program
    # holds it need not read again; where several share the work, that takes a second pass over logits and codes.
    alone = large_loss_single_launch(rows * classes) is not None
    least = (1 if alone else 2) * data + rows * classes + 17 * k * listed
    passes = {}
    if not alone:
        passes["two passes more over logits and codes to find the threshold"] = 2.0 * data
        passes["entries above and at the threshold counted by block"] = 1.0 * data
        passes["three histograms cleared and read"] = 6.0 * 4 * BINS
    return KernelWork(
        op="large_loss",
        shape=f"{rows} x {classes} k {k}{'' if listed else ' no list'}",
        specs=[*specs, ((), torch.int64)],
        draw=lambda device: [*loss_inputs(rows, classes, device), torch.tensor(k, device=device)],
        leaves=1,
        providers={
            "eager": plain,
            "compile": _compiled(plain),
            "fused": fused,
        },
        exact=plain,
        heads=1,
        floor={"fwd": least, "step": least + 3 * logits},
        residuals={"fwd": passes, "step": passes},
    )


def large_loss_works(small: bool) -> Iterator[KernelWork]:
    """One per cent of the entries; with the list as LL-Cp wants it, without as LL-R and LL-Ct."""
    for rows, classes in _tables(small):
        for listed in (True, False):
            yield large_loss_work(rows, classes, max(rows * classes // 100, 1), listed)


# ---- label_rows


def label_rows_work(rows: int, classes: int, samples: int = 100_000, listed: int = 6) -> KernelWork:
    """`listed` labels of every one of `samples` samples, `rows` of them wanted."""
    specs: Specs = [
        ((samples + 1,), torch.int64),
        ((samples * listed,), torch.int16),
        ((samples * listed,), torch.int8),
        ((rows,), torch.int64),
    ]

    def draw(device: str) -> list[Tensor]:
        generator = torch.Generator(device=device).manual_seed(0)
        indptr = torch.arange(0, samples * listed + 1, listed, device=device)
        first = torch.randint(0, classes, (samples, 1), generator=generator, device=device)
        # Equal classes within a row would make the result depend on the order of writes.
        ids = ((first + torch.arange(listed, device=device)) % classes).to(torch.int16)
        codes = torch.randint(0, 2, (samples * listed,), generator=generator, device=device, dtype=torch.int8)
        index = torch.randint(0, samples, (rows,), generator=generator, device=device)
        return [indptr, ids.flatten(), codes, index]

    def reference(*t: Tensor) -> tuple[Tensor, ...]:
        return (label_rows_reference(t[0], t[1], t[2], t[3], classes, -1, listed),)

    return KernelWork(
        op="label_rows",
        shape=f"{rows} x {classes}",
        specs=specs,
        draw=draw,
        leaves=0,
        providers={
            "eager": reference,
            "compile": _compiled(reference),
            "fused": lambda *t: (label_rows(t[0], t[1], t[2], t[3], classes, -1, listed),),
        },
        exact=reference,
        floor={"fwd": rows * (classes + 8 + 16 + 3 * listed)},
        residuals={"fwd": {"listed codes written over the default": float(rows * listed)}},
    )


def label_rows_works(small: bool) -> Iterator[KernelWork]:
    """Six listed labels a sample, of 100,000 samples."""
    for table in _tables(small):
        yield label_rows_work(*table)


# ---- cam_mask


def cam_mask_work(
    batch: int, side: int, channels: int, classes: int, pixels: int, chosen: int, dtype: torch.dtype
) -> KernelWork:
    """Images of `pixels` x `pixels`, masked by the maps of `chosen` classes each."""
    specs: Specs = [
        ((batch, side, side, channels), dtype),
        ((classes, channels), dtype),
        ((classes,), torch.float32),
        ((batch, chosen), torch.int64),
        ((batch, 3, pixels, pixels), torch.float32),
    ]

    def draw(device: str) -> list[Tensor]:
        """Maps that fall off from a point of the image, so that about a third of it is kept, in one piece."""
        draw: dict[str, Any] = {"generator": torch.Generator(device=device).manual_seed(0), "device": device}
        place = torch.arange(side, device=device) / side
        centre = torch.rand(2, batch, 1, 1, **draw)
        far = (place[None, :, None] - centre[0]).square() + (place[None, None, :] - centre[1]).square()
        direction = torch.rand(channels, **draw)
        features = torch.exp(-4 * far)[..., None] * direction + 0.02 * torch.randn(specs[0][0], **draw)
        weight = (direction + 0.1 * torch.randn(classes, channels, **draw)) / channels
        ids = (torch.randint(0, classes, (batch, 1), **draw) + torch.arange(chosen, device=device)) % classes
        images = torch.randn(batch, 3, pixels, pixels, **draw).to(memory_format=torch.channels_last)
        return [features.to(dtype), weight.to(dtype), torch.zeros(classes, device=device), ids, images]

    def reference(*t: Tensor) -> tuple[Tensor, ...]:
        return (cam_mask_reference(*t, 0.5, "per_image", 16),)

    maps = 4.0 * batch * chosen * side * side
    rows = min(classes, batch * chosen)
    head = size(specs[:1]) + rows * (channels * dtype.itemsize + 4) + 8 * batch * chosen
    return KernelWork(
        op="cam_mask",
        shape=f"{NAMES[dtype]} B {batch} HW {side}x{side} K {channels} S {pixels} N {chosen}",
        specs=specs,
        draw=draw,
        leaves=0,
        providers={
            "eager": reference,
            "compile": _compiled(reference),
            "fused": lambda *t: (cam_mask(*t, threshold=0.5),),
        },
        exact=reference,
        # Every image read and written; kernels may do with less where nothing is kept.
        floor={"fwd": head + 2 * size(specs[4:])},
        residuals={"fwd": {"maps written, normalised, and read": 4 * maps, "names of classes": 16.0 * batch * chosen}},
        # A pixel on the threshold may fall to either side.
        tolerance=1e-2,
    )


def cam_mask_works(small: bool) -> Iterator[KernelWork]:
    """One observed positive, and six."""
    yield cam_mask_work(128, 14, 2048, 80, 448, 1, torch.bfloat16)
    if not small:
        yield cam_mask_work(128, 14, 2048, 80, 448, 6, torch.bfloat16)
        yield cam_mask_work(16, 14, 2048, 20, 448, 1, torch.bfloat16)
        yield cam_mask_work(64, 16, 768, 81, 225, 1, torch.bfloat16)
        yield cam_mask_work(32, 8, 96, 10, 64, 1, torch.float32)


# ---- IGNORE's two passes


def _views(rows: int, classes: int, number: int, device: str) -> list[Tensor]:
    """Logits of `number` views that differ a little, and codes."""
    logits, codes = loss_inputs(rows, classes, device)
    generator = torch.Generator(device=device).manual_seed(2)
    other = [logits + torch.randn(rows, classes, generator=generator, device=device) for _ in range(number - 1)]
    return [logits, *other, codes]


def ignore_statistics_work(rows: int, classes: int) -> KernelWork:
    """Pass one."""
    specs: Specs = [((rows, classes), torch.float32)] * 2 + [((rows, classes), torch.int8)]
    launch = columns_launch(rows, classes)
    parts = cdiv(rows, launch.rows * launch.turns)

    def reference(*t: Tensor) -> tuple[Tensor, ...]:
        return (ignore_statistics_reference(*t),)

    return KernelWork(
        op="ignore_statistics",
        shape=f"{rows} x {classes}",
        specs=specs,
        draw=lambda device: _views(rows, classes, 2, device),
        leaves=0,
        providers={
            "eager": reference,
            "compile": _compiled(reference),
            "fused": lambda *t: (ignore_statistics(*t),),
        },
        exact=reference,
        floor={"fwd": size(specs) + 4 * (classes + 3)},
        residuals={"fwd": {"sums of parts of the rows, written and read": 8.0 * parts * classes}},
        tolerance=1e-5,
    )


def ignore_loss_work(rows: int, classes: int) -> KernelWork:
    """Pass two with all three views."""
    specs: Specs = [((rows, classes), torch.float32)] * 3 + [((rows, classes), torch.int8)]
    specs += [((), torch.float32), ((classes,), torch.float32)]

    def draw(device: str) -> list[Tensor]:
        return [
            *_views(rows, classes, 3, device),
            torch.tensor(0.8, device=device),
            torch.full((classes,), -3.0, device=device),
        ]

    # The strong view comes second, so that the two leaves are the first.
    def reference(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(ignore_loss_reference(*t, "logits", 1e-5, True))

    logits, codes = size(specs[:1]), size(specs[3:4])
    return KernelWork(
        op="ignore_loss",
        shape=f"{rows} x {classes}",
        specs=specs,
        draw=draw,
        leaves=2,
        providers={
            "eager": reference,
            "compile": _compiled(reference),
            "fused": lambda *t: tuple(ignore_loss(*t)[:4]),
        },
        exact=reference,
        heads=3,
        # The rejection is an output, one byte an entry. The backward reads two views, codes and rejection again.
        floor={"fwd": size(specs) + codes, "step": size(specs) + codes + 2 * logits + 2 * codes + 2 * logits},
    )


def ignore_statistics_works(small: bool) -> Iterator[KernelWork]:
    """Tables of the usual sizes."""
    for table in _tables(small):
        yield ignore_statistics_work(*table)


def ignore_loss_works(small: bool) -> Iterator[KernelWork]:
    """Tables of the usual sizes."""
    for table in _tables(small):
        yield ignore_loss_work(*table)


OPS: dict[str, Callable[[bool], Iterator[KernelWork]]] = {
    "cam_pool": cam_works,
    "cam_mask": cam_mask_works,
    "label_loss": label_loss_works,
    "large_loss": large_loss_works,
    "ignore_statistics": ignore_statistics_works,
    "ignore_loss": ignore_loss_works,
    "label_rows": label_rows_works,
}


def works(ops: list[str], small: bool = False) -> list[KernelWork]:
    """All works of these ops; `small` is a few shapes of each."""
    return [work for op in ops for work in OPS[op](small)]
