"""A training compiles each kernel once: what changes between epochs, or in a last short batch, is no new variant."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import torch
from spml_kernels.common.jit import HAVE_TRITON

if not HAVE_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, not interpreting", allow_module_level=True)

import spml_kernels
from spml_kernels.common import heuristics
from spml_kernels.common.heuristics import CAM_POOL_WAYS
from spml_kernels.devtools.counting import Launch, count

from spml_fast.methods import get_method

CLASSES = 80
# Batches of an epoch: whole ones and what is left over at its end, with and without a multiple of 16.
BATCHES = (128, 112, 49, 1)


def variant(launch: Launch) -> tuple[Any, ...]:
    """What Triton looks a compiled kernel up by: types, what it specialises on, and constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    bound, kinds, options = bind(**launch.arguments)
    constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
    # Block sizes are chosen from the number of entries; a different one is a different kernel, and is meant to be.
    return str(kinds), str(sorted(constants.items(), key=str)), str(sorted(options.items()))


def draw(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.empty(rows, CLASSES, device="meta", dtype=dtype, requires_grad=True)
    return logits, torch.empty(rows, CLASSES, device="meta", dtype=torch.int8)


def variants(launches: list[Launch]) -> dict[str, set[tuple[Any, ...]]]:
    found: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for launch in launches:
        if launch.kernel is not None:
            found[launch.name].add(variant(launch))
    assert found
    return found


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPML_KERNELS", "triton")


@pytest.mark.parametrize("rows", [128, 512])
def test_twenty_epochs_of_more_and_more_rejected_labels(rows):
    def epochs() -> None:
        logits, codes = draw(rows)
        k = torch.empty((), dtype=torch.int64, device="meta")
        # 0.2% of the labels more each epoch, as LL-R has it; 1, multiples of 16 and others are among them.
        for limit in (1, *(16 * epoch + epoch % 3 for epoch in range(1, 20))):
            spml_kernels.large_loss_step(logits, codes, k, k_max=limit, scheme="correct")
            spml_kernels.large_loss_step(logits, codes, k, k_max=limit, scheme="reject").loss.backward()

    for name, found in variants(count(epochs)).items():
        # The two schemes, and three digits of the radix select.
        assert len(found) <= {"_large_histogram_kernel": 3}.get(name, 2), name


@pytest.mark.parametrize("rows", [1024, 1041])
def test_short_batches_of_losses(rows):
    """80 classes: every number of images makes a multiple of 16 entries, for which loads are wide."""

    def batches() -> None:
        for number in (rows, rows - 7, rows - 160):
            logits, codes = draw(number)
            spml_kernels.label_loss(logits, codes, get_method("an").point).backward()
            spml_kernels.ignore_statistics(logits, logits.detach(), codes)
            guard = torch.empty(3, device="meta")
            spml_kernels.ignore_loss(logits, None, logits.detach(), codes, torch.empty((), device="meta"), guard)

    for name, found in variants(count(batches)).items():
        assert len(found) == 1, name


@pytest.mark.parametrize("way", CAM_POOL_WAYS)
def test_short_batches_of_maps(way, monkeypatch):
    """Forward and backward, one chunk of cells or several: all kernels of a way."""
    monkeypatch.setenv("SPML_CAM_POOL", way)
    monkeypatch.setattr(heuristics, "SMALL_BYTES", 1)
    monkeypatch.setattr(heuristics, "CHUNK_BYTES", 256 << 10)

    def batches() -> None:
        for rows in BATCHES:
            features = torch.empty(rows, 7, 7, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
            weight, bias = torch.empty(CLASSES, 64, device="meta"), torch.empty(CLASSES, device="meta")
            means = spml_kernels.cam_pool(features, weight.requires_grad_(), bias.requires_grad_())
            torch.autograd.grad(sum(mean.sum() for mean in means), (features, weight, bias))

    launches = [launch for launch in count(batches) if launch.kernel is not None]
    first = {"tile": "fwd", "persistent": "persistent", "vendor": "reduce"}[way]
    found = variants(launches)
    assert set(found) == {f"_cam_pool_{name}_kernel" for name in (first, "finish", "expand")}
    assert len(launches) > 3 * len(BATCHES) and all(len(kinds) == 1 for kinds in found.values()), found


def test_short_batches_of_the_backward_that_leaves_classes_out(monkeypatch):
    monkeypatch.setenv("SPML_CAM_POOL_BACKWARD", "sparse")
    monkeypatch.setattr(heuristics, "SPARSE_LINES", 16)

    def batches() -> None:
        for rows in BATCHES:
            features = torch.empty(rows, 7, 7, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
            weight, bias = torch.empty(CLASSES, 64, device="meta"), torch.empty(CLASSES, device="meta")
            means = spml_kernels.cam_pool(features, weight.requires_grad_(), bias.requires_grad_())
            torch.autograd.grad(sum(mean.sum() for mean in means), (features, weight, bias))

    found = variants(count(batches))
    names = {f"_cam_pool_{name}_kernel" for name in ("count", "list", "lines", "sparse_x", "sparse_w")}
    assert names < set(found) and all(len(found[name]) == 1 for name in names), found


def test_short_batches_of_masked_images():
    def batches() -> None:
        for rows in BATCHES:
            head = (torch.empty(*shape, device="meta") for shape in ((rows, 7, 7, 64), (CLASSES, 64), (CLASSES,)))
            ids = torch.empty(rows, 1, dtype=torch.int64, device="meta")
            spml_kernels.cam_mask(*head, ids, torch.empty(rows, 3, 64, 64, device="meta"), 0.5)

    assert all(len(kinds) == 1 for kinds in variants(count(batches)).values())
