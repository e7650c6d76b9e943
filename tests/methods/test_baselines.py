"""Baselines: golden values, values and gradients against formulas written anew, edges, ranks, state, schedules."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.cli.parse import parse_config
from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.methods import Method, Progress, get_method
from spml_fast.methods.an_ls import an_ls_point
from spml_fast.methods.asl import asl_point
from spml_fast.methods.em import em_point
from spml_fast.methods.em_apl import SoftLabels, apl_quota
from spml_fast.methods.epr import epr_point
from spml_fast.methods.gr import GROptions, gr_point, gr_schedule
from spml_fast.methods.hill import hill_point
from spml_fast.methods.p_asl import p_asl_point
from spml_fast.methods.splc import splc_point
from spml_fast.methods.state import sample_rows
from spml_fast.methods.wan import wan_point
from spml_fast.runs.recipe import build_parser, load_config, to_yaml

NEEDS_K = {"epr", "role"}
BASELINES = (
    "an_ls",
    "asl",
    "durand",
    "em",
    "em_apl",
    "epr",
    "full_ls",
    "gr",
    "hill",
    "iu",
    "iun",
    "p_asl",
    "role",
    "splc",
    "wan",
)
EPOCH_1 = Progress(1, 10, 0, 4, lr=0.01)
EPOCH_3 = Progress(3, 10, 8, 4, lr=0.01)
P, N, U = POSITIVE, NEGATIVE, UNKNOWN


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def nl(x: float) -> float:
    """-log with the guard of the Cole line."""
    return -math.log(x + 1e-5)


def some_codes(rows: int, classes: int, seed: int = 0, negatives: bool = True) -> np.ndarray:
    """Codes of all three kinds, several of each in every row."""
    rng = np.random.default_rng(seed)
    weights = [0.5, 0.25, 0.25] if negatives else [0.7, 0.0, 0.3]
    return rng.choice(np.array([U, N, P], np.int8), size=(rows, classes), p=weights)


def some_logits(rows: int, classes: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 100).normal(0, 2, (rows, classes)))


def make(name: str, codes: np.ndarray, **options: Any) -> Method:
    """A method on a store of these labels, in training mode."""
    cls = get_method(name)
    if name in NEEDS_K:
        options.setdefault("expected_positives", 1.7)
    torch.manual_seed(0)
    return cls(cls.Options(**{"name": name, **options}), LabelStore(SparseLabels.from_dense(codes)))


def batch_of(codes: np.ndarray, index: Any = None, size: int | None = None, truth: np.ndarray | None = None) -> Batch:
    """The batch of these rows of a label array."""
    rows = np.arange(len(codes)) if index is None else np.asarray(index)
    known = None if truth is None else torch.from_numpy(truth[rows])
    return Batch({}, torch.from_numpy(codes[rows]), torch.from_numpy(rows), size or len(rows), known)


def run(method: Method, logits: Tensor, batch: Batch, progress: Progress = EPOCH_3) -> tuple[Tensor, Tensor]:
    """Loss and its gradient."""
    z = logits.clone().requires_grad_()
    loss = method.loss(z, batch, progress).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


# --- One entry: the numbers of the specification ---------------------------------------------------------------------

POINTS = (-3.0, -0.5, 1.2, 4.0)
GUARD = 1e-5
GOLDEN = {
    "P EM": (
        em_point,
        P,
        (0.2, GUARD),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P EPR": (
        epr_point,
        P,
        (GUARD,),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P WAN": (
        wan_point,
        P,
        (1 / 19, GUARD),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P WAN logits": (
        wan_point,
        P,
        (1 / 19, 0.0),
        "3.0485874/-.95257413 .97407698/-.62245933 .26328247/-.23147522 .018149928/-.01798621",
    ),
    "P AN-LS": (
        an_ls_point,
        P,
        (0.1, GUARD),
        "2.7483966/-.85239344 .92405154/-.5224451 .38326644/-.13147583 .41808518/.081959387",
    ),
    "P ASL detached": (
        asl_point,
        P,
        (1.0, 4.0, 0.05, 1e-8, 0.0),
        "2.9040054/-.90739747 .60632331/-.38745562 .060943366/-.053580776 .00032644841/-.00032350375",
    ),
    "P ASL attached": (
        asl_point,
        P,
        (1.0, 4.0, 0.05, 1e-8, 1.0),
        "2.9040054/-1.0451225 .60632331/-.61636733 .060943366/-.10041726 .00032644841/-.00064408059",
    ),
    "P Hill": (
        hill_point,
        P,
        (1.5, 1.0, 2.0, 1.0),
        "3.8749072/-1.0863959 1.1372723/-.96142469 .1212125/-.22451939 .00010928332/-.00031487185",
    ),
    "P SPLC": (
        splc_point,
        P,
        (0.6, 1.0, 2.0, 1.0, 1.0),
        "3.8749072/-1.0863959 1.1372723/-.96142469 .1212125/-.22451939 .00010928332/-.00031487185",
    ),
    "P GR": (
        gr_point,
        P,
        (0.0, -2.0, 0.5, 2.0, 0.01, 1.0, 1e-7),
        "3.0485852/-.95257212 .97407672/-.62245917 .26328234/-.23147519 .018149826/-.017986208",
    ),
    "U AN": (
        an_ls_point,
        U,
        (0.0, GUARD),
        ".048576854/.047425375 .47406092/.3775346 1.4632393/.76849158 4.0175941/.98146811",
    ),
    "U AN logits": (
        an_ls_point,
        U,
        (0.0, 0.0),
        ".048587352/.047425873 .47407698/.37754067 1.4632825/.76852478 4.0181499/.98201379",
    ),
    "U WAN": (
        wan_point,
        U,
        (1 / 19, GUARD),
        ".0025566765/.0024960724 .024950575/.019870242 .077012593/.040446925 .21145232/.051656216",
    ),
    "U AN-LS": (
        an_ls_point,
        U,
        (0.1, GUARD),
        ".34855682/-.052554494 .52405988/.27753686 1.3432423/.6684952 3.6176487/.8815227",
    ),
    "U EM": (
        em_point,
        U,
        (0.2, GUARD),
        "-.038168994/-.027105996 -.13256546/-.023500371 -.10820655/.042694666 -.018014954/.014130164",
    ),
    "U ASL detached": (
        asl_point,
        U,
        (0.0, 4.0, 0.05, 1e-8, 0.0),
        "0/0 .0045671736/.0040222552 .33789925/.16845706 2.0285765/.19603146",
    ),
    "U ASL attached": (
        asl_point,
        U,
        (0.0, 4.0, 0.05, 1e-8, 1.0),
        "0/0 .0045671736/.017129669 .33789925/.50308935 2.0285765/.34980665",
    ),
    "N P-ASL": (
        p_asl_point,
        N,
        (1.0, 1.0, 1.0, 0.0, 1.0, 4.0, 0.0, 1e-8),
        ".0023042976/.0022492134 .17898334/.14253696 1.1245688/.59063034 3.9458786/.96435108",
    ),
    "U SPLC epoch 0": (
        splc_point,
        U,
        (0.6, 1.0, 2.0, 0.0, 1.0),
        ".00010928332/.00031487185 .067573491/.137937 .86425903/.85402315 3.8749072/1.0863959",
    ),
    "U SPLC epoch 1": (
        splc_point,
        U,
        (0.6, 1.0, 2.0, 1.0, 1.0),
        ".00010928332/.00031487185 .067573491/.137937 .014106879/-.034085594 5.8715697e-6/-1.7350531e-5",
    ),
    "U Hill": (
        hill_point,
        U,
        (1.5, 1.0, 2.0, 1.0),
        ".0032671493/.0061227918 .15999194/.16568023 .43203146/.094939296 .49952056/.00093591357",
    ),
    "U GR VOC": (
        gr_point,
        U,
        (0.0, -2.0, 0.5375, 1.8125, 0.01, 1.0, 1e-7),
        ".38534313/-.067823614 .44634426/.13299193 .70252708/.12812391 .84142911/.01301625",
    ),
    "U GR COCO": (
        gr_point,
        U,
        (8.75, -7.25, 0.8, 0.5, 0.01, 1.0, 1e-7),
        ".01630101/.01421829 .27205796/.15316388 .57950452/.025952072 .20378522/-.0099217978",
    ),
}


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_values(row: str) -> None:
    """spec/baselines.md 5, eight digits."""
    point, code, params, text = GOLDEN[row]
    want = np.array([[float(x) for x in pair.split("/")] for pair in text.split()])
    for kind, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        z = torch.tensor(POINTS, dtype=kind, requires_grad=True)
        loss = point(z, torch.full((4,), code, dtype=torch.int8), *params)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        # fp32 forms 1 - k and small differences of near-equal numbers; its error is absolute.
        floor = 1e-15 if kind == torch.float64 else 2e-7
        np.testing.assert_allclose(loss.detach().numpy(), want[:, 0], rtol=tolerance, atol=floor)
        np.testing.assert_allclose(gradient.numpy(), want[:, 1], rtol=tolerance, atol=floor)


def test_golden_soft_label() -> None:
    """EM + APL's row of the table: s = 0.03, beta = 0.9."""
    want = ((0.12471376, 0.015688273), (0.44015455, 0.31278175), (1.2845162, 0.6646434), (3.5078494, 0.85633604))
    codes = np.array([[P, U, U, U, U]], np.int8)
    method = make("em_apl", codes, alpha=0.2, beta=0.9)
    method.add(torch.zeros(4, dtype=torch.int64), torch.arange(1, 5), torch.full((4,), 0.03))
    logits = torch.tensor([[0.3, *POINTS]], dtype=torch.float64)
    loss, gradient = run(method, logits, batch_of(codes))
    positive = nl(sigmoid(0.3))
    assert loss.item() * 5 == pytest.approx(positive + sum(v for v, _ in want), rel=3e-8)
    np.testing.assert_allclose(gradient[0, 1:].numpy() * 5, [g for _, g in want], rtol=3e-7)


# --- Whole batches: formulas written anew ----------------------------------------------------------------------------
# A formula is a function of the logits z and of z0, the same logits where no gradient passes (weights, targets). Its
# gradient is a central difference in z alone.

Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


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


def f_known(z: float, _: float, y: int) -> float:
    return nl(sigmoid(z)) if y == 1 else nl(1 - sigmoid(z)) if y == 0 else 0.0


def f_em(alpha: float) -> Formula:
    def entry(z: float, z0: float, y: int) -> float:
        p = sigmoid(z)
        return f_known(z, z0, y) if y != -1 else -alpha * (p * nl(p) + (1 - p) * nl(1 - p))

    return over_entries(entry)


def f_epr(k: float, weight: float = 1.0) -> Formula:
    def total(z: np.ndarray, _: np.ndarray, codes: np.ndarray) -> float:
        found = sum(nl(sigmoid(a)) for a, y in zip(z.flat, codes.flat, strict=True) if y == 1) / z.size
        mean = sum(sigmoid(a) for a in z.flat) / len(z)
        return found + weight * (mean - k) ** 2 / z.shape[1] ** 2

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


def f_p_asl(weights: np.ndarray, exponents: tuple[float, float, float]) -> Formula:
    """Weights per entry, exponents of P, N, U; m = 0."""

    def total(z: np.ndarray, z0: np.ndarray, codes: np.ndarray) -> float:
        out = 0.0
        for a, a0, y, w in zip(z.flat, z0.flat, codes.flat, weights.flat, strict=True):
            p, q = sigmoid(a), sigmoid(a0)
            if y == 1:
                out += w * (1 - q) ** exponents[0] * -math.log(p)
            else:
                out += w * q ** exponents[1 if y == 0 else 2] * -math.log(1 - p)
        return out

    return total


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


CODES = some_codes(5, 7)
TRUTH = np.where(CODES == U, np.random.default_rng(7).integers(0, 2, CODES.shape), CODES).astype(np.int8)
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


def numeric_gradient(formula: Formula, z: np.ndarray, codes: np.ndarray, h: float = 1e-5) -> np.ndarray:
    out = np.zeros_like(z)
    for place in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[place] += h
        down[place] -= h
        out[place] = (formula(up, z, codes) - formula(down, z, codes)) / (2 * h)
    return out


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


def test_p_asl_selection() -> None:
    """The K B unknown entries of highest score go, and the classes whose prior is above eta."""
    codes = some_codes(6, 20)
    logits = some_logits(6, 20)
    method = make("p_asl", codes, top_k=2)
    weights = (codes != U) * 1.0
    unknown = sorted((float(z), i) for i, z in enumerate(logits.flatten()) if codes.flat[i] == U)
    for _, i in unknown[:-12]:
        weights.flat[i] = 1.0
    loss, gradient = run(method, logits, batch_of(codes))
    z = logits.numpy()
    formula = f_p_asl(weights, (0, 1, 4))
    assert loss.item() == pytest.approx(formula(z, z, codes), rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), numeric_gradient(formula, z, codes), rtol=1e-6, atol=1e-8)
    # The prior takes further entries; the 12 are still chosen among all unknown ones.
    method.given_prior = torch.linspace(0, 0.095, 20)
    weights[(codes == U) & (np.linspace(0, 0.095, 20) > 0.05)] = 0
    assert run(method, logits, batch_of(codes))[0].item() == pytest.approx(f_p_asl(weights, (0, 1, 4))(z, z, codes))


def test_p_asl_running_prior() -> None:
    """The mean sigmoid of all earlier training predictions; an evaluation does not count."""
    codes = some_codes(6, 5)
    method = make("p_asl", codes, prior="running", top_k=0, eta=0.5)
    first, second = some_logits(6, 5, 1), some_logits(6, 5, 2)
    run(method, first, batch_of(codes))
    np.testing.assert_allclose(method.class_prior(), torch.sigmoid(first).mean(0))
    prior = method.class_prior().numpy()
    assert (prior > 0.5).any() and (prior < 0.5).any()
    weights = np.where((codes == U) & (prior > 0.5), 0.0, 1.0)
    loss, _ = run(method, second, batch_of(codes))
    z = second.numpy()
    assert loss.item() == pytest.approx(f_p_asl(weights, (0, 1, 4))(z, z, codes))
    both = torch.sigmoid(torch.cat([first, second])).mean(0)
    np.testing.assert_allclose(method.class_prior(), both)
    method.eval()
    run(method, first, batch_of(codes))
    np.testing.assert_allclose(method.class_prior(), both)


def test_p_asl_prior_files(tmp_path: Any) -> None:
    """A run writes what the next one reads."""
    codes = some_codes(6, 5)
    path = tmp_path / "prior.txt"
    first = make("p_asl", codes, mode="ignore", prior_out=str(path))
    logits = some_logits(6, 5)
    run(first, logits, batch_of(codes))
    first.on_epoch_end(EPOCH_1)
    second = make("p_asl", codes, prior_file=str(path))
    np.testing.assert_allclose(second.class_prior(), torch.sigmoid(logits).mean(0), rtol=1e-6)
    path.write_text("cat,0.1\ndog,0.2\n")
    with pytest.raises(UserError, match=r"prior.txt has 2 priors, but the data have 5 classes"):
        make("p_asl", codes, prior_file=str(path))
    path.write_text("0.1\n\nx\n")
    with pytest.raises(UserError, match=r"prior.txt line 3: 'x'"):
        make("p_asl", codes, prior_file=str(path))


# --- Edges -----------------------------------------------------------------------------------------------------------

EDGE_CODES = {
    "no positives": np.array([[N, U, U, N], [U, U, N, U]], np.int8),
    "all unknown": np.full((2, 4), U, np.int8),
    "all positive": np.full((2, 4), P, np.int8),
    "one image": np.array([[P, U, N, U]], np.int8),
}


@pytest.mark.parametrize("edge", EDGE_CODES)
@pytest.mark.parametrize("name", BASELINES)
def test_edges_are_finite(name: str, edge: str) -> None:
    """Also at |logit| = 100, where p underflows in fp32; in both forms of the logarithm."""
    codes = EDGE_CODES[edge]
    forms = ("released", "logits") if hasattr(get_method(name).Options(), "log_form") else (None,)
    for form in forms:
        method = make(name, codes, **({"log_form": form} if form else {}))
        if name == "em_apl":
            method.add(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
        for logits in (torch.zeros(codes.shape), torch.tensor([100.0, -100, 100, -100]).expand(codes.shape)):
            loss, gradient = run(method, logits.contiguous(), batch_of(codes, truth=np.maximum(codes, 0)))
            assert torch.isfinite(loss) and torch.isfinite(gradient).all(), (form, loss, gradient)


@pytest.mark.parametrize("name", ["iu", "durand"])
def test_nothing_known_costs_nothing(name: str) -> None:
    loss, gradient = run(make(name, EDGE_CODES["all unknown"]), torch.randn(2, 4), batch_of(EDGE_CODES["all unknown"]))
    assert loss == 0 and (gradient == 0).all()


def test_logits_form_keeps_its_gradient() -> None:
    """Where the guarded form has lost it: that is what the option is for."""
    codes = np.array([[P, U]], np.int8)
    logits = torch.tensor([[-30.0, 30.0]], dtype=torch.float64)
    for name, other in (("wan", {"gamma": 1.0}), ("an_ls", {"smoothing": 0.0})):
        assert run(make(name, codes, **other), logits, batch_of(codes))[1].abs().max() < 1e-7
        exact = run(make(name, codes, log_form="logits", **other), logits, batch_of(codes))[1] * 2
        np.testing.assert_allclose(exact, [[-1, 1]], atol=1e-9)


def test_asl_costs_nothing_up_to_the_margin() -> None:
    """Exactly: value and gradient, attached weights included."""
    codes = np.full((1, 3), U, np.int8)
    logits = torch.tensor([[math.log(0.049 / 0.951), math.log(0.0499 / 0.9501), math.log(0.0501 / 0.9499)]])
    for weight in ("detached", "attached"):
        method = make("asl", codes, focal_weight=weight, gamma_negative=0.5)
        loss, gradient = run(method, logits, batch_of(codes))
        assert (gradient[0, :2] == 0).all() and gradient[0, 2] > 0 and loss > 0
        assert run(method, logits[:, :2], batch_of(codes[:, :2]))[0] == 0


def test_em_on_rows_without_positives_is_negative_and_reported() -> None:
    """Not mended: the loss is negative and pulls to p = 0.5."""
    codes = np.array([[U, U, U], [P, U, U]], np.int8)
    method = make("em", codes)
    out = method.loss(torch.zeros(2, 3), batch_of(codes), EPOCH_1)
    assert out.metrics["rows_without_positive_count"] == 1
    assert method.on_epoch_end(EPOCH_1)["classes_without_positives"] == 2
    empty = np.full((1, 3), U, np.int8)
    loss, gradient = run(make("em", empty), torch.tensor([[-2.0, 0.0, 2.0]]), batch_of(empty))
    assert loss < 0
    assert gradient[0, 0] < 0 and gradient[0, 1].abs() < 1e-7 and gradient[0, 2] > 0


# --- Schedules -------------------------------------------------------------------------------------------------------


def test_splc_corrects_from_the_second_epoch_on() -> None:
    codes = np.array([[P, U, U, N]], np.int8)
    # 0.59 and 0.61: tau lies between; the observed negative is never corrected.
    logits = torch.tensor([[2.0, math.log(0.59 / 0.41), math.log(0.61 / 0.39), 3.0]])
    method = make("splc", codes)
    truth = np.array([[P, N, P, N]], np.int8)
    for epoch, signs in ((1, [-1, 1, 1, 1]), (2, [-1, 1, -1, 1]), (30, [-1, 1, -1, 1])):
        out = method.loss(logits, batch_of(codes, truth=truth), Progress(epoch, 30, 0, 1))
        _, gradient = run(method, logits, batch_of(codes), Progress(epoch, 30, 0, 1))
        assert torch.sign(gradient)[0].tolist() == signs
        assert out.metrics["selected_count"] == out.metrics["selected_true_count"] == (epoch > 1)
        assert out.metrics["hidden_positive_count"] == 1
    late = make("splc", codes, change_epoch=3)
    assert [late.corrects(Progress(t, 9, 0, 1)) for t in (1, 3, 4)] == [False, False, True]


def test_gr_schedule() -> None:
    """(w, b) reach (E - 1)/E of the way, (mu, s) all of it; linear epochs stand at the start."""
    coco = GROptions(w_end=10.0, b_end=-8.0)
    assert gr_schedule(coco, Progress(1, 8, 0, 1)) == pytest.approx((0, -2, 0.5375, 1.8125))
    assert gr_schedule(coco, Progress(8, 8, 0, 1)) == pytest.approx((8.75, -7.25, 0.8, 0.5))
    assert gr_schedule(GROptions(), Progress(5, 8, 0, 1)) == pytest.approx((1, -2, 0.6875, 1.0625))
    for epoch in (1, 3):
        assert gr_schedule(coco, Progress(epoch, 3, 0, 1, phase="linear")) == (0, -2, 0.5, 2)


def test_apl_epochs() -> None:
    method = make("em_apl", CODES, warm_up=3)
    asked = [t for t in range(1, 9) if method.needs_train_scores(Progress(t, 8, 0, 1))]
    assert asked == [3, 4, 5, 6, 7]
    assert not method.needs_train_scores(Progress(3, 8, 0, 1, phase="linear"))
    assert not make("em_apl", CODES, warm_up=8).needs_train_scores(Progress(8, 8, 0, 1))


# --- Labels that do not suit -----------------------------------------------------------------------------------------


def check(name: str, codes: np.ndarray, default: int = UNKNOWN, **options: Any) -> None:
    cls = get_method(name)
    cls.check_labels(SparseLabels.from_dense(codes, default), cls.Options(**{"name": name, **options}))


def test_unsuitable_labels_and_options() -> None:
    single = some_codes(4, 5, negatives=False)
    for name, options in (
        ("iu", {}),
        ("iun", {}),
        ("durand", {}),
        ("p_asl", {"mode": "ignore"}),
        ("p_asl", {"prior": "running"}),
    ):
        with pytest.raises(UserError, match=f"method {name}.* no known negative"):
            check(name, single, **options)
        check(name, CODES, **options)
    check("p_asl", single)
    full = np.maximum(single, 0)
    check("iun", full, default=NEGATIVE)
    with pytest.raises(UserError, match="method full_ls needs every label"):
        check("full_ls", CODES)
    check("full_ls", full, default=NEGATIVE)
    for name in ("epr", "role"):
        with pytest.raises(UserError, match=r"expected_positives.*VOC 1\.5, COCO 2\.9, NUS-WIDE 1\.9, CUB 31\.4"):
            check(name, CODES)
        check(name, CODES, expected_positives=2.9)
    for name, option, value in (("em", "alpha", -1.0), ("an_ls", "smoothing", 2.0), ("gr", "q2", 0.0)):
        with pytest.raises(UserError, match=f"method.{option} is"):
            make(name, CODES, **{option: value})


def openimages_like() -> SparseLabels:
    """Nine million images, ten thousand classes, no labels; costs nothing to say."""
    indptr = np.broadcast_to(np.int64(0), 9_000_001)
    return SparseLabels(indptr, np.empty(0, np.int16), np.empty(0, np.int8), 9605, UNKNOWN)


def test_state_that_cannot_fit_is_refused() -> None:
    """One sentence with the need and the limit."""
    big = openimages_like()
    for name, need in (("role", "966.1"), ("em_apl", "2,028.8")):
        cls = get_method(name)
        options = cls.Options(name=name, **({"expected_positives": 2.0} if name == "role" else {}))
        with pytest.raises(UserError, match=rf"needs {need} GiB on every rank, and half of the free memory allows"):
            cls.check_labels(big, options)
        with pytest.raises(
            UserError, match=rf"needs {need} GiB on every rank, and method.memory_limit allows 100.0 GiB"
        ):
            cls.check_labels(big, replace(options, memory_limit=100.0))
        cls.check_labels(big, replace(options, memory_limit=3000.0))


# --- Ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """Threads that stand for ranks: the collectives of `spml_fast.core.distributed`, in lockstep."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.local = threading.local()
        self.barrier = threading.Barrier(world, timeout=30)
        self.box: list[Tensor] = [torch.empty(0)] * world
        monkeypatch.setattr(distributed, "world_size", lambda: self.world)
        monkeypatch.setattr(distributed, "rank", lambda: self.local.rank)
        monkeypatch.setattr(distributed, "all_gather_equal", self.gather)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda t: self.gather(t).sum(0, dtype=t.dtype))

    def gather(self, tensor: Tensor) -> Tensor:
        self.box[self.local.rank] = tensor.detach().clone()
        self.barrier.wait()
        assert len({t.shape for t in self.box}) == 1, "ranks gather unequal shapes"
        out = torch.stack(self.box)
        self.barrier.wait()
        return out

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on every rank at once."""
        results: list[Any] = [None] * self.world
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(r,)) for r in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


RANK_OPTIONS: dict[str, dict[str, Any]] = {"p_asl": {"prior": "running", "eta": 0.45, "top_k": 2}}


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("name", BASELINES)
def test_any_number_of_ranks_gives_the_same(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean of the ranks' losses and gradients, and the state after two steps, as on one rank."""
    codes = some_codes(rows, 6)
    truth = np.where(codes == U, 0, codes).astype(np.int8)
    logits = [some_logits(rows, 6, seed) for seed in (1, 2)]
    steps = [replace(EPOCH_3, update=8 + i) for i in range(2)]

    def train(parts: list[np.ndarray], rank: int) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]:
        method = make(name, codes, **RANK_OPTIONS.get(name, {}))
        if name == "em_apl":
            method.add(torch.tensor([1, 3]), torch.tensor([2, 5]), torch.tensor([0.1, 0.2]))
        batch = batch_of(codes, parts[rank], rows, truth)
        out = [run(method, z[parts[rank]], batch, step) for z, step in zip(logits, steps, strict=True)]
        return out, method.state_dict() | {"shard": method.rank_state()}

    alone, state = train([np.arange(rows)], 0)
    whole = state.pop("shard")
    parts = np.array_split(np.arange(rows), 2)
    ranks = Ranks(2, monkeypatch).run(lambda rank: train(parts, rank))
    for i, (loss, gradient) in enumerate(alone):
        torch.testing.assert_close(torch.stack([r[0][i][0] for r in ranks]).mean(), loss, rtol=1e-9, atol=1e-12)
        both = torch.cat([r[0][i][1] for r in ranks]) / 2
        # The table of ROLE is fp32.
        tolerance = 1e-8 if name == "role" else 1e-12
        torch.testing.assert_close(both, gradient, rtol=1e-9, atol=tolerance)
    for key, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(ranks[0][1][key], ranks[1][1][key]), f"{key} differs between ranks"
            torch.testing.assert_close(ranks[0][1][key], value, rtol=1e-5, atol=1e-7)
    for key, value in whole.items() if name == "role" else ():
        # Rank r has the rows of samples r, r + 2, ...
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][1]["shard"][key], value[rank::2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["epr", "role", "p_asl"])
def test_exact_accumulation(name: str) -> None:
    """Two micro-steps of 3 and 5 with the whole update's statistics: the gradient of one step of 8."""
    codes = some_codes(8, 6)
    logits = some_logits(8, 6)
    options: dict[str, Any] = {"reduction": "mean", "top_k": 1} if name == "p_asl" else {}
    whole, gradient = run(make(name, codes, **options), logits, batch_of(codes))
    method = make(name, codes, **options)
    batches = [batch_of(codes, range(3)), batch_of(codes, range(3, 8))]
    parts = list(logits.split([3, 5]))
    for batch, statistics in zip(batches, method.update_statistics(parts, batches, EPOCH_3), strict=True):
        batch.update_statistics = statistics
    found = [run(method, z, b) for z, b in zip(parts, batches, strict=True)]
    pieces = torch.cat([g * (len(g) / 8) for _, g in found])
    torch.testing.assert_close(pieces, gradient, rtol=1e-6, atol=1e-12)
    assert sum(loss * len(g) / 8 for loss, g in found).item() == pytest.approx(whole.item(), rel=1e-6)


# --- ROLE's table ----------------------------------------------------------------------------------------------------


def role_by_the_letter(table: Tensor, logits: Tensor, codes: Tensor, k: float) -> Tensor:
    """The loss with everything attached as published, for a table under autograd."""
    f, g = torch.sigmoid(logits), torch.sigmoid(table)

    def guarded(x: Tensor) -> Tensor:
        return -torch.log(x + 1e-5)

    def epr(x: Tensor) -> Tensor:
        return (guarded(x) * (codes == 1)).mean() + (x.sum(1).mean() - k) ** 2 / x.shape[1] ** 2

    def cross(x: Tensor, target: Tensor) -> Tensor:
        return (target * guarded(x) + (1 - target) * guarded(1 - x)).mean()

    return (epr(f) + cross(f, g.detach())) / 2 + (epr(g) + cross(g, f.detach())) / 2


class DenseRole:
    """ROLE as released: the whole table a parameter under torch's dense Adam, all rows moved in every step."""

    def __init__(self, table: Tensor, codes: np.ndarray, k: float) -> None:
        self.table = table.double().clone().requires_grad_()
        self.codes, self.k = torch.from_numpy(codes), k
        self.adam = torch.optim.Adam([self.table])

    def step(self, index: np.ndarray, logits: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        z = logits.clone().requires_grad_()
        loss = role_by_the_letter(self.table[index], z, self.codes[index], self.k)
        self.adam.zero_grad()
        loss.backward()
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        return loss.detach(), z.grad


def role_schedule(samples: int, size: int, epochs: int, classes: int) -> list[tuple[np.ndarray, Tensor, Progress]]:
    """Batches in a new order each epoch, with a learning rate that rises and falls."""
    rng = np.random.default_rng(5)
    per_epoch = -(-samples // size)
    out = []
    for epoch in range(1, epochs + 1):
        for update, index in enumerate(np.array_split(rng.permutation(samples), per_epoch)):
            done = (epoch - 1) * per_epoch + update
            lr = 0.02 * math.sin(math.pi * (done + 1) / (epochs * per_epoch + 1))
            logits = torch.from_numpy(rng.normal(0, 2, (len(index), classes)))
            out.append((index, logits, Progress(epoch, epochs, done, per_epoch, lr=lr)))
    return out


def test_role_follows_dense_adam() -> None:
    """Loss, gradient and all label estimates equal the released way's, though only met rows are touched."""
    codes = some_codes(40, 6)
    method = make("role", codes, expected_positives=2.0)
    dense = DenseRole(method.table.value[:-1], codes, 2.0)
    start = method.estimates(torch.arange(40)).double()
    for index, logits, progress in role_schedule(40, 6, 12, 6):
        if progress.update % progress.updates_per_epoch == 0:
            method.on_epoch_start(progress)
        loss, gradient = run(method, logits, batch_of(codes, index), progress)
        want_loss, want_gradient = dense.step(index, logits, 10 * progress.lr)
        assert loss.item() == pytest.approx(want_loss.item(), rel=2e-5)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=2e-6)
    found = method.estimates(torch.arange(40)).double()
    want = torch.sigmoid(dense.table.detach())
    assert (want - start).abs().max() > 0.2, "the test moves too little to tell"
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_role_table_at_the_start() -> None:
    codes = some_codes(300, 6)
    method = make("role", codes)
    p = method.estimates(torch.arange(300)).numpy()
    np.testing.assert_allclose(p[codes == P], 0.995, rtol=1e-5)
    np.testing.assert_allclose(p[codes == N], 0.005, rtol=1e-4)
    free = p[codes == U]
    assert free.min() >= 0.4 and free.max() <= 0.6 and free.std() > 0.05 and abs(free.mean() - 0.5) < 0.01
    # Equal on all ranks whatever was drawn before: it follows the seed alone.
    torch.manual_seed(3)
    one = get_method("role")(method.options, method.store)
    torch.manual_seed(3)
    torch.rand(11)
    two = get_method("role")(method.options, method.store)
    assert torch.equal(one.table.value, two.table.value)
    assert not torch.equal(one.table.value, method.table.value)


def test_role_new_phase_keeps_estimates_and_forgets_momentum() -> None:
    codes = some_codes(12, 4)
    method = make("role", codes, table_lr_multiplier=3000.0)
    for index, logits, progress in role_schedule(12, 4, 3, 4):
        if progress.update % progress.updates_per_epoch == 0:
            method.on_epoch_start(replace(progress, phase="linear"))
        run(method, logits, batch_of(codes, index), progress)
    before = method.estimates(torch.arange(12))
    assert before.max() > 1 - 1e-5 or before.min() < 1e-5, "the clamp has nothing to do"
    method.on_epoch_start(Progress(1, 5, 0, 3))
    after = method.estimates(torch.arange(12))
    torch.testing.assert_close(after, before.clamp(1e-5, 1 - 1e-5), rtol=1e-3, atol=1e-7)
    assert method.table.first.abs().sum() == 0 and method.table.second.sum() == 0 and method.table.done == 0
    assert len(method.table.rates) >= 16


@pytest.mark.parametrize("samples", [4, 6])
def test_rows_of_another_number_of_samples_are_refused(samples: int) -> None:
    shards = [torch.arange(3), torch.arange(2)]
    assert sample_rows.reshard(shards, 5).tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(UserError, match=f"a row for each of 5 images, but the training split has {samples};"):
        sample_rows.reshard(shards, samples)


def test_role_evaluation_leaves_the_table_alone() -> None:
    method = make("role", CODES).eval()
    before = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    run(method, some_logits(*CODES.shape), batch_of(CODES))
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items() if isinstance(v, Tensor))


@pytest.mark.parametrize("worlds", [(1, 3), (3, 2)])
def test_role_goes_on_with_another_number_of_ranks(worlds: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    codes = some_codes(11, 4)

    def begin(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        method = make("role", codes)
        method.table.value += torch.arange(len(method.table.value))[:, None] * 0.01
        return method.rank_state(), method.estimates(torch.arange(11))

    saved = Ranks(worlds[0], monkeypatch).run(begin)

    def resume(rank: int) -> Tensor:
        method = make("role", codes)
        method.load_rank_state([shard for shard, _ in saved])
        return method.estimates(torch.arange(11))

    for found in Ranks(worlds[1], monkeypatch).run(resume):
        assert torch.equal(found, saved[0][1])


# --- APL's pseudo-labels ---------------------------------------------------------------------------------------------


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

    results = Ranks(world, monkeypatch).run(work) if world > 1 else [work(0)]
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

    for found in Ranks(2, monkeypatch).run(reload):
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-6)


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


def test_soft_labels_of_many_classes() -> None:
    """Class ids beyond 32,767 need 4 bytes, and merging keeps every entry."""
    soft = SoftLabels(3, 40_000, torch.device("cpu"))
    soft.add(torch.tensor([2, 0]), torch.tensor([39_999, 5]), torch.tensor([0.5, 0.25]))
    soft.add(torch.tensor([2]), torch.tensor([7]), torch.tensor([0.125]))
    rows = soft.rows(torch.tensor([2, 1, 0]))
    assert rows[0, 39_999] == 0.5 and rows[0, 7] == 0.125 and rows[2, 5] == 0.25
    assert (~rows.isnan()).sum() == 3 and len(soft) == 3 and soft.max_row == 2


# --- State -----------------------------------------------------------------------------------------------------------


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", BASELINES)
def test_state_survives_a_checkpoint(name: str) -> None:
    """A run that is cut within an epoch goes on bit for bit; the state loads strictly into a fresh method."""
    codes = some_codes(24, 6)
    truth = np.maximum(codes, 0)
    plan = role_schedule(24, 7, 4, 6)
    options: dict[str, Any] = {"em_apl": {"warm_up": 1}, "p_asl": {"prior": "running", "top_k": 1, "eta": 0.5}}.get(
        name, {}
    )

    def go(method: Method, steps: list[tuple[np.ndarray, Tensor, Progress]], starts: bool) -> list[Tensor]:
        losses = []
        for i, (index, logits, progress) in enumerate(steps):
            within = progress.update % progress.updates_per_epoch
            if within == 0 or (i == 0 and starts):
                method.on_epoch_start(progress)
            losses.append(run(method, logits, batch_of(codes, index, truth=truth), progress)[0])
            if within == progress.updates_per_epoch - 1:
                end = replace(progress, update=progress.update + 1)
                if method.needs_train_scores(end):
                    scores = some_logits(24, 6, progress.epoch)
                    method.on_train_scores(torch.arange(24), scores.float())
                method.on_epoch_end(end)
        return losses

    whole = make(name, codes, **options)
    losses = go(whole, plan, True)
    cut = 10
    first = make(name, codes, **options)
    go(first, plan[:cut], True)
    state, shard = copied(first.state_dict()), copied(first.rank_state())
    torch.manual_seed(99)
    second = get_method(name)(first.options, first.store)
    second.load_state_dict(state)
    if shard:
        second.load_rank_state([shard])
    assert go(second, plan[cut:], True) == losses[cut:]
    before, after = whole.state_dict() | whole.rank_state(), second.state_dict() | second.rank_state()
    assert before.keys() == after.keys()
    for key in before:
        if isinstance(before[key], Tensor):
            assert torch.equal(before[key], after[key]), key
    if name == "em_apl":
        assert whole.total == second.total > 20
    if name in ("role", "em_apl", "p_asl"):
        fresh = make(name, codes, **options)
        assert go(fresh, plan[cut:], True) != losses[cut:], "the state makes no difference: the test tells nothing"


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_options_have_help_and_travel_through_yaml(name: str, tmp_path: Any) -> None:
    helps = {action.dest: action.help for action in build_parser(name)._actions}
    for field in get_method(name).Options.__dataclass_fields__:
        assert helps[f"method.{field}"], f"--method.{field} has no help"
    config = parse_config(["--method", name, "--data.dir", "x"])
    assert config.method.name == name and type(config.method) is get_method(name).Options
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path).method == config.method
