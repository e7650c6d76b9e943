"""Label arrays, methods and steps for tests that write a loss out again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.methods import Method, Progress, get_method

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


def make(name: str, codes: np.ndarray, **options: Any) -> Method[Any, Any]:
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


def run(method: Method[Any, Any], logits: Tensor, batch: Batch, progress: Progress = EPOCH_3) -> tuple[Tensor, Tensor]:
    """Loss and its gradient."""
    z = logits.clone().requires_grad_()
    loss = method.loss(z, batch, progress).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


CODES = some_codes(5, 7)
TRUTH = np.where(CODES == U, np.random.default_rng(7).integers(0, 2, CODES.shape), CODES).astype(np.int8)
Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def numeric_gradient(formula: Formula, z: np.ndarray, codes: np.ndarray, h: float = 1e-5) -> np.ndarray:
    out = np.zeros_like(z)
    for place in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[place] += h
        down[place] -= h
        out[place] = (formula(up, z, codes) - formula(down, z, codes)) / (2 * h)
    return out


def f_known(z: float, _: float, y: int) -> float:
    return nl(sigmoid(z)) if y == 1 else nl(1 - sigmoid(z)) if y == 0 else 0.0


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
