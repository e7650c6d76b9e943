"""Radix selection against the sorted reference, bit for bit, and the losses made from it."""

from __future__ import annotations

import threading

import pytest
import torch
from spml_kernels import large_loss, large_loss_step, list_selected, select_large
from spml_kernels.common import heuristics
from spml_kernels.large_loss.op import large_histogram_op, large_step_op, large_threshold_op
from spml_kernels.large_loss.reference import large_loss_reference, list_selected_reference, select_large_reference

from tests.support.kernels import (
    TOLERANCE,
    assert_close,
    assert_op_sound,
    draw_codes,
    draw_logits,
    on_ranks,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("triton_on")

INF = float("inf")


@pytest.fixture(params=["one launch", "histogram", "counts"])
def form(request, monkeypatch):
    """All forms of the kernels at shapes that one program holds."""
    if request.param != "one launch":
        monkeypatch.setattr("spml_kernels.common.heuristics.SINGLE_LAUNCH_ENTRIES", -1)
        monkeypatch.setenv("SPML_LARGE_LOSS", request.param)


@pytest.fixture(params=["histogram", "counts"])
def way(request, monkeypatch):
    """Both ways to count."""
    monkeypatch.setenv("SPML_LARGE_LOSS", request.param)
    return request.param


def reference(logits, codes, k, k_max, ties):
    logits, codes, k = logits.detach().cpu(), codes.cpu(), torch.tensor(k)
    return select_large_reference(logits, codes, k, k_max, ties, lambda t: t[None], 0)


def check(logits, codes, k, ties="exact", k_max=None):
    k_max = k if k_max is None else k_max
    selected, threshold = select_large(logits, codes, torch.tensor(k, device=logits.device), k_max, ties)
    expected, level = reference(logits, codes, k, k_max, ties)
    assert selected.dtype == torch.bool and threshold.shape == ()
    assert torch.equal(threshold.cpu(), level)
    assert torch.equal(selected.cpu(), expected)
    return selected


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("ties", ["exact", "inclusive"])
@pytest.mark.parametrize("k", [0, 1, 2, 17, 300, 1200, 37 * 81])
def test_equals_the_reference(k, ties, dtype, device, form):
    # Half precision has many ties by itself; k passes the number of candidates.
    check(draw_logits((37, 81), dtype, device), draw_codes((37, 81), device), k, ties)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (3, 4099), (128, 128), (53, 312)])
def test_shapes(shape, device):
    logits, codes = draw_logits(shape, torch.float32, device, scale=2.0), draw_codes(shape, device)
    for k in (0, 1, shape[0] * shape[1] // 50 + 1):
        check(logits, codes, k, k_max=k + 3)


@pytest.mark.parametrize("ties", ["exact", "inclusive"])
def test_ties_go_by_position(ties, device, form):
    logits = torch.zeros(7, 700, device=device)
    logits[2, 300:320] = 1
    codes = torch.full((7, 700), -1, dtype=torch.int8, device=device)
    codes[0, ::2] = 1
    for k in (1, 20, 21, 1000, 4549, 4550, 4551):
        selected = check(logits, codes, k, ties)
        if ties == "exact":
            assert selected.sum() == min(k, 4550)


def test_signed_zeros_are_equal(device, form):
    logits = torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]], device=device)
    codes = torch.full((1, 5), -1, dtype=torch.int8, device=device)
    for k in range(6):
        check(logits, codes, k)


def test_infinities_and_extremes(device, form):
    tiny = torch.finfo(torch.float32).tiny
    values = [INF, -INF, 3e38, -3e38, tiny, -tiny, tiny / 1024, -tiny / 1024, 100, -100, 0, 1, INF, -INF]
    logits = torch.tensor([values], device=device)
    codes = torch.full((1, len(values)), -1, dtype=torch.int8, device=device)
    # Among the two infinities of either sign, between them, and beyond the end.
    for k in (0, 1, 2, 7, 13, 14, 15):
        for ties in ("exact", "inclusive"):
            check(logits, codes, k, ties)
    codes[0, :3] = 1
    for k in range(len(values) + 2):
        check(logits, codes, k)


def test_neighbouring_floats_are_told_apart(device, form):
    bits = torch.arange(4096, dtype=torch.int32) + torch.tensor(0.3).view(torch.int32)
    logits = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    logits = logits[torch.randperm(8192, generator=torch.Generator().manual_seed(0))].view(8, 1024).to(device)
    codes = torch.full((8, 1024), -1, dtype=torch.int8, device=device)
    for k in (1, 7, 4095, 4096, 4097, 8000):
        assert check(logits, codes, k).sum() == k


def test_observed_entries_are_never_selected(device, form):
    logits, codes = draw_logits((9, 80), torch.float32, device), draw_codes((9, 80), device)
    assert torch.equal(check(logits, codes, 720), codes == -1)
    assert not check(logits, codes.clamp(min=0), 50).any()


def test_empty_batch(device, form):
    for shape in ((0, 80), (4, 0)):
        check(torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int8, device=device), 3)


def test_k_on_the_device_may_be_smaller_than_its_bound(device, form):
    logits, codes = draw_logits((37, 81), torch.float32, device), draw_codes((37, 81), device)
    for k in (0, 5, 99, 150):
        check(logits, codes, k, k_max=100)


def on_device(ranks, device, work):
    """`work(rank, gather)` of every rank, in threads of their own."""
    # The interpreter keeps the grid in a global: there one rank computes at a time.
    return on_ranks(ranks, in_turns(work) if device == "cpu" else work)


def in_turns(work):
    """`work(rank, gather)` that only one thread runs at a time, but for waiting in `gather`."""
    turn = threading.Lock()

    def alone(rank, gather):
        def wait(tensor):
            turn.release()
            try:
                return gather(tensor)
            finally:
                turn.acquire()

        with turn:
            return work(rank, wait)

    return alone


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("ties", ["exact", "inclusive"])
def test_over_ranks(ranks, ties, device, way):
    logits, codes = draw_logits((11, 60), torch.bfloat16, device).float(), draw_codes((11, 60), device)
    logits[logits.abs() < 2] = 1.5
    parts = list(zip(logits.tensor_split(ranks), codes.tensor_split(ranks), strict=True))
    for k in (0, 1, 60, 150, 600) if (ranks, way) == (2, "histogram") else (150,):

        def work(rank, gather, k=k):
            return select_large(*parts[rank], torch.tensor(k, device=device), 600, ties, gather, rank)

        found = on_device(ranks, device, work)
        expected, level = reference(logits, codes, k, 600, ties)
        assert torch.equal(torch.cat([f[0] for f in found]).cpu(), expected)
        assert all(torch.equal(f[1].cpu(), level) for f in found)


def test_a_step_over_ranks_lists_what_each_of_them_selects(device, way):
    logits, codes = draw_logits((11, 60), torch.bfloat16, device).float(), draw_codes((11, 60), device)
    logits[logits.abs() < 2] = 1.5
    parts = list(zip(logits.tensor_split(3), codes.tensor_split(3), strict=True))
    k = torch.tensor(150, device=device)
    found = on_device(3, device, lambda r, gather: large_loss_step(*parts[r], k, 150, "reject", "exact", gather, r))
    expected, _ = reference(logits, codes, 150, 150, "exact")
    for step, selected in zip(found, expected.tensor_split(3), strict=True):
        check_list((step.rows, step.classes, step.valid), selected, 150)
    loss = large_loss_reference(logits.double().cpu(), codes.cpu(), expected, "reject")
    assert_close("loss", sum(step.loss for step in found), loss, 2e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scheme", ["reject", "correct"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 81), (128, 20)])
def test_loss(shape, scheme, dtype, device):
    logits, codes = draw_logits(shape, dtype, device), draw_codes(shape, device)
    selected = (codes == -1) & (logits > 1)
    total, (grad,) = value_and_gradients(lambda z: large_loss(z, codes, selected, scheme), [logits])
    exact, (slope,) = value_and_gradients(
        lambda z: large_loss_reference(z, codes.cpu(), selected.cpu(), scheme), [logits.double().cpu()]
    )
    assert total.dtype == torch.float32 and grad.dtype == dtype
    assert_close("loss", total, exact, 2e-6)
    assert_close("gradient", grad, slope, TOLERANCE[dtype])
    assert not grad[selected].any() or scheme == "correct"


@pytest.mark.parametrize(("scheme", "dtype"), [("reject", torch.float32), ("correct", torch.bfloat16)])
@pytest.mark.parametrize("ties", ["exact", "inclusive"])
@pytest.mark.parametrize(("k", "length"), [(0, 5), (33, 30), (33, 1500), (3000, None)])
def test_one_step_equals_its_three_parts(k, length, ties, scheme, dtype, device, form):
    """Lists shorter and longer than the selection; of a list's end nothing is left unwritten."""
    logits, codes = draw_logits((37, 81), torch.bfloat16, device).to(dtype), draw_codes((37, 81), device)
    expected, level = reference(logits, codes, k, k, ties)
    leaf = logits.clone().requires_grad_()
    step = large_loss_step(leaf, codes, torch.tensor(k, device=device), k, scheme, ties, length=length)
    (step.loss * 0.37).backward()
    exact, (slope,) = value_and_gradients(
        lambda z: large_loss_reference(z, codes.cpu(), expected, scheme), [logits.double().cpu()]
    )
    assert torch.equal(step.selected.cpu(), expected) and torch.equal(step.threshold.cpu(), level)
    assert step.loss.dtype == torch.float32 and step.loss.shape == () and leaf.grad.dtype == dtype
    assert_close("loss", step.loss, exact, 2e-6)
    assert_close("gradient", leaf.grad, slope, TOLERANCE[dtype])
    check_list((step.rows, step.classes, step.valid), expected, k if length is None else length)


def forms(logits, codes, k, ties, monkeypatch):
    """Step and gradient of the form that holds the batch in one program, with histograms, and with counts."""
    for limit, way in ((logits.numel(), "auto"), (logits.numel() - 1, "histogram"), (logits.numel() - 1, "counts")):
        monkeypatch.setattr("spml_kernels.common.heuristics.SINGLE_LAUNCH_ENTRIES", limit)
        monkeypatch.setenv("SPML_LARGE_LOSS", way)
        leaf = logits.clone().requires_grad_()
        step = large_loss_step(leaf, codes, torch.tensor(k, device=logits.device), k, "reject", ties, length=900)
        yield step, *torch.autograd.grad(step.loss, leaf)


@pytest.mark.parametrize("ties", ["exact", "inclusive"])
def test_all_forms_give_the_same_bits(ties, device, monkeypatch):
    logits, codes = draw_logits((61, 83), torch.float16, device), draw_codes((61, 83), device)
    (first, slope), *others = forms(logits, codes, 700, ties, monkeypatch)
    for step, other in others:
        assert torch.equal(slope, other)
        assert all(torch.equal(*pair) for pair in zip(first[1:], step[1:], strict=True))
        # Of the loss the order of the sum may differ.
        assert_close("loss", first.loss, step.loss, 1e-6)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 2000])
def test_all_forms_treat_nan_alike(k, device, monkeypatch):
    """A NaN with a positive sign is the largest of all, one with a negative sign the smallest; none is selected."""
    logits = draw_logits((9, 133), torch.float32, device)
    logits[0, :3], logits[4, 7] = torch.nan, INF
    logits[2, :5] = torch.tensor(-1, dtype=torch.int32, device=device).view(torch.float32)
    codes = torch.full((9, 133), -1, dtype=torch.int8, device=device)
    found = [(step.selected, step.threshold) for step, _ in forms(logits, codes, k, "exact", monkeypatch)]
    assert all(torch.equal(selected, found[0][0]) for selected, _ in found)
    assert all(torch.allclose(threshold, found[0][1], equal_nan=True) for _, threshold in found)
    assert not (found[0][0] & logits.isnan()).any() and found[0][1].isnan() == (k <= 3)


@pytest.mark.parametrize("value", [0.0, -3.25, 1e-30])
def test_more_blocks_than_a_thread_counts_at_a_time(value, device, way, monkeypatch):
    """One program, 17 turns of equal entries and one other: packed numbers hold the counts of 15."""
    monkeypatch.setattr(heuristics, "SINGLE_LAUNCH_ENTRIES", -1)
    monkeypatch.setattr(heuristics, "HISTOGRAM_BLOCK", 128)
    monkeypatch.setattr(heuristics, "HISTOGRAM_PROGRAMS", 1 if way == "histogram" else 0.25)
    logits = torch.full((17, 128), value, device=device)
    logits[9, 3] = 2
    codes = torch.full((17, 128), -1, dtype=torch.int8, device=device)
    launch = heuristics.histogram_launch(logits.numel(), way)
    assert launch.programs == 1 and launch.block == 128
    for k in (1, 2, 2175):
        assert check(logits, codes, k).sum() == k


def check_list(found, selected, k_max):
    rows, classes, valid = (t.cpu() for t in found)
    expected = list_selected_reference(selected, k_max)
    assert rows.dtype == classes.dtype == torch.int64 and valid.dtype == torch.bool
    assert all(torch.equal(*pair) for pair in zip((rows, classes, valid), expected, strict=True))


@pytest.mark.parametrize("k_max", [0, 1, 50, 5000])
def test_list_of_selected(k_max, device):
    selected = torch.rand(37, 81, generator=torch.Generator().manual_seed(0)) < 0.1
    check_list(list_selected(selected.to(device), k_max), selected, k_max)
    none = torch.zeros(0, 81, dtype=torch.bool)
    check_list(list_selected(none.to(device), k_max), none, k_max)


def test_two_runs_are_bit_equal(device, form):
    logits, codes = draw_logits((37, 81), torch.float32, device), draw_codes((37, 81), device)
    k = torch.tensor(77, device=device)
    one, two = (large_loss_step(logits, codes, k, 77, "reject") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_layouts(device):
    logits, codes = draw_logits((60, 37), torch.float32, device).T, draw_codes((60, 37), device).T
    check(logits, codes, 100)
    total = large_loss(logits, codes, codes == -1, "reject")
    assert total == large_loss(logits.contiguous(), codes.contiguous(), codes == -1, "reject")


def test_ops_are_sound(device, way):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    k = torch.tensor(5, device=device)
    select = heuristics.LARGE_LOSS_SELECTS[way]
    hist, state = large_histogram_op(logits, codes, k, k, k, 5, 0, way)
    assert hist.shape == (select.bins,) and hist.sum() == (codes == -1).sum()
    assert_op_sound(torch.ops.spml.large_histogram.default, (logits, codes, k, hist, state, 5, 1, way))
    for level in range(1, len(select.widths)):
        hist, state = large_histogram_op(logits, codes, k, hist, state, 5, level, way)
    for flags in ((False, True), (True, False)):
        assert_op_sound(torch.ops.spml.large_threshold.default, (logits, codes, hist, state, *flags, way))
    found = large_threshold_op(logits, codes, hist, state, False, True, way)
    leaf = logits.clone().requires_grad_()
    assert_op_sound(torch.ops.spml.large_select.default, (leaf, codes, *found, False, True, True, True, 5))
    assert_op_sound(torch.ops.spml.large_select.default, (logits, codes, *found, True, False, False, False, 0))


def test_the_op_of_one_rank_is_sound(device, form):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    k, leaf = torch.tensor(5, device=device), logits.clone().requires_grad_()
    assert_op_sound(torch.ops.spml.large_step.default, (leaf, codes, k, 5, False, True, True, True, 7))
    assert_op_sound(torch.ops.spml.large_step.default, (logits, codes, k, 5, True, False, False, False, 0))
    empty = large_step_op(logits, codes, k, 5, True, False, False, False, 0)
    assert [t.numel() for t in empty] == [0, logits.numel(), 0, 0, 0, 0, 1]


def test_compiles_into_one_graph(device):
    codes, k = draw_codes((9, 33), device), torch.tensor(12, device=device)

    def step(z):
        selected, threshold = select_large(z, codes, k, 12)
        return large_loss(z, codes, selected, "correct") * 2 + threshold

    def fused(z):
        return large_loss_step(z, codes, k, 12, "correct").loss * 2

    logits = draw_logits((9, 33), torch.float32, device)
    for function in (step, fused):
        plain, (slope,) = value_and_gradients(function, [logits])
        value, (grad,) = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), [logits])
        assert torch.equal(value, plain) and torch.equal(grad, slope)
