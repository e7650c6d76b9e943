"""Batches and steps in fp64 for the formulas of an, partial and the large losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import LossOutput, Method, Progress, get_method

LARGE_LOSS = ("ll_r", "ll_ct", "ll_cp")


def double_batch(rows: int = 6, width: int = 9, seed: int = 0, unknown: float = 0.6) -> tuple[Tensor, Tensor]:
    """fp64 logits that want a gradient, and codes."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(size=(rows, width)) * 3).requires_grad_()
    codes = generator.integers(0, 2, (rows, width))
    codes[generator.random((rows, width)) < unknown] = -1
    return logits, torch.from_numpy(codes.astype(np.int8))


def make(name: str, labels: SparseLabels | None = None, **options: object) -> Method[Any, Any]:
    """A method on a store of these labels; all unknown without any."""
    labels = labels or SparseLabels.from_dense(np.full((40, 9), -1, np.int8))
    method_class = get_method(name)
    return method_class(method_class.Options(name=name, **options), LabelStore(labels))


def run(
    method: Method[Any, Any],
    logits: Tensor,
    codes: Tensor,
    progress: Progress,
    index: Tensor | None = None,
    statistics: object = None,
    global_size: int | None = None,
) -> tuple[LossOutput, Tensor]:
    """What the loss gives, and its gradient for the logits."""
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


def cross_entropy(logits: Tensor, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss and derivative of each entry, from the definition."""
    z = logits.detach().numpy()
    p = 1 / (1 + np.exp(-z))
    return -np.where(target, np.log(p), np.log(1 - p)), p - target
