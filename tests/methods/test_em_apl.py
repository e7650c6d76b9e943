"""EM + APL: how many labels are made, which, when, and their loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.methods import Method, Progress
from spml_fast.methods.em_apl import SoftLabels, apl_quota
from tests.support.formulas import (
    CODES,
    EPOCH_3,
    TRUTH,
    N,
    P,
    U,
    batch_of,
    f_known,
    make,
    nl,
    numeric_gradient,
    run,
    sigmoid,
    some_codes,
    some_logits,
)
from tests.support.methods import on_ranks


def test_apl_epochs() -> None:
    method = make("em_apl", CODES, warm_up=3)
    asked = [t for t in range(1, 9) if method.needs_train_scores(Progress(t, 8, 0, 1))]
    assert asked == [3, 4, 5, 6, 7]
    assert not method.needs_train_scores(Progress(3, 8, 0, 1, phase="linear"))
    assert not make("em_apl", CODES, warm_up=8).needs_train_scores(Progress(8, 8, 0, 1))


def test_apl_quota_is_exact() -> None:
    """0.29 * 100 = 29, although floats say 28.999...; theta is meant as it is written."""
    assert apl_quota(100, 0.29, 2, 1) == 29 and math.floor(0.29 * 100 / 1) == 28
    assert apl_quota(10, 0.9, 8, 5) == 3
    assert apl_quota(9, 0.9, 8, 5) == 2
    assert apl_quota(0, 0.9, 8, 5) == 0


def score(method: Method, index: np.ndarray, scores: np.ndarray, progress: Progress) -> dict[str, float]:
    """A pass over some samples in two batches, and the end of the epoch."""
    for part in np.array_split(index, 2):
        if len(part):
            method.on_train_scores(torch.from_numpy(part), torch.from_numpy(scores[part]).float())
    return method.on_epoch_end(progress)


def test_the_method_takes_theta_as_it_is_written() -> None:
    method = make("em_apl", np.full((100, 2), U, np.int8), theta=0.29, warm_up=1)
    figures = score(method, np.arange(100), np.random.default_rng(0).normal(size=(100, 2)), Progress(1, 2, 0, 1))
    assert figures["soft_labels_new"] == figures["soft_labels"] == 2 * 29


def apl_by_the_letter(codes: np.ndarray, passes: list[np.ndarray], theta: float, rest: int) -> np.ndarray:
    """Soft labels after some passes, NaN where there is none; class after class, entry after entry."""
    soft = np.full(codes.shape, np.nan)
    for c in range(codes.shape[1]):
        number = math.floor(round(theta * int((codes[:, c] == U).sum()) / rest, 9))
        for scores in passes:
            free = [i for i in range(len(codes)) if codes[i, c] == U and np.isnan(soft[i, c])]
            for i in sorted(free, key=lambda i, s=scores: (s[i, c], i))[:number]:
                soft[i, c] = sigmoid(float(scores[i, c]))
    return soft


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_apl_freezes_the_lowest(world: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, over uneven ranks, with ties (to the lower index), once for good, known labels never."""
    monkeypatch.setattr("spml_fast.methods.em_apl._SELECTION_ELEMENTS", chunk)
    codes = some_codes(50, 7)
    codes[:, 3] = N
    codes[:49, 4] = P
    rng = np.random.default_rng(2)
    passes = [np.round(rng.normal(0, 2, codes.shape), 1) for _ in range(3)]
    epochs = [Progress(t, 8, 0, 1) for t in (3, 4, 5)]
    want = apl_by_the_letter(codes, passes, 0.9, 5)
    order = rng.permutation(50)
    parts = np.split(order, [20, 45]) if world == 3 else [order]

    def work(rank: int) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        method = make("em_apl", codes, warm_up=3)
        for scores, progress in zip(passes, epochs, strict=True):
            figures = score(method, parts[rank], scores, progress)
        return method.soft_rows(torch.arange(50)), figures, method.rank_state()

    results = on_ranks(world, work) if world > 1 else [work(0)]
    assert (~np.isnan(want)).sum() > 50
    for rank, (soft, figures, state) in enumerate(results):
        np.testing.assert_allclose(soft.numpy(), want, rtol=1e-6)
        assert figures["soft_labels"] == (~np.isnan(want)).sum() > figures["soft_labels_new"] > 0
        assert (state["index"] % world == rank).all() and len(state["values"]) < 1.5 * figures["soft_labels"] / world
    # Nothing is kept twice, and a run on another number of ranks finds all of it.
    shards = [state for *_, state in results]
    assert sum(len(s["values"]) for s in shards) == (~np.isnan(want)).sum()

    def reload(rank: int) -> Tensor:
        method = make("em_apl", codes, warm_up=3)
        method.load_rank_state(shards)
        assert method.total == (~np.isnan(want)).sum()
        return method.soft_rows(torch.arange(50))

    for soft_labels in on_ranks(2, reload):
        np.testing.assert_allclose(soft_labels.numpy(), want, rtol=1e-6)


def test_apl_never_takes_more_than_there_are() -> None:
    codes = np.array([[P, U], [U, U], [U, P]], np.int8)
    method = make("em_apl", codes, theta=1.0, warm_up=1)
    scores = np.array([[0.0, 1.0], [2.0, -1.0], [-3.0, 0.0]])
    assert score(method, np.arange(3), scores, Progress(1, 2, 0, 1))["soft_labels"] == 4
    again = Progress(1, 2, 0, 1)
    assert score(method, np.arange(3), scores, again) == {
        "classes_without_positives": 0,
        "soft_labels_new": 0,
        "soft_labels": 4,
    }


def test_apl_loss() -> None:
    """beta times the soft cross-entropy on frozen entries, EM on all others; what they are in truth is counted."""
    codes, logits = CODES, some_logits(*CODES.shape)
    method = make("em_apl", codes, alpha=0.3, beta=0.4, theta=0.5, warm_up=1)
    score(method, np.arange(5), some_logits(5, 7, 9).numpy(), Progress(1, 2, 0, 1))
    soft = method.soft_rows(torch.arange(5)).double().numpy()
    assert 3 <= (~np.isnan(soft)).sum() < (codes == U).sum()

    def formula(z: np.ndarray, z0: np.ndarray, codes: np.ndarray) -> float:
        out = 0.0
        for a, y, s in zip(z.flat, codes.flat, soft.flat, strict=True):
            p = sigmoid(a)
            if not math.isnan(s):
                out += 0.4 * (s * nl(p) + (1 - s) * nl(1 - p))
            else:
                out += f_known(a, a, y) if y != U else -0.3 * (p * nl(p) + (1 - p) * nl(1 - p))
        return out / z.size

    z = logits.numpy()
    loss, gradient = run(method, logits, batch_of(codes))
    assert loss.item() == pytest.approx(formula(z, z, codes), rel=1e-7)
    np.testing.assert_allclose(gradient, numeric_gradient(formula, z, codes), rtol=1e-6, atol=1e-8)
    metrics = method.loss(logits, batch_of(codes, truth=TRUTH), EPOCH_3).metrics
    frozen = ~np.isnan(soft)
    assert metrics["soft_label_count"] == frozen.sum()
    assert metrics["soft_label_wrong_count"] == (frozen & (TRUTH == P)).sum()
    assert metrics["soft_label_right_count"] == (frozen & (TRUTH == N)).sum()
    # A batch of other rows finds its own soft labels.
    picked = run(method, logits[[3, 1]], batch_of(codes, [3, 1]))[0].item()
    soft = soft[[3, 1]]
    assert picked == pytest.approx(formula(z[[3, 1]], z, codes[[3, 1]]), rel=1e-7)


def test_a_single_soft_label_counts_and_ranks_without_samples_look_on() -> None:
    """Three ranks and two samples: the third rank keeps nothing, and finds the soft label of another rank."""
    codes = np.array([[U, P], [P, U]], np.int8)
    logits = some_logits(2, 2)

    def work(rank: int) -> tuple[Tensor, Tensor, int]:
        method = make("em_apl", codes, alpha=0.3, beta=0.4, theta=1.0, warm_up=1)
        method.add(torch.tensor([1]), torch.tensor([1]), torch.tensor([0.25]))
        own = torch.arange(2)[rank : rank + 1]
        batch = batch_of(codes, own.numpy(), size=2)
        return method.soft_rows(torch.arange(2)), run(method, logits[own], batch)[0], len(method.soft)

    results = on_ranks(3, work)
    for soft, _, _ in results:
        np.testing.assert_array_equal(soft.numpy(), [[np.nan, np.nan], [np.nan, 0.25]])
    assert [kept for *_, kept in results] == [0, 1, 0]
    p = np.vectorize(sigmoid)(logits.numpy())
    entropy = -0.3 * (p[0, 0] * nl(p[0, 0]) + (1 - p[0, 0]) * nl(1 - p[0, 0]))
    soft_term = 0.4 * (0.25 * nl(p[1, 1]) + 0.75 * nl(1 - p[1, 1]))
    wanted = (entropy + nl(p[0, 1]) + nl(p[1, 0]) + soft_term) / 4
    assert np.mean([loss.item() for _, loss, _ in results]) == pytest.approx(wanted, rel=1e-6)


def test_soft_labels_of_many_classes() -> None:
    """Class ids beyond 32,767 need 4 bytes, and merging keeps every entry."""
    soft = SoftLabels(3, 40_000, torch.device("cpu"))
    soft.add(torch.tensor([2, 0]), torch.tensor([39_999, 5]), torch.tensor([0.5, 0.25]))
    soft.add(torch.tensor([2]), torch.tensor([7]), torch.tensor([0.125]))
    rows = soft.rows(torch.tensor([2, 1, 0]))
    assert rows[0, 39_999] == 0.5 and rows[0, 7] == 0.125 and rows[2, 5] == 0.25
    assert (~rows.isnan()).sum() == 3 and len(soft) == 3 and soft.max_row == 2
    assert soft.classes.dtype == torch.int32 and SoftLabels(3, 32_767, soft.device).classes.dtype == torch.int16


def test_where_no_soft_label_is_there_is_none() -> None:
    soft = SoftLabels(3, 4, torch.device("cpu")).rows(torch.tensor([2, 0]))
    assert soft.shape == (2, 4) and soft.isnan().all()


def test_apl_counts_nothing_before_anything_is_frozen() -> None:
    method = make("em_apl", CODES, warm_up=1)
    logits = some_logits(*CODES.shape)
    assert "soft_label_count" not in method.loss(logits, batch_of(CODES), EPOCH_3).metrics
    # An epoch without scores freezes nothing.
    assert method.on_epoch_end(Progress(1, 2, 0, 1))["soft_labels"] == 0
    score(method, np.arange(5), logits.numpy(), Progress(1, 2, 0, 1))
    assert method.loss(logits, batch_of(CODES), EPOCH_3).metrics["soft_label_count"] > 0
