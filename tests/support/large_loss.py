"""Batches and steps in fp64 for the formulas of an, partial and the large losses."""

from __future__ import annotations

import numpy as np
import torch
import torch.multiprocessing

from spml_fast.core.batch import Batch
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import get_method

LARGE_LOSS = ("ll_r", "ll_ct", "ll_cp")


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
