"""LL-R, LL-Ct, LL-Cp: loss and gradient by a plain sort, ties, groups, corrections."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.multiprocessing

from spml_fast.core.batch import Batch
from spml_fast.core.distributed import near_equal_part
from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.methods.large_loss import selection_size
from tests.support.large_loss import LARGE_LOSS, cross_entropy, double_batch, make, run
from tests.support.methods import at, on_ranks


def expected_large_loss(name, logits, codes, k):
    """Loss and gradient with exactly k selected, by a plain sort."""
    z, code = logits.detach().numpy(), codes.numpy()
    order = [i for i in np.argsort(-z.ravel(), kind="stable") if code.ravel()[i] == -1][:k]
    chosen = np.zeros(z.size, bool)
    chosen[order] = True
    chosen = chosen.reshape(z.shape)
    loss, slope = cross_entropy(logits, code == 1)
    other = (0, 0) if name == "ll_r" else cross_entropy(logits, np.ones_like(chosen))
    return np.where(chosen, other[0], loss).mean(), np.where(chosen, other[1], slope) / z.size, chosen


@pytest.mark.parametrize("name", LARGE_LOSS)
@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_large_loss_formula(name, epoch):
    logits, codes = double_batch()
    steps = min(epoch - 1, 1) if name == "ll_cp" else epoch - 1
    k = math.ceil(54 * steps * Fraction(7, 100))
    out, gradient = run(make(name, delta_rel=7.0, k_rule="rational"), logits, codes, at(epoch, 0))
    loss, slope, chosen = expected_large_loss(name, logits, codes, k)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-11, atol=1e-16)
    assert out.metrics["selected_count"].item() == chosen.sum() == k


@pytest.mark.parametrize("name", LARGE_LOSS)
def test_large_loss_is_assumed_negative_in_its_first_epoch_and_without_a_rate(name):
    logits, codes = double_batch()
    expected, slope = run(make("an"), logits, codes, at(1, 0))
    for method, epoch in ((make(name), 1), (make(name, delta_rel=0.0), 7)):
        out, gradient = run(method, logits, codes, at(epoch, 0))
        assert torch.equal(out.loss, expected.loss) and torch.equal(gradient, slope)


@pytest.mark.parametrize("name", LARGE_LOSS)
def test_observed_entries_are_left_alone_however_many_are_wanted(name):
    logits, codes = double_batch(unknown=0.1)
    for ties in ("exact", "inclusive", "strict_flips"):
        method = make(name, delta_rel=90.0, ties=ties)
        out, gradient = run(method, logits, codes, at(2, 0))
        known = codes != -1
        _, slope = cross_entropy(logits, codes.numpy() == 1)
        np.testing.assert_allclose(gradient[known].numpy(), slope[known.numpy()] / 54, rtol=1e-11)
        assert out.metrics["selected_count"].item() == (~known).sum()


def tied_batch():
    logits = torch.tensor([[2.0, 2, 2, 3], [1, 2, 0, -1]], dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([[1, -1, -1, -1], [-1, -1, -1, -1]], dtype=torch.int8)


@pytest.mark.parametrize(
    ("ties", "corrected", "flipped"),
    [
        ("exact", {(0, 1), (0, 2), (0, 3)}, {(0, 1), (0, 2), (0, 3)}),
        ("inclusive", {(0, 1), (0, 2), (0, 3), (1, 1)}, {(0, 1), (0, 2), (0, 3), (1, 1)}),
        ("strict_flips", {(0, 1), (0, 2), (0, 3), (1, 1)}, {(0, 3)}),
    ],
)
def test_ties(ties, corrected, flipped):
    """k = 3, four entries tie at or above the threshold of 2."""
    logits, codes = tied_batch()
    method = make("ll_cp", SparseLabels.from_dense(codes.numpy()), delta_rel=37.5, ties=ties)
    out, gradient = run(method, logits, codes, at(2, 0))
    assert {tuple(e) for e in (gradient < 0).nonzero().tolist()} == corrected | {(0, 0)}
    assert out.metrics["selected_count"].item() == len(corrected)
    method.on_epoch_end(at(2, 0))
    changed = (method.store.rows(torch.arange(2)) != codes).nonzero().tolist()
    assert {tuple(e) for e in changed} == flipped


def test_what_is_corrected_and_what_flips_differ_in_an_update_too():
    logits, codes = tied_batch()
    method = make("ll_cp", SparseLabels.from_dense(codes.numpy()), delta_rel=37.5, ties="strict_flips")
    batches = [Batch({}, codes[:1], torch.tensor([0]), 1), Batch({}, codes[1:], torch.tensor([1]), 1)]
    ahead = method.update_statistics([logits[:1].detach(), logits[1:].detach()], batches, at(2, 0))
    assert [s.selected.tolist() for s in ahead] == [[[False, True, True, True]], [[False, True, False, False]]]
    assert [s.flips.tolist() for s in ahead] == [[[False, False, False, True]], [[False] * 4]]


def test_share_of_the_unobserved_entries():
    logits, codes = double_batch()
    unknown = int((codes == -1).sum())
    for rule in ("accumulator", "rational"):
        out, _ = run(make("ll_r", delta_rel=5.0, base="unobserved", k_rule=rule), logits, codes, at(4, 0))
        expected = {
            "rational": math.ceil(unknown * Fraction(15, 100)),
            "accumulator": math.ceil(unknown * (1 - (1 - 0.05 - 0.05 - 0.05))),
        }
        assert out.metrics["selected_count"].item() == expected[rule]
    # 20 unknown entries at 5 per cent and three steps: 3 exactly, but the accumulator's 0.15 is a little more.
    logits, codes = double_batch(rows=4, width=5, unknown=1.0)
    for rule, k in (("rational", 3), ("accumulator", 4)):
        method = make("ll_r", delta_rel=5.0, base="unobserved", k_rule=rule)
        assert run(method, logits, codes, at(4, 0))[0].metrics["selected_count"].item() == k


def test_permanent_corrections_take_the_same_share_in_every_epoch():
    logits, codes = double_batch(rows=40, width=25, unknown=0.5)
    labels, unknown = SparseLabels.from_dense(codes.numpy()), int((codes == -1).sum())
    once, thrice = math.ceil(unknown * Fraction(7, 100)), math.ceil(unknown * Fraction(21, 100))
    for epoch, temporary, permanent in ((1, 0, 0), (2, once, once), (4, thrice, once)):
        for rule in ("rational", "accumulator"):
            options = {"delta_rel": 7.0, "base": "unobserved", "k_rule": rule}
            for name, k in (("ll_ct", temporary), ("ll_cp", permanent)):
                out, _ = run(make(name, labels, **options), logits, codes, at(epoch, 0))
                # The released accumulator of fractions may be a rounding error above the exact number.
                assert out.metrics["selected_count"].item() in ((k,) if rule == "rational" else (k, k + 1))


def test_groups_of_the_paper_are_each_ranks_own():
    logits, codes = double_batch(rows=16, seed=5)
    labels = SparseLabels.from_dense(codes.numpy())

    def work(rank):
        part = slice(8 * rank, 8 * rank + 8)
        options = {"delta_rel": 9.0, "base": "unobserved", "batch_semantics": "paper", "paper_batch": 4}
        z = logits[part].detach().requires_grad_()
        return run(make("ll_r", labels, **options), z, codes[part], at(3, 0), global_size=16)[1]

    alone = []
    for start in range(0, 16, 4):
        z = logits[start : start + 4].detach().requires_grad_()
        options = {"delta_rel": 9.0, "base": "unobserved"}
        alone.append(run(make("ll_r", labels, **options), z, codes[start : start + 4], at(3, 0))[1] / 4)
    torch.testing.assert_close(torch.cat(on_ranks(2, work)) / 2, torch.cat(alone), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(("steps", "group"), [([24], 16), ([14, 10], 16), ([16, 8], 8)])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", LARGE_LOSS)
def test_groups_of_the_paper_are_of_the_global_batch(name, ranks, steps, group):
    """Groups that lie on several ranks, and on several micro-steps of an exact accumulation."""
    logits, codes = double_batch(rows=24, seed=6)
    store, index = SparseLabels.from_dense(np.full((40, 9), -1, np.int8)), torch.arange(24) + 7
    options = {"delta_rel": 5.0, "batch_semantics": "paper", "paper_batch": group}
    whole = make(name, store, **options)
    expected, slope = run(whole, logits, codes, at(3, 0), index)
    whole.on_epoch_end(at(3, 0))

    def work(rank):
        method, slopes, rows, batches = make(name, store, **options), [], [], []
        start = 0
        for size in steps:
            first, last = near_equal_part(size, ranks, rank)
            rows.append(torch.arange(start + first, start + last))
            batches.append(Batch({}, codes[rows[-1]], index[rows[-1]], size))
            start += size
        ahead = [None]
        if len(steps) > 1:
            ahead = method.update_statistics([logits[r].detach() for r in rows], batches, at(3, 0))
        total, count = 0.0, 0
        for own, batch, statistics in zip(rows, batches, ahead, strict=True):
            z = logits[own].detach().requires_grad_()
            out, gradient = run(method, z, batch.labels, at(3, 0), batch.index, statistics, batch.global_size)
            part = batch.global_size / 24
            total += out.loss.item() * part
            slopes.append(gradient * part)
            count += int(out.metrics["selected_count"])
        method.on_epoch_end(at(3, 0))
        corrected = [method.store.rows(torch.arange(40)), method.store.num_corrections]
        return total, torch.cat(rows), torch.cat(slopes), count, corrected

    losses, rows, slopes, counts, corrected = zip(*on_ranks(ranks, work), strict=True)
    assert np.mean(losses) == pytest.approx(expected.loss.item(), rel=1e-12)
    order = torch.argsort(torch.cat(rows))
    torch.testing.assert_close(torch.cat(slopes)[order] / ranks, slope, rtol=1e-12, atol=1e-18)
    assert sum(counts) == expected.metrics["selected_count"].item() > 0
    for table, number in corrected:
        assert torch.equal(table, whole.store.rows(torch.arange(40))) and number == whole.store.num_corrections
    assert (whole.store.num_corrections > 0) is (name == "ll_cp")


@pytest.mark.parametrize("semantics", ["global", "paper"])
@pytest.mark.parametrize("name", LARGE_LOSS)
def test_a_rank_without_images_has_a_loss_of_nothing(name, semantics):
    logits, codes = torch.zeros(0, 9, dtype=torch.float64, requires_grad=True), torch.zeros(0, 9, dtype=torch.int8)
    method = make(name, delta_rel=20.0, batch_semantics=semantics)
    out, gradient = run(method, logits, codes, at(3, 0), global_size=4)
    assert out.loss == 0 and gradient.shape == (0, 9) and out.metrics["selected_count"] == 0


def test_more_epochs_than_the_ramp_has_room_for():
    logits, codes = double_batch()
    for base in ("all", "unobserved"):
        for rule in ("accumulator", "rational"):
            method = make("ll_r", delta_rel=30.0, base=base, k_rule=rule)
            assert run(method, logits, codes, at(9, 0))[0].metrics["selected_count"].item() == (codes == -1).sum()


@pytest.mark.parametrize("rows", [40, 16, 37, 5])
def test_paper_semantics_is_each_group_of_sixteen_by_itself(rows):
    logits, codes = double_batch(rows=rows, seed=3)
    method = make("ll_ct", delta_rel=3.0, batch_semantics="paper")
    out, gradient = run(method, logits, codes, at(3, 0))
    total, slopes, count = torch.zeros((), dtype=torch.float64), [], 0
    for start in range(0, rows, 16):
        z = logits[start : start + 16].detach().requires_grad_()
        part, slope = run(make("ll_ct", delta_rel=3.0), z, codes[start : start + 16], at(3, 0))
        total += part.loss.detach() * len(z) / rows
        slopes.append(slope * len(z) / rows)
        count += part.metrics["selected_count"].item()
    torch.testing.assert_close(out.loss.detach(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.cat(slopes), rtol=1e-12, atol=1e-18)
    assert out.metrics["selected_count"].item() == count


@pytest.mark.parametrize("semantics", ["global", "paper"])
def test_plan_selects_what_one_large_batch_would(semantics):
    logits, codes = double_batch(rows=36)
    options = {"delta_rel": 3.0, "batch_semantics": semantics}
    store = SparseLabels.from_dense(codes.numpy())
    whole, cut = (make("ll_cp", store, **options) for _ in range(2))
    expected, gradient = run(whole, logits, codes, at(2, 0))
    pieces = [slice(0, 20), slice(20, 36)]
    batches = [Batch({}, codes[p], torch.arange(36)[p], len(codes[p])) for p in pieces]
    ahead = cut.update_statistics([logits[p].detach() for p in pieces], batches, at(2, 0))
    total, slopes, selected = 0.0, [], 0
    for piece, batch, statistics in zip(pieces, batches, ahead, strict=True):
        z = logits[piece].detach().requires_grad_()
        out, slope = run(cut, z, batch.labels, at(2, 0), batch.index, statistics)
        total += out.loss.item() * len(z) / 36
        slopes.append(slope * len(z) / 36)
        selected += out.metrics["selected_count"].item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-13)
    torch.testing.assert_close(torch.cat(slopes), gradient, rtol=1e-12, atol=1e-18)
    assert selected == expected.metrics["selected_count"].item() > 0
    for method in (whole, cut):
        method.on_epoch_end(at(2, 0))
    everything = torch.arange(36)
    assert torch.equal(whole.store.rows(everything), cut.store.rows(everything))
    assert whole.store.num_corrections == selected


@pytest.mark.parametrize("name", ["ll_r", "ll_ct", "ll_cp"])
def test_statistics_of_an_update_that_selects_nothing(name):
    logits, codes = double_batch(rows=7)
    store = SparseLabels.from_dense(codes.numpy())
    batches = [Batch({}, codes[:4], torch.arange(4), 4), Batch({}, codes[4:], torch.arange(4, 7), 3)]
    forwards = [logits[:4].detach(), logits[4:].detach()]
    inclusive = make(name, store, ties="inclusive")
    for method, progress in (
        (make(name, store, delta_rel=0.0), at(3, 0)),
        (make(name, store), at(1, 0)),
        (inclusive, at(1, 0)),
    ):
        ahead = method.update_statistics(forwards, batches, progress)
        for batch, selection in zip(batches, ahead, strict=True):
            assert selection.selected.shape == selection.flips.shape == batch.labels.shape
            assert not selection.selected.any() and not selection.flips.any() and selection.length == 0
        method.on_epoch_end(progress)
        assert method.store.num_corrections == 0


def test_permanent_corrections_reach_the_right_labels_in_the_next_epoch():
    logits, codes = double_batch(rows=6, seed=5)
    dense = np.full((40, 9), -1, np.int8)
    index = torch.tensor([31, 2, 17, 5, 39, 0])
    dense[index.numpy()] = codes.numpy()
    method = make("ll_cp", SparseLabels.from_dense(dense), delta_rel=8.0)
    k = selection_size(54, 8.0, 2, False, "accumulator")
    _, _, chosen = expected_large_loss("ll_cp", logits, codes, k)
    run(method, logits, codes, at(2, 0), index)
    assert torch.equal(method.store.rows(index), codes), "nothing changes within the epoch"
    assert method.on_epoch_end(at(2, 1)) == {"corrected": k, "corrected_total": k}
    expected = dense.copy()
    expected[index.numpy()] = np.where(chosen, 1, codes.numpy())
    np.testing.assert_array_equal(method.store.rows(torch.arange(40)).numpy(), expected)
    assert torch.equal(method.store.rows(index, corrected=False), codes), "observed codes are never written"
    # They count as observed positives from now on, and are not chosen again.
    out, gradient = run(method, logits, method.store.rows(index), at(3, 0), index)
    assert (gradient[torch.from_numpy(chosen)] < 0).all()
    assert out.metrics["selected_count"].item() == min(k, int((codes == -1).sum()) - k)
    assert method.on_epoch_end(at(3, 1))["corrected_total"] == 2 * k


def test_temporary_corrections_leave_the_labels_alone():
    logits, codes = double_batch()
    for name in ("ll_r", "ll_ct"):
        for semantics in ("global", "paper"):
            options = {"delta_rel": 8.0, "batch_semantics": semantics, "paper_batch": 4}
            method = make(name, SparseLabels.from_dense(codes.numpy()), **options)
            run(method, logits, codes, at(2, 0))
            index = torch.arange(len(codes))
            (ahead,) = method.update_statistics([logits.detach()], [Batch({}, codes, index, len(codes))], at(2, 0))
            out, _ = run(method, logits, codes, at(2, 0), statistics=ahead)
            assert out.metrics["selected_count"] > 0
            assert method.on_epoch_end(at(2, 1)) == {}
            assert method.store.commit() == 0


@pytest.mark.parametrize("semantics", ["global", "paper"])
@pytest.mark.parametrize("name", LARGE_LOSS)
def test_one_entry_and_ranks_without_images(name, semantics):
    """A selection of a single entry, found by every rank, also by one that has no image of the batch."""
    logits, codes = double_batch(rows=2, seed=4)
    options = {"delta_rel": 4.0, "batch_semantics": semantics}
    expected, slope = run(make(name, **options), logits, codes, at(2, 0))
    assert expected.metrics["selected_count"] == 1

    def work(rank):
        own = slice(rank, rank + 1) if rank < 2 else slice(0, 0)
        z = logits[own].detach().requires_grad_()
        out, gradient = run(make(name, **options), z, codes[own], at(2, 0), torch.arange(2)[own], global_size=2)
        return out.loss.item(), gradient

    losses, slopes = zip(*on_ranks(3, work), strict=True)
    assert np.mean(losses) == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(slopes) / 3, slope, rtol=1e-12, atol=1e-18)


def test_selection_is_judged_against_the_truth():
    logits, codes = tied_batch()
    truth = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.int8)
    out = make("ll_r", delta_rel=25.0).loss(logits, Batch({}, codes, torch.arange(2), 2, truth), at(2, 0))
    counts = {k: v.item() for k, v in out.metrics.items()}
    assert counts == {"selected_count": 2, "selected_true_count": 2, "hidden_positive_count": 3}


def test_bad_options_are_named():
    with pytest.raises(UserError, match="delta_rel is 100"):
        make("ll_r", delta_rel=100.0)
    with pytest.raises(UserError, match="paper_batch is 0"):
        make("ll_r", paper_batch=0)


@pytest.mark.parametrize("rule", ["accumulator", "rational"])
@pytest.mark.parametrize("name", LARGE_LOSS)
def test_an_update_takes_its_fraction_of_the_unobserved_entries(name, rule):
    """What one micro-step selects, and a list with room for it where labels flip for good."""
    logits, codes = double_batch(rows=8)
    options = {"delta_rel": 5.0, "base": "unobserved", "k_rule": rule}
    store = SparseLabels.from_dense(codes.numpy())
    expected, gradient = run(make(name, store, **options), logits, codes, at(3, 0))
    method = make(name, store, **options)
    (ahead,) = method.update_statistics([logits.detach()], [Batch({}, codes, torch.arange(8), 8)], at(3, 0))
    out, slope = run(method, logits, codes, at(3, 0), statistics=ahead)
    count = expected.metrics["selected_count"].item()
    assert torch.equal(slope, gradient) and out.metrics["selected_count"].item() == count > 0
    # Two micro-steps, of which each may hold all that is selected.
    batches = [Batch({}, codes[:5], torch.arange(5), 5), Batch({}, codes[5:], torch.arange(5, 8), 3)]
    parts = method.update_statistics([logits[:5].detach(), logits[5:].detach()], batches, at(3, 0))
    assert sum(int(part.selected.sum()) for part in parts) == count
    for part in parts:
        assert part.length == 0 if name != "ll_cp" else count <= part.length <= part.selected.numel()


@pytest.mark.parametrize("name", ["ll_ct", "ll_cp"])
def test_what_is_corrected_and_what_flips_differ_over_ranks_too(name):
    """Four images share a threshold on two ranks: 5 and the tied 4s are taken, 5 alone flips, and only for good."""
    logits = torch.tensor([[4.0, 0, 0, 4], [0, 4, 0, 0], [0, 5, 0, 0], [4, 0, 0, 0]], dtype=torch.float64)
    codes = torch.full((4, 4), -1, dtype=torch.int8)
    options = {"delta_rel": 25.0, "batch_semantics": "paper", "paper_batch": 4, "ties": "strict_flips"}

    def work(rank):
        rows = slice(2 * rank, 2 * rank + 2)
        batch = Batch({}, codes[rows], torch.arange(4)[rows], 4)
        return make(name, **options).update_statistics([logits[rows]], [batch], at(2, 0))[0]

    for rank, found in enumerate(on_ranks(2, work)):
        own = logits[2 * rank : 2 * rank + 2]
        assert torch.equal(found.selected, own >= 4) and torch.equal(found.flips, own > 4)
        assert found.length == (4 if name == "ll_cp" else 0)
