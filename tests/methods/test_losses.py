"""Losses alone: the values and gradients that training has, from logits and codes and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Loss, Progress, get_method, loss, method_names
from spml_fast.methods.ignore import Ignore, IgnoreOptions
from tests.support.methods import on_ranks
from tests.support.paths import ROOT

ROWS, CLASSES = 6, 9
NEEDED: dict[str, dict[str, Any]] = {"epr": {"expected_positives": 1.7}}
ALONE = [name for name in method_names() if not get_method(name).needs_samples and name != "ignore"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, NEEDED.get(name, {})) for name in ALONE),
    ("an_ls", {"form": "half", "log_form": "logits"}),
    ("wan", {"gamma": 0.3}),
    ("ll_r", {"delta_rel": 5.0, "base": "unobserved", "k_rule": "rational"}),
    ("ll_ct", {"delta_rel": 8.0, "batch_semantics": "paper", "paper_batch": 4}),
    ("ll_cp", {"delta_rel": 9.0, "ties": "strict_flips"}),
    ("p_asl", {"mode": "ignore_normalize_classes", "reduction": "mean"}),
    ("splc", {"change_epoch": 5}),
]


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 logits that want a gradient, codes of all three kinds, and everything that is known."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(ROWS, CLASSES)) * 3).requires_grad_()
    truth = torch.from_numpy(rng.integers(0, 2, (ROWS, CLASSES)).astype(np.int8))
    codes = torch.where(torch.from_numpy(rng.random((ROWS, CLASSES)) < 0.6), -1, truth).to(torch.int8)
    return logits, codes, truth


def in_training(name: str, options: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor], epoch: int) -> Tensor:
    """The loss as the trainer's path has it: the method on a label store of these samples."""
    logits, codes, truth = batch
    method_class = get_method(name)
    method = method_class(
        method_class.Options(name=name, **options), LabelStore(SparseLabels.from_dense(codes.numpy()))
    )
    place = Progress(epoch, 10, update=(epoch - 1) * 4, updates_per_epoch=4, lr=1e-3)
    return method.loss(logits, Batch({}, codes, torch.arange(ROWS), ROWS, truth), place).loss


@pytest.mark.parametrize("epoch", [1, 4])
@pytest.mark.parametrize(("name", "options"), CASES, ids=["-".join(map(str, (n, *o.values()))) for n, o in CASES])
def test_value_and_gradient_are_those_of_training(name: str, options: dict[str, Any], epoch: int) -> None:
    batch = a_batch()
    logits, codes, truth = batch
    value = loss(name, logits, codes, epoch=epoch, epochs=10, truth=truth, **options)
    expected = in_training(name, options, batch, epoch)
    assert value.shape == () and torch.equal(value, expected)
    assert torch.equal(*(torch.autograd.grad(v, logits)[0] for v in (value, expected)))


def test_every_method_is_there_or_refused_with_a_reason() -> None:
    logits, codes, _ = a_batch()
    for name in set(method_names()) - {*ALONE, "ignore"}:
        with pytest.raises(UserError, match=f"method {name} keeps a state for every training sample"):
            loss(name, logits, codes)


def test_golden_values_of_the_large_losses() -> None:
    """docs/sources.md#golden-values: two of eight labels are taken, the largest unknown logits 3 and 1.5."""
    logits = torch.tensor([[2, -1, 0.5, -3], [1.5, 0, -2, 3]], dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[1, -1, -1, -1], [-1, 1, -1, -1]])
    names = {"an": 0.879116231934, "ll_r": 0.285366153240, "ll_ct": 0.316616231934, "ll_cp": 0.316616231934}
    for name, expected in names.items():
        options = {} if name == "an" else {"delta_rel": 25.0, "k_rule": "rational"}
        value = loss(name, logits, codes, epoch=2, **options)
        assert value.item() == pytest.approx(expected, abs=1e-12)
        (gradient,) = torch.autograd.grad(value, logits)
        row = {"an": [0.1021968095, 0.1190717659], "ll_r": [0.0, 0.0]}.get(name, [-0.0228031905, -0.0059282341])
        assert gradient[1, [0, 3]].tolist() == pytest.approx(row, abs=1e-10)
        assert gradient[0].tolist() == pytest.approx(
            [-0.0149003653, 0.0336176777, 0.0778074164, 0.0059282341], abs=1e-10
        )


def test_known_values_by_hand() -> None:
    logits, codes = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1, 0, -1]])
    half = math.log(2)
    assert loss("an", logits, codes).item() == pytest.approx(half)
    assert loss("partial", logits, codes).item() == pytest.approx(half)
    assert loss("iu", logits, codes, log_form="logits").item() == pytest.approx(2 * half / 3)
    assert loss("em", logits, codes, alpha=0.2, log_form="logits").item() == pytest.approx((2 - 0.2) * half / 3)


def test_ignore_keeps_its_thresholds_from_batch_to_batch() -> None:
    criterion = Loss("ignore", CLASSES, warm_up=1, debias=False).double()
    method = Ignore(IgnoreOptions(warm_up=1, debias=False), LabelStore(SparseLabels.from_dense(a_batch()[1].numpy())))
    method.double()
    rejected = 0
    for seed in range(4):
        weak, codes, _ = a_batch(seed)
        strong, masked = a_batch(seed + 10)[0], a_batch(seed + 20)[0]
        value = criterion(weak, codes, strong=strong, masked=masked, epoch=seed + 1)
        place = Progress(seed + 1, 10, 0, 1)
        out = method.combine(weak, strong, masked.detach(), Batch({}, codes, torch.arange(ROWS), ROWS), place)
        assert torch.equal(value, out.loss)
        slopes = torch.autograd.grad(value, (weak, strong, masked), allow_unused=True)
        expected = torch.autograd.grad(out.loss, (weak, strong))
        assert torch.equal(slopes[0], expected[0]) and torch.equal(slopes[1], expected[1]) and slopes[2] is None
        assert torch.equal(criterion.method.gap_average, method.gap_average) and method.gap_average > 0
        rejected += int(out.metrics["selected_count"])
    assert rejected > 0
    assert set(criterion.state_dict()) == {f"method.{n}" for n in ("gap_average", "logit_average", "ema_steps")}
    # Without a masked view nothing is rejected, whatever the epoch, and nothing asks for it.
    before = criterion.method.gap_average.clone()
    assert criterion(weak, codes, strong=strong).item() > 0 and torch.equal(before, criterion.method.gap_average)


def test_a_running_prior_is_kept() -> None:
    criterion = Loss("p_asl", CLASSES, prior="running", top_k=0)
    logits, codes, _ = a_batch()
    criterion(logits, codes)
    torch.testing.assert_close(criterion.method.class_prior(), torch.sigmoid(logits).mean(0).detach())


def test_permanent_flips_are_not_collected() -> None:
    criterion = Loss("ll_cp", CLASSES, delta_rel=10.0)
    logits, codes, _ = a_batch()
    criterion(logits, codes, epoch=3)
    assert criterion.method.store.commit() == 0


def test_half_precision_is_widened() -> None:
    logits, codes, _ = a_batch()
    half = logits.detach().bfloat16()
    value = loss("em", half, codes)
    assert value.dtype == torch.float32 and torch.equal(value, loss("em", half.float(), codes))


def test_parts_of_a_batch_on_ranks() -> None:
    logits, codes, _ = a_batch()
    expected = loss("ll_r", logits, codes, epoch=4, delta_rel=5.0)
    (slope,) = torch.autograd.grad(expected, logits)
    parts = [slice(0, 2), slice(2, ROWS)]

    def work(rank: int) -> tuple[Tensor, Tensor]:
        z = logits.detach()[parts[rank]].requires_grad_()
        value = loss("ll_r", z, codes[parts[rank]], epoch=4, delta_rel=5.0)
        return value.detach(), torch.autograd.grad(value, z)[0]

    values, slopes = zip(*on_ranks(2, work), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(slopes) / 2, slope, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("emm", {}, "there is no method 'emm'"),
        ("em", {"alfa": 0.2}, "method em has no option 'alfa'; it has alpha, log_form"),
        ("an", {"smoothing": 0.1}, "method an has no option 'smoothing'; it has none"),
        ("em", {"alpha": -1.0}, "method.alpha is -1.0"),
        ("ll_r", {}, r"give epoch \(counted from 1\)"),
        ("splc", {}, r"give epoch \(counted from 1\)"),
        ("gr", {"epoch": 3}, "give epochs"),
        ("epr", {}, "needs --method.expected_positives"),
        ("ignore", {}, "needs the strong view's logits"),
    ],
)
def test_what_is_missing_is_named(name: str, options: dict[str, Any], message: str) -> None:
    logits, codes, _ = a_batch()
    with pytest.raises(UserError, match=message):
        loss(name, logits, codes, **options)


def test_what_does_not_fit_is_named() -> None:
    logits, codes, _ = a_batch()
    with pytest.raises(ValueError, match=r"codes must be \[6, 9\]"):
        loss("an", logits, codes[:, :5])
    with pytest.raises(ValueError, match=r"logits must be \[B, C\]"):
        loss("an", logits[0], codes[0])
    with pytest.raises(ValueError, match=r"masked must be \[6, 9\]"):
        Loss("ignore", CLASSES)(logits, codes, strong=logits, masked=logits[:3])
    with pytest.raises(UserError, match="method em knows neither a strong nor a masked view"):
        Loss("em", CLASSES)(logits, codes, strong=logits)


def test_the_page_of_methods_says_how() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    block = text.split("## A loss alone")[1].split("```python\n")[1].split("```")[0]
    assert "Loss(" in block and "loss(" in block
    exec(compile(block, "docs/methods.md", "exec"), {})


def test_ignore_wants_the_strong_view_for_either_of_its_terms() -> None:
    logits, codes, _ = a_batch()
    for options in ({"strong_aug": True, "reg": False}, {"strong_aug": False, "reg": True}):
        with pytest.raises(UserError, match="needs the strong view's logits"):
            Loss("ignore", CLASSES, **options)(logits, codes)
    assert Loss("ignore", CLASSES, strong_aug=False, reg=False)(logits, codes).item() > 0
