"""What all methods promise: a finite loss, state that survives, the same on any number of ranks."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from spml_fast.core.errors import UserError
from spml_fast.methods import Method, get_method, method_names
from tests.support.large_loss import LARGE_LOSS
from tests.support.methods import BLANK, CLASSES, IMAGES, Cases, Rig, at, on_ranks, rank_case, rank_main, share

# Their tables take a step of their own in each micro-step.
OWN_STEPS = ("role",)


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


def test_the_methods_are_registered():
    assert {"an", "full", "partial", *LARGE_LOSS} <= set(method_names())
    with pytest.raises(UserError, match="no method 'anx'; choose one of an, "):
        get_method("anx")


@every_method
def test_the_training_split_is_scored_for_those_who_look(name):
    """A pass over the training split costs an evaluation: nobody has it made who throws the scores away."""
    rig, looks = Rig(name), get_method(name).on_train_scores is not Method.on_train_scores
    asked = [rig.method.needs_train_scores(at(epoch, 0)) for epoch in range(1, 11)]
    assert any(asked) is looks


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


def assert_same_as_alone(results, case):
    name, options = case
    loss, gradients, state = rank_case(Rig(name, **options), list(range(IMAGES)))
    for rank_loss, rank_gradients, rank_state in results:
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

    assert_same_as_alone(on_ranks(4, work), case)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes that talk over gloo find, per rank and case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (2, str(folder), RANK_CASES), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@every_rank_case
def test_two_processes_are_the_same_as_one(two_processes, case):
    assert_same_as_alone([rank[RANK_CASES.index(case)] for rank in two_processes], case)
