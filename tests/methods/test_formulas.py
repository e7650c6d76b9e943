"""Every baseline's loss and gradient on a whole batch, against its formula written anew.

A formula is a function of the logits z and of z0, the same logits where no gradient passes (weights, targets). Its
gradient is a central difference in z alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spml_fast.methods import Progress
from tests.support.formulas import (
    BASELINES,
    CODES,
    EPOCH_1,
    EPOCH_3,
    TRUTH,
    Formula,
    N,
    P,
    U,
    batch_of,
    f_known,
    f_p_asl,
    make,
    nl,
    numeric_gradient,
    run,
    sigmoid,
    some_logits,
)


def over_entries(entry: Callable[[float, float, int], float], mean: bool = True) -> Formula:
    """Sum or mean of an entry's loss."""

    def total(z: np.ndarray, z0: np.ndarray, codes: np.ndarray) -> float:
        values = [entry(a, b, int(c)) for a, b, c in zip(z.flat, z0.flat, codes.flat, strict=True)]
        return math.fsum(values) / (z.size if mean else 1)

    return total


def f_an_ls(e: float) -> Formula:
    def entry(z: float, _: float, y: int) -> float:
        p = sigmoid(z)
        a, b = nl(p), nl(1 - p)
        return (1 - e) * a + e * b if y == 1 else (1 - e) * b + e * a

    return over_entries(entry)


def f_wan(gamma: float) -> Formula:
    return over_entries(lambda z, _, y: nl(sigmoid(z)) if y == 1 else gamma * nl(1 - sigmoid(z)))


def f_em(alpha: float) -> Formula:
    def entry(z: float, z0: float, y: int) -> float:
        p = sigmoid(z)
        return f_known(z, z0, y) if y != -1 else -alpha * (p * nl(p) + (1 - p) * nl(1 - p))

    return over_entries(entry)


def f_epr(k: float, weight: float = 1.0) -> Formula:
    def total(z: np.ndarray, _: np.ndarray, codes: np.ndarray) -> float:
        positives = sum(nl(sigmoid(a)) for a, y in zip(z.flat, codes.flat, strict=True) if y == 1) / z.size
        mean = sum(sigmoid(a) for a in z.flat) / len(z)
        return positives + weight * (mean - k) ** 2 / z.shape[1] ** 2

    return total


def f_durand(a: float, b: float, g: float) -> Formula:
    def total(z: np.ndarray, _: np.ndarray, codes: np.ndarray) -> float:
        out = 0.0
        for row, y in zip(z, codes, strict=True):
            r = np.mean(y != -1)
            known = sum(math.log1p(math.exp(-x if c == 1 else x)) for x, c in zip(row, y, strict=True) if c != -1)
            out += (a * r**g + b) / z.shape[1] * known
        return out / len(z)

    return total


def f_asl(gp: float, gn: float, m: float, attached: bool) -> Formula:
    def entry(z: float, z0: float, y: int) -> float:
        p, w = sigmoid(z), sigmoid(z if attached else z0)
        if y == 1:
            return (1 - w) ** gp * -math.log(max(p, 1e-8))
        pm, wm = max(p - m, 0), max(w - m, 0)
        return wm**gn * -math.log(max(1 - pm, 1e-8))

    return over_entries(entry, mean=False)


def f_splc(tau: float, correct: bool) -> Formula:
    def entry(z: float, _: float, y: int) -> float:
        x = z - 1 if y == 1 else z
        p = sigmoid(x)
        if y == 1 or (correct and y == -1 and p > tau):
            return (1 - p) ** 2 * -math.log(p)
        return p**2 * -math.log(1 - p)

    return over_entries(entry, mean=False)


def f_hill(z: float, _: float, y: int) -> float:
    if y == 1:
        pm = sigmoid(z - 1)
        return (1 - pm) ** 2 * -math.log(pm)
    return (1.5 - sigmoid(z)) * sigmoid(z) ** 2


def f_gr(w: float, b: float, mu: float, s: float, q2: float = 0.01, q3: float = 1.0) -> Formula:
    def entry(z: float, z0: float, y: int) -> float:
        p, p0 = sigmoid(z), sigmoid(z0)
        if y != -1:
            return -math.log((p if y == 1 else 1 - p) + 1e-7)
        k = sigmoid(w * p0 + b)
        v = math.exp(-((p0 - mu) ** 2) / (2 * s * s))
        return v * (k * (1 - p**q2) / q2 + (1 - k) * (1 - (1 - p) ** q3) / q3)

    return over_entries(entry)


IUN_CODES = np.where(CODES == P, P, np.where(TRUTH == N, N, U))
FORMULAS: dict[str, tuple[str, dict[str, Any], Progress, Formula]] = {
    "an_ls": ("an_ls", {}, EPOCH_3, f_an_ls(0.1)),
    "an_ls half": ("an_ls", {"form": "half", "smoothing": 0.2}, EPOCH_3, f_an_ls(0.1)),
    "full_ls": ("full_ls", {"smoothing": 0.3}, EPOCH_3, f_an_ls(0.3)),
    "wan": ("wan", {}, EPOCH_3, f_wan(1 / 6)),
    "wan gamma": ("wan", {"gamma": 0.5}, EPOCH_3, f_wan(0.5)),
    "iu": ("iu", {}, EPOCH_3, over_entries(f_known)),
    "iun": ("iun", {}, EPOCH_3, lambda z, z0, _: over_entries(f_known)(z, z0, IUN_CODES)),
    "durand": ("durand", {}, EPOCH_3, f_durand(-4.45, 5.45, 1)),
    "durand other": ("durand", {"a": -1.0, "b": 3.0, "gamma": 2.0}, EPOCH_3, f_durand(-1, 3, 2)),
    "epr": ("epr", {"expected_positives": 2.9}, EPOCH_3, f_epr(2.9)),
    "epr penalty": ("epr", {"expected_positives": 1.5, "penalty": 4.0}, EPOCH_3, f_epr(1.5, 4)),
    "em": ("em", {}, EPOCH_3, f_em(0.1)),
    "em alpha": ("em", {"alpha": 0.2}, EPOCH_3, f_em(0.2)),
    "em_apl before": ("em_apl", {"alpha": 0.2}, EPOCH_3, f_em(0.2)),
    "asl": ("asl", {}, EPOCH_3, f_asl(0, 4, 0.05, False)),
    "asl attached": ("asl", {"focal_weight": "attached", "gamma_positive": 1.0}, EPOCH_3, f_asl(1, 4, 0.05, True)),
    "asl logits": (
        "asl",
        {"gamma_positive": 1.0, "gamma_negative": 2.0, "margin": 0.0, "log_form": "logits"},
        EPOCH_3,
        f_asl(1, 2, 0, False),
    ),
    "asl logits attached": (
        "asl",
        {"gamma_positive": 2.0, "gamma_negative": 3.0, "margin": 0.1, "log_form": "logits", "focal_weight": "attached"},
        EPOCH_3,
        f_asl(2, 3, 0.1, True),
    ),
    "asl as bce": ("asl", {"gamma_negative": 0.0, "margin": 0.0}, EPOCH_3, f_asl(0, 0, 0, False)),
    "asl as focal": (
        "asl",
        {"gamma_positive": 2.0, "gamma_negative": 2.0, "margin": 0.0, "focal_weight": "attached"},
        EPOCH_3,
        f_asl(2, 2, 0, True),
    ),
    "p_asl negative": (
        "p_asl",
        {"mode": "negative", "g_positive": 0.5, "a_unknown": 0.3, "a_negative": 2.0},
        EPOCH_3,
        f_p_asl(np.where(CODES == U, 0.3, np.where(CODES == N, 2.0, 1.0)), (0.5, 1, 4)),
    ),
    "p_asl ignore": ("p_asl", {"mode": "ignore"}, EPOCH_3, f_p_asl((CODES != U).astype(float), (0, 1, 4))),
    "p_asl normalized": (
        "p_asl",
        {"mode": "ignore_normalize_classes"},
        EPOCH_3,
        f_p_asl((CODES != U) * (1 / (1 + (CODES != U).sum(1, keepdims=True)) + 1), (0, 1, 4)),
    ),
    "splc first epoch": ("splc", {}, EPOCH_1, f_splc(0.6, False)),
    "splc": ("splc", {}, EPOCH_3, f_splc(0.6, True)),
    "splc tau": ("splc", {"tau": 0.9}, EPOCH_3, f_splc(0.9, True)),
    "hill": ("hill", {}, EPOCH_3, over_entries(f_hill, mean=False)),
    "hill mean": ("hill", {"reduction": "mean"}, EPOCH_3, over_entries(f_hill)),
    "gr": ("gr", {}, EPOCH_3, f_gr(0.4, -2, 0.59, 1.55)),
    "gr cub": (
        "gr",
        {"w_end": 10.0, "b_end": -8.0, "q3": 1.5},
        Progress(8, 8, 0, 1),
        f_gr(8.75, -7.25, 0.8, 0.5, q3=1.5),
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_loss_and_gradient(case: str) -> None:
    name, options, progress, formula = FORMULAS[case]
    logits = some_logits(*CODES.shape)
    loss, gradient = run(make(name, CODES, **options), logits, batch_of(CODES, truth=TRUTH), progress)
    z = logits.numpy()
    assert loss.item() == pytest.approx(formula(z, z, CODES), rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), numeric_gradient(formula, z, CODES), rtol=1e-6, atol=3e-9)


def test_every_baseline_has_a_formula() -> None:
    assert {name for name, *_ in FORMULAS.values()} | {"role"} == set(BASELINES)
