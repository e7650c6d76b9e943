"""A head that is solved for: against formulas, scikit-learn, steps of an optimizer, and over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core.errors import UserError
from spml_fast.data.labels import UNKNOWN
from spml_fast.methods import get_method, method_names
from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import EntryLoss, Progress
from spml_fast.methods.partial import PartialBCE
from spml_fast.training import linear_probe
from spml_fast.training.linear_probe import PENALTIES, HeadObjective, Solution, require_memory, solve
from tests.support.methods import SAMPLES, Rig, on_ranks

IMAGES, CHANNELS, CLASSES = 70, 6, 4
AN, PARTIAL = EntryLoss(AssumeNegative.point), EntryLoss(PartialBCE.point)
SOLVABLE = [name for name in method_names() if get_method(name).solvable]


def problem() -> tuple[Tensor, Tensor]:
    """Features that are neither centred nor of unit size, and labels that follow them with noise."""
    generator = torch.Generator().manual_seed(3)
    features = 5 + 3 * torch.randn(IMAGES, CHANNELS, generator=generator) * torch.arange(1, CHANNELS + 1)
    logits = (features - 5) @ torch.randn(CHANNELS, CLASSES, generator=generator) / 5
    positive = logits + 4 * torch.randn(IMAGES, CLASSES, generator=generator) > 3
    codes = torch.where(positive, 1, -1).to(torch.int8)
    codes[::7] = torch.where(codes[::7] == 1, 1, 0).to(torch.int8)
    return features, codes


def value(weight: Tensor, bias: Tensor, penalty: float, known: bool = False) -> Tensor:
    """F of a head for raw features, written down from the formula, fp64."""
    features, codes = problem()
    x = features.double()
    scale = (x - x.mean(0)).square().mean().sqrt()
    logits = x @ weight.double().T + bias.double()
    losses = -logsigmoid(torch.where(codes == 1, logits, -logits))
    counted = codes != UNKNOWN if known else torch.ones_like(codes, dtype=torch.bool)
    return CLASSES * losses[counted].mean() + penalty / 2 * (weight.double() * scale).square().sum()


def solved(penalties: Any = PENALTIES, loss: EntryLoss = AN) -> tuple[HeadObjective, list[Solution]]:
    objective = HeadObjective(*problem(), loss)
    return objective, list(solve(objective, penalties))


@pytest.mark.parametrize(("loss", "known"), [(AN, False), (PARTIAL, True)])
def test_the_gradient_of_the_formula_is_zero_there(loss: EntryLoss, known: bool) -> None:
    objective, solutions = solved(loss=loss)
    assert [s.penalty for s in solutions] == list(PENALTIES)
    for solution in solutions:
        # fp64 all the way: what the head takes is rounded to fp32.
        weight = solution.parameters[:, :-1] / objective.scale
        bias = solution.parameters[:, -1] - weight @ objective.mean
        parameters = (weight.requires_grad_(), bias.requires_grad_())
        slopes = torch.autograd.grad(value(*parameters, solution.penalty, known), parameters)
        # In units of the scaled features, which the tolerance is for.
        assert float((slopes[0] / objective.scale).abs().max()) < 1e-5 and float(slopes[1].abs().max()) < 1e-5
        assert solution.gradient < 1e-5
        expected = float(value(weight.detach(), bias.detach(), 0, known))
        assert solution.loss == pytest.approx(expected, rel=1e-9)
    losses = [s.loss for s in solutions]
    assert losses == sorted(losses, reverse=True) and losses[0] > 1.2 * losses[-1], "a weaker penalty fits better"


def test_it_is_scikit_learns_logistic_regression() -> None:
    objective, (solution,) = solved([0.3])
    features, codes = problem()
    x = ((features.double() - objective.mean) / objective.scale).numpy()
    for c in range(CLASSES):
        oracle = LogisticRegression(C=1 / (0.3 * IMAGES), tol=1e-8, max_iter=1000).fit(x, codes[:, c].numpy() == 1)
        found = solution.parameters[c].numpy()
        np.testing.assert_allclose(found, [*oracle.coef_[0], *oracle.intercept_], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.5), (torch.optim.Adam, 0.1)])
def test_so_many_steps_do_not_reach_it(optimizer: type[torch.optim.Optimizer], lr: float) -> None:
    """As many steps as L-BFGS took evaluations come near it, from above."""
    objective, (solution,) = solved([0.1])
    best, gradient = objective(solution.parameters, 0.1)
    assert float(gradient.abs().max()) < 1e-5
    parameters = torch.zeros_like(solution.parameters, requires_grad=True)
    steps_made = solution.evaluations
    steps = optimizer([parameters], lr=lr)  # type: ignore[call-arg]
    reached = []
    for _ in range(steps_made):
        now, parameters.grad = objective(parameters.detach(), 0.1)
        reached.append(float(now))
        steps.step()
    assert min(reached) > float(best) + 1e-9
    assert reached[-1] - float(best) < 0.5 * (reached[0] - float(best)), "the optimizer does not work at all"


def test_every_evaluation_is_told() -> None:
    features, codes = problem()
    objective, told = HeadObjective(features, codes, AN), [0]

    def evaluated() -> None:
        told[0] += 1

    for solution in solve(objective, [1.0, 0.1], evaluated):
        assert told == [solution.evaluations]
        told[0] = 0


def test_units_of_the_features_do_not_matter() -> None:
    features, codes = problem()
    logits = []
    for changed in (features, features * 40 - 300):
        objective = HeadObjective(changed, codes, AN)
        weight, bias = objective.head(next(solve(objective, [0.3])).parameters)
        logits.append(changed @ weight.T + bias)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=2e-3)


def test_it_begins_at_the_frequency_of_the_classes() -> None:
    objective, _ = solved([])
    start = objective.start()
    assert not start[:, :-1].any()
    frequency = (problem()[1] == 1).double().mean(0)
    torch.testing.assert_close(torch.sigmoid(start[:, -1]), frequency, rtol=1e-4, atol=1e-5)


def test_labels_without_a_loss_do_not_count() -> None:
    features, codes = problem()
    assert HeadObjective(features, codes, AN).weight == pytest.approx(1 / IMAGES)
    known = int((codes != UNKNOWN).sum())
    assert 0 < known < codes.numel()
    assert HeadObjective(features, codes, PARTIAL).weight == pytest.approx(CLASSES / known)
    with pytest.raises(UserError, match="none of the training labels"):
        HeadObjective(features, torch.full_like(codes, UNKNOWN), PARTIAL)


def test_blocks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solved([0.3])[1][0]
    monkeypatch.setattr(linear_probe, "_BLOCK", 10 * CHANNELS)
    objective, (part,) = solved([0.3])
    assert len(objective._scaled.split(objective._rows)) == 7
    torch.testing.assert_close(part.parameters, whole.parameters, rtol=1e-4, atol=1e-5)


def test_the_same_on_two_ranks() -> None:
    features, codes = problem()
    alone = solved()[1]

    def rank(number: int) -> list[Solution]:
        rows = torch.arange(IMAGES)[number * 50 : number * 50 + 50]
        return list(solve(HeadObjective(features[rows], codes[rows], AN)))

    first, second = on_ranks(2, rank)
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(a.parameters, b.parameters)
        torch.testing.assert_close(a.parameters, one.parameters, rtol=1e-3, atol=1e-4)
        assert a.loss == pytest.approx(one.loss, rel=1e-5)


def test_a_rank_without_images() -> None:
    features, codes = problem()
    alone = solved([0.3])[1][0]

    def rank(number: int) -> Solution:
        part = slice(0, IMAGES if number == 0 else 0)
        return next(solve(HeadObjective(features[part], codes[part], AN), [0.3]))

    for found in on_ranks(2, rank):
        torch.testing.assert_close(found.parameters, alone.parameters, rtol=1e-4, atol=1e-5)


def test_methods_that_can_be_solved_for() -> None:
    assert {"an", "full", "partial", "em", "ll_r", "ll_ct", "ll_cp"} <= set(SOLVABLE)
    assert not {"ignore", "role", "epr", "iun", "asl", "p_asl", "splc", "gr"} & set(SOLVABLE)


@pytest.mark.parametrize("name", SOLVABLE)
def test_the_loss_is_the_methods_own(name: str) -> None:
    """What it says of entries alone adds up to its loss of a batch in the first epoch of a linear phase."""
    rig = Rig(name)
    batch = rig.batch(range(SAMPLES))
    progress = Progress(1, 1, 0, 1, phase="linear")
    rig.method.on_epoch_start(progress)
    logits = torch.randn(SAMPLES, rig.store.num_classes, generator=torch.Generator().manual_seed(5)) * 3
    logits.requires_grad_()
    total = rig.method.loss(logits, batch, progress).loss
    (slope,) = torch.autograd.grad(total, logits)
    loss = rig.method.linear_loss()
    entries = loss.point.reference(logits, batch.labels, *loss.params)
    (expected,) = torch.autograd.grad(entries.sum(), logits)
    # Their denominators differ; an optimum does not see them.
    factor = float((total / entries.sum()).detach())
    assert 0 < factor < 1 and bool(slope.any())
    torch.testing.assert_close(slope, expected * factor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SOLVABLE)
def test_every_one_ends_where_its_gradient_is_zero(name: str) -> None:
    """Its gradient is that of its value, and L-BFGS finds a minimum, also where the loss is not convex."""
    rig = Rig(name)
    features, codes = problem()
    for solution in solve(HeadObjective(features, codes, rig.method.linear_loss()), [1.0, 0.1]):
        assert solution.gradient < 1e-5 and bool(torch.isfinite(solution.parameters).all())


def test_others_have_none() -> None:
    with pytest.raises(NotImplementedError):
        Rig("ignore").method.linear_loss()


def test_features_that_are_not_finite() -> None:
    features, codes = problem()
    features[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        HeadObjective(features, codes, AN)


def test_features_that_say_nothing() -> None:
    _, codes = problem()
    objective = HeadObjective(torch.ones(IMAGES, CHANNELS), codes, AN)
    (solution,) = solve(objective, [0.3])
    assert not objective.head(solution.parameters)[0].any()


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "free_gib", lambda: 2.0)
    # Features twice, codes, L-BFGS's past steps, a block.
    exact = 1000 * (12 * 1280 + 25) + 8 * 48 * 25 * 1281 + 24 * (1 << 22)
    assert require_memory(1000, 1280, 25) == exact
    with pytest.raises(
        UserError, match=r"1,000,000 x 1,280 features .* 14\.\d\d GiB .* is 1\.00 GiB; .*train\.linear sgd"
    ):
        require_memory(1_000_000, 1280, 25)
