"""Augmentation parameters: pure functions of seed, epoch and sample, distributed as torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandAugment, RandomResizedCrop

from spml_fast.data import augment

N = 40_000
INDEX = np.arange(N)


def _everything(seed, epoch, index):
    index = np.asarray(index)
    width, height = 200 + index % 300, 150 + index % 400
    ops, signs = augment.randaugment_choice(seed, epoch, index, 3)
    return [
        augment.flips(seed, epoch, index, "weak", 0.5),
        augment.flips(seed, epoch, index, "strong", 0.5),
        ops,
        signs,
        augment.randaugment_matrices(ops[:, 0], signs[:, 0], 7, width, height),
        augment.crop_boxes(seed, epoch, index, width, height, 0.3),
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), parts=st.integers(1, 7), shuffle=st.integers(0, 9))
def test_parameters_do_not_depend_on_the_batch(seed, epoch, parts, shuffle):
    index = np.random.default_rng(shuffle).permutation(60)
    whole = _everything(seed, epoch, np.arange(60))
    for part in np.array_split(index, parts):
        for ours, theirs in zip(_everything(seed, epoch, part), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs[part])


def test_uniform_is_uniform_and_streams_are_independent():
    draws = {
        "base": augment.uniform(1, 1, INDEX, 0),
        "stream": augment.uniform(1, 1, INDEX, 1),
        "draw": augment.uniform(1, 1, INDEX, 0, 1),
        "epoch": augment.uniform(1, 2, INDEX, 0),
        "seed": augment.uniform(2, 1, INDEX, 0),
        "next index": augment.uniform(1, 1, INDEX + 1, 0),
        "far index": augment.uniform(1, 1, INDEX + 10**12, 0),
    }
    bound = 4.5 / np.sqrt(N)
    for name, values in draws.items():
        assert values.min() >= 0 and values.max() < 1
        assert abs(values.mean() - 0.5) < bound * np.sqrt(1 / 12), name
        counts = np.bincount((values * 64).astype(int), minlength=64)
        assert ((counts - N / 64) ** 2 / (N / 64)).sum() < 63 + 5 * np.sqrt(126), name
    names = list(draws)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert abs(np.corrcoef(draws[a], draws[b])[0, 1]) < bound, (a, b)


def test_flips_and_operations_are_fair():
    bound = 4.5 / np.sqrt(N)
    weak, strong = (augment.flips(0, 3, INDEX, view, 0.5) for view in ("weak", "strong"))
    assert abs(weak.mean() - 0.5) < bound / 2 and abs(strong.mean() - 0.5) < bound / 2
    assert abs((weak & strong).mean() - 0.25) < bound / 2
    assert not augment.flips(0, 3, INDEX, "weak", 0.0).any() and augment.flips(0, 3, INDEX, "weak", 1.0).all()
    ops, signs = augment.randaugment_choice(0, 3, INDEX, 3)
    assert ops.dtype == signs.dtype == np.int32 and ops.shape == signs.shape == (N, 3)
    counts = np.stack([np.bincount(ops[:, k], minlength=14) for k in range(3)])
    assert abs(counts / N - 1 / 14).max() < bound * np.sqrt(1 / 14)
    pairs = np.bincount(ops[:, 0] * 14 + ops[:, 1], minlength=196)
    assert ((pairs - N / 196) ** 2 / (N / 196)).sum() < 195 + 5 * np.sqrt(390)
    space = RandAugment()._augmentation_space(31, (10, 10))
    assert tuple(space) == augment.RANDAUGMENT_OPS
    for op, name in enumerate(augment.RANDAUGMENT_OPS):
        negative = (signs[ops == op] == -1).mean()
        assert abs(negative - 0.5) < 0.03 if space[name][1] else negative == 0
    none, _ = augment.randaugment_choice(0, 3, INDEX[:5], 0)
    assert none.shape == (5, 0)


def test_magnitudes_are_torchvisions():
    sides = np.arange(1, 1200)
    one = np.ones(1, np.int32)
    for magnitude in range(31):
        space = RandAugment()._augmentation_space(31, (100, 100))
        shift = augment.randaugment_matrices(np.full(len(sides), 3), np.ones_like(sides), magnitude, sides, sides)
        if magnitude in (1, 5, 9, 15, 30):
            expected = [int(torch.linspace(0.0, 150.0 / 331.0 * int(s), 31)[magnitude]) for s in sides]
            np.testing.assert_array_equal(-shift[:, 0, 2], expected)
        assert augment.randaugment_factor(magnitude, one)[0] == pytest.approx(1 + float(space["Color"][0][magnitude]))
        assert augment.posterize_mask(magnitude) == 256 - 2 ** (8 - int(space["Posterize"][0][magnitude]))
        threshold = float(space["Solarize"][0][magnitude])
        assert [v < threshold for v in range(256)] == [v < augment.solarize_threshold(magnitude) for v in range(256)]


def test_crops_are_distributed_as_torchvisions():
    n, scale = 4000, 0.25
    for width, height in ((320, 240), (90, 400)):
        boxes = augment.crop_boxes(0, 1, INDEX[:n], np.full(n, width), np.full(n, height), scale)
        top, left, tall, wide = boxes.T
        assert (top >= 0).all() and (left >= 0).all() and (tall > 0).all() and (wide > 0).all()
        assert (top + tall <= height).all() and (left + wide <= width).all()
        torch.manual_seed(0)
        blank = torch.zeros(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(blank, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
        for ours, reference in zip(boxes.T, theirs.T, strict=True):
            spread = reference.std() + 1e-9
            assert abs(ours.mean() - reference.mean()) < 5 * spread / np.sqrt(n) + 1e-6
            assert ours.std() == pytest.approx(reference.std(), rel=0.1, abs=1e-6)
    # One pixel has one box.
    assert augment.crop_boxes(0, 0, [0], [1], [1], 0.1).tolist() == [[0, 0, 1, 1]]
