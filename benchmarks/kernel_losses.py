"""The ops on logits and label codes at the shapes that matter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from spml_kernels import PointLoss, ignore_loss, ignore_statistics, label_loss, label_rows, large_loss_step
from spml_kernels.common.heuristics import LARGE_LOSS_SELECTS, columns_launch, large_loss_single_launch
from spml_kernels.common.jit import cdiv
from spml_kernels.devtools.aot import Case
from spml_kernels.devtools.cases.label_loss import aot_cases as label_loss_cases
from spml_kernels.ignore_loss.reference import ignore_loss_reference, ignore_statistics_reference
from spml_kernels.label_loss.reference import label_loss_reference
from spml_kernels.label_rows.reference import label_rows_reference
from spml_kernels.large_loss.op import way_of
from spml_kernels.large_loss.reference import large_loss_reference, list_selected_reference, select_large_reference
from torch import Tensor

from benchmarks.kernel_base import KernelWork, Spec, Specs, size
from benchmarks.kernel_rivals import large_loss_lean, loss_rivals


def _loss_specs(rows: int, classes: int) -> Specs:
    return [((rows, classes), torch.float32), ((rows, classes), torch.int8)]


def loss_inputs(rows: int, classes: int, device: str) -> list[Tensor]:
    """Logits and codes: one observed positive a row, everything else unknown."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device) * 2 - 3
    codes = torch.full((rows, classes), -1, dtype=torch.int8, device=device)
    codes[torch.arange(rows, device=device), torch.arange(rows, device=device) % classes] = 1
    return [logits, codes]


def label_loss_work(rows: int, classes: int, point: PointLoss, params: tuple[float, ...]) -> KernelWork:
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
        providers={**loss_rivals(reference), "fused": lambda z, codes: (label_loss(z, codes, point, params),)},
        exact=reference,
        # Both passes read the inputs, since nothing is known of the upstream factor in the first; the second writes.
        floor={"fwd": least, "step": 2 * least + logits},
    )


def _tables(small: bool) -> list[tuple[int, int]]:
    return (
        [(512, 9605), (128, 80)]
        if small
        else [(128, 5000), (16, 20), (16, 80), (128, 80), (128, 81), (512, 312), (512, 9605)]
    )


def label_loss_works(small: bool) -> Iterator[KernelWork]:
    """Assume-negative at every size; each other method's usual parameters where bytes matter."""
    from spml_fast.methods.pointwise import point_examples

    examples = [example for example in point_examples() if example.point.kernel is not None]
    usual = {example.point.name: example for example in reversed(examples)}
    for table in _tables(small):
        yield label_loss_work(*table, usual["an"].point, usual["an"].params)
    # The longest functions where there is time for few.
    names = ("asl", "gr") if small else sorted(usual)
    for table, name in itertools.product([(512, 9605)] if small else [(128, 5000), (512, 9605)], names):
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
        entries = list_selected_reference(selected, k) if listed else ()
        return (large_loss_reference(z, codes, selected, "reject"), selected, *entries)

    def fused(z: Tensor, codes: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        step = large_loss_step(z, codes, number, k, "reject", length=k if listed else 0)
        entries = (step.rows, step.classes, step.valid) if listed else ()
        return (step.loss, step.selected, *entries)

    specs = _loss_specs(rows, classes)
    data, logits = size(specs), size(specs[:1])
    # The threshold is known when everything has been read, and only then can anything be written. What one program
    # holds it need not read again; where several share the work, that takes a second pass over logits and codes.
    alone = large_loss_single_launch(rows * classes) is not None
    least = (1 if alone else 2) * data + rows * classes + 17 * k * listed
    passes = {}
    if not alone:
        select = LARGE_LOSS_SELECTS[way_of(rows * classes)]
        passes["further passes over logits and codes to find the threshold"] = (len(select.widths) - 1.0) * data
        passes["entries above and at the threshold counted by block"] = 1.0 * data
        passes["counts of all passes cleared and read"] = 2.0 * len(select.widths) * 4 * select.bins
    return KernelWork(
        op="large_loss",
        shape=f"{rows} x {classes} k {k}{'' if listed else ' no list'}",
        specs=[*specs, ((), torch.int64)],
        draw=lambda device: [*loss_inputs(rows, classes, device), torch.tensor(k, device=device)],
        leaves=1,
        providers={**loss_rivals(plain, large_loss_lean(k, listed)), "fused": fused},
        exact=plain,
        heads=1,
        floor={"fwd": least, "step": least + 3 * logits},
        residuals={"fwd": passes, "step": passes},
    )


def large_loss_works(small: bool) -> Iterator[KernelWork]:
    """One per cent of the entries; with the list as LL-Cp wants it, without as LL-R and LL-Ct."""
    for rows, classes in _tables(small):
        for listed in (False,) if small else (True, False):
            yield large_loss_work(rows, classes, max(rows * classes // 100, 1), listed)


def _views(rows: int, classes: int, number: int, device: str) -> list[Tensor]:
    """Logits of `number` views that differ a little, and codes."""
    logits, codes = loss_inputs(rows, classes, device)
    generator = torch.Generator(device=device).manual_seed(2)
    other = [logits + torch.randn(rows, classes, generator=generator, device=device) for _ in range(number - 1)]
    return [logits, *other, codes]


def ignore_statistics_work(rows: int, classes: int) -> KernelWork:
    """Pass one."""
    logits: Spec = ((rows, classes), torch.float32)
    specs: Specs = [logits, logits, ((rows, classes), torch.int8)]
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
        providers={**loss_rivals(reference), "fused": lambda *t: (ignore_statistics(*t),)},
        exact=reference,
        floor={"fwd": size(specs) + 4 * (classes + 3)},
        residuals={"fwd": {"sums of parts of the rows, written and read": 8.0 * parts * classes}},
        tolerance=1e-5,
    )


def ignore_loss_work(rows: int, classes: int) -> KernelWork:
    """Pass two with all three views."""
    view: Spec = ((rows, classes), torch.float32)
    specs: Specs = [view, view, view, ((rows, classes), torch.int8), ((), torch.float32), ((classes,), torch.float32)]

    def draw(device: str) -> list[Tensor]:
        return [
            *_views(rows, classes, 3, device),
            torch.tensor(0.8, device=device),
            torch.full((classes,), -3.0, device=device),
        ]

    # The strong view comes second, so that the two leaves are the first.
    def reference(
        weak: Tensor, strong: Tensor, masked: Tensor, codes: Tensor, gap: Tensor, average: Tensor
    ) -> tuple[Tensor, ...]:
        return ignore_loss_reference(weak, strong, masked, codes, gap, average, "logits", 1e-5, True)

    logits, codes = size(specs[:1]), size(specs[3:4])
    return KernelWork(
        op="ignore_loss",
        shape=f"{rows} x {classes}",
        specs=specs,
        draw=draw,
        leaves=2,
        providers={**loss_rivals(reference), "fused": lambda *t: tuple(ignore_loss(*t)[:4])},
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
            **loss_rivals(reference),
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
