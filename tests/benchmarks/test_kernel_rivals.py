"""What the fused ops are timed against must be right, and as good as somebody who knows would write it."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from spml_kernels.devtools.counting import count, total

from benchmarks import kernel_rivals
from benchmarks.kernel_base import Compiled, KernelWork, make_call
from benchmarks.kernel_gate import exact_results, gate
from benchmarks.kernel_losses import (
    ignore_loss_work,
    ignore_statistics_work,
    label_loss_work,
    label_rows_work,
    large_loss_work,
)
from benchmarks.kernel_maps import cam_mask_work, cam_work
from benchmarks.kernel_rivals import cam_image_chunks, images_per_chunk
from spml_fast.methods.assume_negative import AssumeNegative

WORKS = [
    cam_work(6, 5, 8, 70, torch.float32),
    cam_work(6, 5, 40, 70, torch.bfloat16),
    cam_work(3, 4, 8, 9, torch.float16),
    label_loss_work(5, 7, AssumeNegative.point, ()),
    large_loss_work(50, 70, 35),
    large_loss_work(50, 70, 35, listed=False),
    ignore_statistics_work(5, 7),
    ignore_loss_work(5, 7),
    label_rows_work(5, 30, samples=50),
    cam_mask_work(3, 6, 40, 7, 50, 1, torch.float32),
]
RIVALS = [(work, name) for work in WORKS for name in work.providers if name not in ("fused", "matmul")]


def uncompiled(work: KernelWork) -> KernelWork:
    """The same without the compiler, which takes minutes and is PyTorch's own."""
    plain = {n: c.function if isinstance(c, Compiled) else c for n, c in work.providers.items()}
    return dataclasses.replace(work, providers=plain)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


@pytest.mark.parametrize(("work", "name"), RIVALS, ids=lambda v: v.name.replace(" ", "_") if hasattr(v, "op") else v)
def test_values_and_gradients_are_those_of_fp64(work, name):
    if name == "compile_chunks":
        # Its two compiled parts are the functions of `eager_chunks`.
        with mock.patch.object(kernel_rivals, "compiled", lambda function: function):
            work = dataclasses.replace(work, providers={name: cam_image_chunks(True)})
    assert gate(uncompiled(work), work.inputs("cpu"), name) <= work.tolerance


def test_every_op_has_eager_and_compiled_rivals():
    for work in WORKS:
        assert {"eager", "compile"} < set(work.providers)
        modes = {c.mode for c in work.providers.values() if isinstance(c, Compiled)}
        assert modes == ({"default"} if work.op == "cam_pool" else {"default", "reduce-overhead"})
        # Whose backward alone cannot be replayed.
        assert ("compile_graphs", "bwd") not in work.rows and ("compile", work.main_mode) in work.rows
    assert {"eager_pooled", "eager_chunks", "compile_pooled", "compile_chunks"} < set(WORKS[0].providers)
    assert {"eager_lean", "compile_lean"} < set(WORKS[4].providers)
    large, small = (cam_work(128, 14, 2048, classes, torch.bfloat16).providers for classes in (5000, 80))
    tuned = large["compile_tuned"]
    assert isinstance(tuned, Compiled) and tuned.mode == "max-autotune-no-cudagraphs" and "compile_tuned" not in small
    assert tuned.function is large["eager"]


def test_a_rival_that_is_wrong_is_noticed():
    work = uncompiled(WORKS[0])
    inputs = work.inputs("cpu")
    exact = exact_results(work, inputs)
    right = work.providers["eager"]
    work.providers["eager"] = lambda *t: (right(*t)[0], right(*t)[1] * 1.001)
    with pytest.raises(AssertionError, match="result 1 is off by"):
        gate(work, inputs, "eager", exact)


def read(work: KernelWork, name: str, mode: str) -> int:
    return total(count(make_call(uncompiled(work), name, mode, work.inputs("meta")))).least


def test_the_plain_form_reads_the_features_once_and_the_pooled_one_twice():
    """At 80 classes the features are nearly all there is to read; backward, two products read or write them."""
    work = cam_work(128, 14, 2048, 80, torch.bfloat16)
    features = 128 * 196 * 2048 * 2
    once, twice = (read(work, name, "fwd") for name in ("eager", "eager_pooled"))
    assert features < once < 1.3 * features and 2 * features < twice < 2.3 * features
    step = read(work, "eager", "step")
    assert 3 * features < step < 4.1 * features and read(work, "eager_pooled", "step") > 5 * features


def test_chunks_of_images_keep_no_wide_map_and_no_sum_over_all_features():
    """The weights' gradient in fp32 is the largest thing that is written; chunks of classes move far more."""
    work = cam_work(128, 14, 2048, 5000, torch.bfloat16)
    chunks = -(-128 // images_per_chunk(128, 196, 5000, 2))
    assert chunks == 11
    launches = count(make_call(uncompiled(work), "eager_chunks", "step", work.inputs("meta")))
    assert max(launch.moved.written for launch in launches if launch.moved is not None) == 4 * 5000 * 2048
    assert kernel_rivals.CACHE_BYTES > 12 * 196 * 5000 * 2
    shipped = total(count(make_call(uncompiled(work), "chunked", "step", work.inputs("meta")))).least
    assert total(launches).least < 0.75 * shipped


def test_images_of_a_chunk():
    assert images_per_chunk(128, 196, 5000, 2) == 12 and images_per_chunk(128, 196, 20, 2) == 128
    assert images_per_chunk(1, 1024, 9605, 4) == images_per_chunk(8, 10**4, 10**4, 4) == 1


def test_signs_of_the_inputs():
    """One cell in a hundred is positive in both sparse forms; Zipf's classes are neighbours, and some in no image."""
    for signs, empty in (("sparse", 0), ("zipf", 100)):
        work = cam_work(128, 4, 64, 500, torch.float32, signs)
        features, weight, bias = work.inputs("cpu")
        positive = features.flatten(1, 2) @ weight.T + bias > 0
        assert 0.005 < float(positive.float().mean()) < 0.015
        images = positive.any(1).float().mean(0)
        assert int((images == 0).sum()) >= empty
        if signs == "zipf":
            first, last = images[:10], images[-100:]
            assert len(first.unique()) == 1 and float(first[0]) > 0.15 and float(last.max()) < 0.02
        else:
            assert float(images.max()) < 0.03
