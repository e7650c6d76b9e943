"""Selection of large losses, also over ranks, and the losses made from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spml_kernels import large_loss, list_selected, select_large
from spml_kernels.large_loss.reference import select_large_reference, unpack_entries

from tests.support.kernels import on_ranks

LOGITS = [[2, -1, 0.5, -3], [1.5, 0, -2, 3]]
CODES = [[1, -1, -1, -1], [-1, 1, -1, -1]]
AN_GRADIENT = [
    [-0.0149003653, 0.0336176777, 0.0778074164, 0.0059282341],
    [0.1021968095, -0.0625, 0.0149003653, 0.1190717659],
]


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def golden():
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True), torch.tensor(CODES, dtype=torch.int8)


def select(logits, codes, k, ties="exact", k_max=None):
    return select_large(logits, codes, torch.tensor(k), k if k_max is None else k_max, ties)


def naive(logits, codes, k, ties):
    """By sorting (value, position) of the candidates with numpy."""
    values = np.where(codes == -1, logits, -np.inf).ravel()
    order = np.lexsort((np.arange(values.size), -values))
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order[: min(k, int((codes == -1).sum()))]] = True
    if ties == "inclusive" and chosen.any():
        chosen |= (codes == -1).ravel() & (values >= values[chosen].min())
    return chosen.reshape(codes.shape)


def select_over(ranks, logits, codes, k, k_max, ties):
    """The selection of a batch cut into consecutive, possibly uneven slices, and every rank's threshold."""
    parts = list(zip(logits.tensor_split(ranks), codes.tensor_split(ranks), strict=True))
    found = on_ranks(ranks, lambda rank, gather: select_large(*parts[rank], torch.tensor(k), k_max, ties, gather, rank))
    return torch.cat([f[0] for f in found]), [f[1] for f in found]


@pytest.mark.parametrize(
    ("k", "scheme", "loss", "changed"),
    [
        (0, "reject", 0.879116231934, {}),
        (2, "reject", 0.285366153240, {(1, 0): 0.0, (1, 3): 0.0}),
        (2, "correct", 0.316616231934, {(1, 0): -0.0228031905, (1, 3): -0.0059282341}),
    ],
)
def test_worked_example(k, scheme, loss, changed):
    logits, codes = golden()
    selected, _ = select(logits, codes, k, k_max=2)
    assert {tuple(e) for e in selected.nonzero().tolist()} == set(changed)
    total = large_loss(logits, codes, selected, scheme) / 8
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(loss, abs=1e-12)
    total.backward()
    expected = torch.tensor(AN_GRADIENT, dtype=torch.float64)
    for place, value in changed.items():
        expected[place] = value
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=6e-11)
    single, codes = golden()[0].detach().float(), golden()[1]
    fp32 = large_loss(single, codes, select(single, codes, k, k_max=2)[0], scheme)
    assert fp32.dtype == torch.float32 and fp32.item() / 8 == pytest.approx(loss, abs=1e-7)


def test_threshold_is_the_kth_largest_unobserved_logit():
    logits, codes = golden()
    assert [select(logits, codes, k, k_max=9)[1].item() for k in (0, 1, 2, 3)] == [torch.inf, 3, 1.5, 0.5]
    assert select(logits, codes, 7)[1].item() == -torch.inf


def test_gradcheck_and_half_precision():
    logits, codes = golden()
    selected, _ = select(logits, codes, 2)
    for scheme in ("reject", "correct"):
        assert torch.autograd.gradcheck(lambda z, s=scheme: large_loss(z, codes, selected, s), (logits,))
    half = logits.detach().to(torch.bfloat16).requires_grad_()
    total = large_loss(half, codes, select(half, codes, 2)[0], "reject")
    total.backward()
    assert total.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert total.item() == pytest.approx(8 * 0.285366153240, abs=1e-5)


def test_nothing_cancels_in_a_confident_loss():
    """A positive at 15 has the loss 3e-7; softplus(z) - z in fp32 would give 0 or 1e-6."""
    logits = torch.tensor([[15.0, -15.0]], requires_grad=True)
    codes = torch.tensor([[1, -1]], dtype=torch.int8)
    total = large_loss(logits, codes, torch.zeros(1, 2, dtype=torch.bool), "reject")
    assert total.item() == pytest.approx(2 * np.log1p(np.exp(-15)), rel=1e-5)
    total.backward()
    assert logits.grad[0].tolist() == pytest.approx([-1 / (1 + np.exp(15)), 1 / (1 + np.exp(15))], rel=1e-5)


@pytest.mark.parametrize("scheme", ["reject", "correct"])
def test_extreme_logits_stay_finite(scheme):
    logits = torch.tensor([[100.0, -100, 100, -100, 100, -100]], requires_grad=True)
    codes = torch.tensor([[1, 1, 0, 0, -1, -1]], dtype=torch.int8)
    for k in (0, 1, 2):
        total = large_loss(logits, codes, select(logits.detach(), codes, k, k_max=2)[0], scheme)
        (gradient,) = torch.autograd.grad(total, logits)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()


batches = st.tuples(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 40), st.integers(0, 10_000), st.sampled_from([2, 5, 1000])
)


def draw_batch(rows, width, seed, levels):
    """Few levels of logits make many ties."""
    generator = np.random.default_rng(seed)
    logits = generator.integers(-levels, levels + 1, (rows, width)) / 4
    return torch.from_numpy(logits), torch.from_numpy(generator.integers(-1, 2, (rows, width)).astype(np.int8))


@settings(max_examples=150, deadline=None)
@given(batch=batches, ties=st.sampled_from(["exact", "inclusive"]), slack=st.integers(0, 5))
def test_equals_a_plain_sort(batch, ties, slack):
    rows, width, k, seed, levels = batch
    logits, codes = draw_batch(rows, width, seed, levels)
    selected, threshold = select(logits, codes, k, ties, k_max=k + slack)
    np.testing.assert_array_equal(selected.numpy(), naive(logits.numpy(), codes.numpy(), k, ties))
    assert not (selected & (codes != -1)).any()
    if 0 < k <= int((codes == -1).sum()):
        assert threshold.item() == logits[selected].min().item()


@settings(max_examples=60, deadline=None)
@given(batch=batches, ties=st.sampled_from(["exact", "inclusive"]), ranks=st.sampled_from([2, 3, 4]))
def test_equal_logits_give_equal_selections_however_they_are_spread(batch, ties, ranks):
    rows, width, k, seed, levels = batch
    logits, codes = draw_batch(rows + ranks, width, seed, levels)
    whole, threshold = select(logits, codes, k, ties, k_max=k + 2)
    spread, thresholds = select_over(ranks, logits, codes, k, k + 2, ties)
    assert torch.equal(spread, whole)
    assert all(torch.equal(t, threshold) for t in thresholds)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sixteen_images_on_one_two_and_four_ranks(ranks):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(16, 80, generator=generator)
    codes = torch.full((16, 80), -1, dtype=torch.int8)
    codes[torch.arange(16), torch.randint(0, 80, (16,), generator=generator)] = 1
    logits[2, 5] = logits[7, 6] = logits[13, 7] = logits[15, 8] = 2.0
    k = int((logits[codes == -1] > 2.0).sum()) + 2
    for ties, number in (("exact", k), ("inclusive", k + 2)):
        whole, threshold = select(logits, codes, k, ties)
        assert threshold.item() == 2 and whole.sum() == number
        spread, thresholds = select_over(ranks, logits, codes, k, k, ties)
        assert torch.equal(spread, whole) and [t.item() for t in thresholds] == [2] * ranks
        for scheme in ("reject", "correct"):
            parts = zip(*(t.tensor_split(ranks) for t in (logits.double(), codes, spread)), strict=True)
            total = sum(large_loss(*part, scheme) for part in parts)
            torch.testing.assert_close(total, large_loss(logits.double(), codes, whole, scheme), rtol=1e-14, atol=0)


def test_more_wanted_than_any_rank_or_all_of_them_have():
    logits = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    codes = torch.tensor([[1, -1], [0, -1], [-1, 1]], dtype=torch.int8)
    for k in (3, 4, 6, 50):
        for ties in ("exact", "inclusive"):
            assert torch.equal(select(logits, codes, k, ties)[0], codes == -1)
            assert torch.equal(select_over(3, logits, codes, k, k, ties)[0], codes == -1)


def test_ties_exact_and_inclusive():
    logits = torch.tensor([[1.0, 2, 2], [2, 3, 2]])
    codes = torch.tensor([[-1, 1, -1], [-1, -1, -1]], dtype=torch.int8)
    exact, threshold = select(logits, codes, 2)
    inclusive, same = select(logits, codes, 2, "inclusive")
    assert threshold.item() == same.item() == 2
    # The observed 2 is passed over; of the others the first by position is taken.
    assert exact.tolist() == [[False, False, True], [False, True, False]]
    assert inclusive.tolist() == [[False, False, True], [True, True, True]]


def test_zero_selects_nothing_even_of_infinite_logits():
    logits = torch.tensor([[torch.inf, 100.0, -torch.inf]])
    codes = torch.full((1, 3), -1, dtype=torch.int8)
    assert not select(logits, codes, 0, k_max=3)[0].any()
    assert not select(logits, codes, 0, k_max=0)[0].any()


def test_largest_losses_are_largest_unobserved_logits():
    logits, codes = draw_batch(6, 9, 4, 1000)
    losses = torch.nn.functional.softplus(logits) * (codes == -1)
    selected, _ = select(logits, codes, 7)
    assert set(losses.flatten().topk(7).indices.tolist()) == set(selected.flatten().nonzero().flatten().tolist())


def test_selection_as_a_list():
    selected = torch.tensor([[False, True, False], [True, False, True]])
    for bound in (3, 4, 6, 50):
        rows, classes, valid = list_selected(selected, bound)
        assert len(rows) == len(classes) == len(valid) == min(bound, 6)
        assert valid.sum() == 3
        assert list(zip(rows[valid].tolist(), classes[valid].tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2)]
    rows, classes, valid = list_selected(selected, 2)
    assert list(zip(rows.tolist(), classes.tolist(), strict=True)) == [(0, 1), (1, 0)] and valid.all()
    assert [len(t) for t in list_selected(selected, 0)] == [0, 0, 0]
    assert not list_selected(torch.zeros(2, 3, dtype=torch.bool), 4)[2].any()


def test_places_of_nothing_and_a_threshold_without_a_gradient():
    rows, classes, valid = unpack_entries(torch.tensor([-1, 7, -1]), 3)
    assert (rows.tolist(), classes.tolist(), valid.tolist()) == ([0, 2, 0], [0, 1, 0], [False, True, False])
    assert [t.tolist() for t in unpack_entries(torch.tensor([-1]), 0)] == [[0], [0], [False]]
    logits = torch.tensor([[1.0, 2.0]], requires_grad=True)
    codes, k = torch.full((1, 2), -1, dtype=torch.int8), torch.tensor(1)
    selected, threshold = select_large_reference(logits, codes, k, 1, "exact", lambda t: t[None], 0)
    assert selected.tolist() == [[False, True]] and threshold == 2 and not threshold.requires_grad
