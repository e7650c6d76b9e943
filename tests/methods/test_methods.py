"""Methods: what all of them promise, and the assumed-negative, partial and large-loss formulas written out again."""

from __future__ import annotations

import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import get_method, method_names
from spml_fast.methods.large_loss import clean_rate, selection_size
from tests.support.methods import BLANK, CLASSES, IMAGES, Cases, Rig, ThreadRanks, at, rank_case, rank_main, share

LARGE_LOSS = ("ll_r", "ll_ct", "ll_cp")
# Sums over the micro-batch: as published, so an update of several micro-steps is their mean, not their sum.
# Their tables take a step of their own in each micro-step.
OWN_STEPS = ("role",)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


@pytest.fixture(scope="module")
def rigs():
    """method -> a rig that has been through four epochs; copy before use."""
    made: dict[str, Rig] = {}

    def get(name: str) -> Rig:
        if name not in made:
            made[name] = Rig(name)
            for epoch in range(1, 5):
                made[name].epoch(epoch)
        return made[name].copy()

    return get


every_method = pytest.mark.parametrize("name", method_names())


# ---- every method


def test_the_methods_are_registered():
    assert {"an", "full", "partial", *LARGE_LOSS} <= set(method_names())
    with pytest.raises(UserError, match="no method 'anx'; choose one of an, "):
        get_method("anx")


@every_method
def test_loss_is_a_finite_scalar_with_finite_gradients(rigs, name):
    rig = rigs(name)
    batch = rig.batch(range(16))
    before = batch.labels.clone()
    views = {k: v.clone() for k, v in batch.views.items()}
    out = rig.method(rig.classifier, batch, at(5, 0))
    assert out.loss.shape == () and out.loss.dtype == torch.float32 and out.loss.requires_grad
    for metric in out.metrics.values():
        assert metric.shape == () and not metric.requires_grad
    out.loss.backward()
    for parameter in rig.classifier.head.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    gradients = rig.gradients()
    assert torch.isfinite(gradients).all() and gradients.abs().max() > 0
    # Neither labels nor images are written to, and nothing asks them for a gradient.
    assert torch.equal(batch.labels, before) and not batch.labels.requires_grad
    assert all(torch.equal(v, views[k]) and v.grad is None for k, v in batch.views.items())


@every_method
def test_upstream_factor_scales_the_gradient(rigs, name):
    once, thrice = rigs(name), rigs(name)
    once.method(once.classifier, once.batch(range(16)), at(5, 0)).loss.backward()
    (3 * thrice.method(thrice.classifier, thrice.batch(range(16)), at(5, 0)).loss).backward()
    torch.testing.assert_close(thrice.gradients(), 3 * once.gradients(), rtol=1e-5, atol=1e-6)


@every_method
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_a_hundred_stay_finite(rigs, name, sign):
    rig = rigs(name)
    rig.classifier.alpha_train = 1.0
    with torch.no_grad():
        rig.classifier.head.weight.zero_()
        rig.classifier.head.bias.copy_(sign * torch.tensor([100.0, -100] * (CLASSES // 2)))
    out = rig.method(rig.classifier, rig.batch(range(16)), at(5, 0))
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(rig.gradients()).all()


@every_method
@pytest.mark.parametrize("rows", [(3,), BLANK[:1], BLANK], ids=["one", "one_unknown", "all_unknown"])
def test_batches_of_one_and_of_nothing_known(rigs, name, rows):
    rig = rigs(name)
    loss = rig.step(rig.batch(list(rows)), at(5, 0))
    assert torch.isfinite(loss) and torch.isfinite(rig.gradients()).all()
    # Nor does such a batch leave anything behind that spoils the next one.
    assert torch.isfinite(rig.step(rig.batch(range(16)), at(5, 1)))
    assert all(torch.isfinite(b).all() for b in rig.method.buffers() if b.is_floating_point())


@every_method
def test_state_round_trip(rigs, name, tmp_path):
    rig = rigs(name)
    state = {"method": rig.method.state_dict(), "shard": rig.method.rank_state(), "labels": rig.store.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = Rig(name)
    resumed.method.load_state_dict(state["method"])
    resumed.method.load_rank_state([state["shard"]] if state["shard"] else [])
    resumed.store.load_state_dict(state["labels"])
    resumed.classifier.load_state_dict(rig.classifier.state_dict())
    losses = []
    for one in (rig, resumed):
        one.method.on_epoch_start(at(5, 0))
        losses.append([one.step(one.batch(range(8 * u, 8 * u + 8)), at(5, u)).item() for u in range(3)])
    assert losses[0] == losses[1]
    assert torch.equal(rig.gradients(), resumed.gradients())


@every_method
def test_exact_accumulation_equals_one_large_batch(rigs, name):
    """With `update_statistics`, uneven micro-steps weighted as the trainer does give a large batch's loss and slope."""
    whole, cut = rigs(name), rigs(name)
    loss = whole.step(whole.batch(range(16)), at(5, 0))
    batches = [cut.batch(range(9), 9), cut.batch(range(9, 16), 7)]
    if cut.method.batch_statistics:
        with torch.no_grad():
            forwards = [cut.method.statistics_forward(cut.classifier, b, at(5, 0)) for b in batches]
            for batch, statistics in zip(
                batches, cut.method.update_statistics(forwards, batches, at(5, 0)), strict=True
            ):
                batch.update_statistics = statistics
    total = torch.zeros(())
    for batch in batches:
        part = cut.method(cut.classifier, batch, at(5, 0)).loss * cut.method.fraction_of_update(batch.global_size, 16)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut.gradients(), whole.gradients(), rtol=1e-4, atol=1e-5)
    for one in (whole, cut):
        one.end_epoch(5)
    for key, value in whole.state().items():
        if isinstance(value, Tensor) and name not in OWN_STEPS:
            torch.testing.assert_close(cut.state()[key], value, rtol=1e-5, atol=1e-6)


RANK_CASES: Cases = [
    *((name, {}) for name in method_names()),
    ("ll_r", {"base": "unobserved", "delta_rel": 3.0}),
    ("ll_ct", {"ties": "inclusive", "delta_rel": 4.0, "k_rule": "rational"}),
    ("ll_cp", {"ties": "strict_flips", "delta_rel": 10.0}),
]


every_rank_case = pytest.mark.parametrize("case", RANK_CASES, ids=["-".join([n, *o]) for n, o in RANK_CASES])


def assert_same_as_alone(found, case):
    name, options = case
    loss, gradients, state = rank_case(Rig(name, **options), list(range(IMAGES)))
    for rank_loss, rank_gradients, rank_state in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-4, atol=1e-5)
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(rank_state[key], value, rtol=1e-5, atol=1e-6, msg=key)


@every_rank_case
def test_four_ranks_are_the_same_as_one(case):
    name, options = case
    # One at a time, because they draw from one generator; inside, because state is laid out by rank.
    lock = threading.Lock()

    def work(rank):
        with lock:
            rig = Rig(name, **options)
        return rank_case(rig, share(rank, 4))

    with ThreadRanks(4) as ranks:
        found = ranks.run(work)
    assert_same_as_alone(found, case)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes that talk over gloo find, per rank and case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (2, str(folder), RANK_CASES), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@every_rank_case
def test_two_processes_are_the_same_as_one(two_processes, case):
    assert_same_as_alone([rank[RANK_CASES.index(case)] for rank in two_processes], case)


# ---- an, full, partial, ll_*: the formulas


def double_batch(rows=6, width=9, seed=0, unknown=0.6):
    """fp64 logits that want a gradient, and codes."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(size=(rows, width)) * 3).requires_grad_()
    codes = generator.integers(0, 2, (rows, width))
    codes[generator.random((rows, width)) < unknown] = -1
    return logits, torch.from_numpy(codes.astype(np.int8))


def make(name: str, labels: SparseLabels | None = None, **options: object):
    labels = labels or SparseLabels.from_dense(np.full((40, 9), -1, np.int8))
    method_class = get_method(name)
    return method_class(method_class.Options(name=name, **options), LabelStore(labels))


def run(method, logits, codes, progress, index=None, statistics=None, global_size=None):
    batch = Batch(
        {},
        codes,
        torch.arange(len(codes)) if index is None else index,
        global_size or len(codes),
        update_statistics=statistics,
    )
    out = method.loss(logits, batch, progress)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out, gradient


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def cross_entropy(logits, target):
    """Loss and derivative of each entry, from the definition."""
    z = logits.detach().numpy()
    p = sigmoid(z)
    return -np.where(target, np.log(p), np.log(1 - p)), p - target


@pytest.mark.parametrize("name", ["an", "full"])
def test_assumed_negative_formula(name):
    logits, codes = double_batch()
    out, gradient = run(make(name), logits, codes, at(1, 0))
    loss, slope = cross_entropy(logits, codes.numpy() == 1)
    assert out.loss.item() == pytest.approx(loss.mean(), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope / loss.size, rtol=1e-11, atol=1e-16)


def test_partial_formula():
    logits, codes = double_batch()
    out, gradient = run(make("partial"), logits, codes, at(1, 0))
    known = codes.numpy() != -1
    loss, slope = cross_entropy(logits, codes.numpy() == 1)
    assert out.loss.item() == pytest.approx(loss[known].mean(), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), np.where(known, slope, 0) / known.sum(), rtol=1e-11, atol=1e-16)


def test_partial_without_known_labels_is_zero():
    logits, codes = double_batch(unknown=1.0)
    out, gradient = run(make("partial"), logits, codes, at(1, 0))
    assert out.loss.item() == 0 and (gradient == 0).all()


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
        method = make(name, SparseLabels.from_dense(codes.numpy()), delta_rel=8.0)
        run(method, logits, codes, at(2, 0))
        assert method.on_epoch_end(at(2, 1)) == {}
        assert method.store.commit() == 0


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


def test_labels_that_do_not_suit_a_method():
    dense = np.array([[1, -1, 0], [0, 1, 0]], dtype=np.int8)
    full, partial = get_method("full"), get_method("partial")
    for default in (-1, 0):
        with pytest.raises(UserError, match="full needs every label"):
            full.check_labels(SparseLabels.from_dense(dense, default), full.Options(name="full"))
        full.check_labels(SparseLabels.from_dense(abs(dense), default), full.Options(name="full"))
    singles = SparseLabels.from_positives([[0], [2]], 3, default=-1)
    with pytest.raises(UserError, match="no observed negative"):
        partial.check_labels(singles, partial.Options(name="partial"))
    partial.check_labels(SparseLabels.from_dense(dense), partial.Options(name="partial"))
    partial.check_labels(SparseLabels.from_positives([[0], [2]], 3, default=0), partial.Options(name="partial"))


# ---- how many are selected: the published schedule

RAMPS = {"ll_r": (0.5, True), "ll_ct": (0.2, True), "ll_cp": (0.1, False)}
ENTRIES = {"voc": 320, "coco": 1280, "nus": 1296, "cub": 4992, "coco_last": 80}
# k in epochs 1 to 10 at the batch of 16 (the last batch of COCO has one image).
SCHEDULE = {
    ("ll_r", "voc"): [0, 2, 4, 5, 7, 9, 10, 12, 13, 15],
    ("ll_r", "coco"): [0, 7, 13, 20, 26, 33, 39, 45, 52, 58],
    ("ll_r", "nus"): [0, 7, 13, 20, 26, 33, 39, 46, 52, 59],
    ("ll_r", "cub"): [0, 25, 50, 75, 100, 125, 150, 175, 200, 225],
    ("ll_r", "coco_last"): [0, 1, 1, 2, 2, 3, 3, 3, 4, 4],
    ("ll_ct", "voc"): [0, 1, 2, 2, 3, 4, 4, 5, 6, 6],
    ("ll_ct", "coco"): [0, 3, 6, 8, 11, 13, 16, 18, 21, 24],
    ("ll_ct", "nus"): [0, 3, 6, 8, 11, 13, 16, 19, 21, 24],
    ("ll_ct", "cub"): [0, 10, 20, 30, 40, 50, 60, 70, 80, 90],
    ("ll_ct", "coco_last"): [0, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    ("ll_cp", "voc"): [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ("ll_cp", "coco"): [0, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ("ll_cp", "nus"): [0, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ("ll_cp", "cub"): [0, 5, 5, 5, 5, 5, 5, 5, 5, 5],
    ("ll_cp", "coco_last"): [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize(("name", "data"), SCHEDULE)
def test_published_schedule(name, data):
    delta, ramp = RAMPS[name]
    assert get_method(name).Options().delta_rel == delta
    assert get_method(name).permanent is not ramp
    found = [selection_size(ENTRIES[data], delta, epoch, ramp, "accumulator") for epoch in range(1, 11)]
    assert found == SCHEDULE[name, data]


def test_exact_arithmetic_differs_where_rounding_did():
    """The released accumulator selects one more in epoch 6 of VOC and COCO, where B C r is whole."""
    differs = {}
    for name, (delta, ramp) in RAMPS.items():
        for data, entries in ENTRIES.items():
            exact = [selection_size(entries, delta, epoch, ramp, "rational") for epoch in range(1, 11)]
            steps = [epoch - 1 if ramp else min(epoch - 1, 1) for epoch in range(1, 11)]
            assert exact == [math.ceil(entries * s * Fraction(str(delta)) / 100) for s in steps]
            pairs = zip(exact, SCHEDULE[name, data], strict=True)
            changed = {epoch: (a, b) for epoch, (a, b) in enumerate(pairs, 1) if a != b}
            if changed:
                differs[name, data] = changed
    assert differs == {
        ("ll_r", "voc"): {6: (8, 9)},
        ("ll_r", "coco"): {6: (32, 33)},
        ("ll_r", "coco_last"): {6: (2, 3)},
    }


def test_rejected_labels_per_epoch_of_a_public_run():
    """65,665 images of COCO: 4,104 batches of 16 and one of 1."""
    totals = [
        4104 * selection_size(1280, 0.5, epoch, True, "accumulator")
        + selection_size(80, 0.5, epoch, True, "accumulator")
        for epoch in range(2, 11)
    ]
    assert totals == [28729, 53353, 82082, 106706, 135435, 160059, 184683, 213412, 238036]


def test_clean_rate_is_the_released_accumulator():
    rate = 1.0
    for epoch in range(1, 30):
        assert clean_rate(0.5, epoch) == rate
        rate -= 0.5 / 100
