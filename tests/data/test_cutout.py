"""Cutout, and RandAugment of the only view: the views against squares painted by hand, and against the strong view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spml_fast.core.batch import MicroBatch
from spml_fast.core.errors import UserError
from spml_fast.data import augment
from spml_fast.data.manifest import Manifest
from tests.support.loading import data_config, train_loader

SIDE = 64


def first_batch(data: Path, views: tuple[str, ...] = ("weak",), **options: object) -> MicroBatch:
    """Digit scenes in their own size, not mirrored."""
    config = data_config(image_size=SIDE, hflip=0.0, **options)
    return next(iter(train_loader(Manifest(data).split("train"), config, views=views, batch_size=24).epoch(1)))[0]


def test_squares() -> None:
    """Half the side where the centre is far enough from the border; all over the image, in all colours."""
    index = np.arange(4000)
    start, shape, colour = augment.cutouts(3, 1, index, 100, 0.5)
    whole = (shape == 50).all(1)
    assert shape.max() == 50 and shape.min() >= 25 and (start >= 0).all() and (start + shape <= 100).all()
    # A centre in the middle half of both axes leaves the square whole: 51 of 100 places of each.
    assert whole.mean() == pytest.approx(0.51**2, abs=0.03)
    centre = np.where(start > 0, start + 25, start + shape - 25)
    assert centre.min() == 0 and centre.max() == 99 and centre.mean() == pytest.approx(49.5, abs=1.5)
    assert colour.min() == 0 and colour.max() == 255 and (colour == colour.round()).all()
    assert all(
        np.array_equal(a, b[[7, 5]])
        for a, b in zip(augment.cutouts(3, 1, [7, 5], 100, 0.5), (start, shape, colour), strict=True)
    )
    assert not np.array_equal(augment.cutouts(3, 2, index, 100, 0.5)[0], start)


def test_views_have_the_squares(small_digits: Path) -> None:
    plain, covered = first_batch(small_digits), first_batch(small_digits, cutout=0.5)
    expected = plain.views["weak"].clone()
    squares = augment.cutouts(5, 1, covered.index.numpy(), SIDE, 0.5)
    for image, (top, left), (height, width), colour in zip(expected, *(a.astype(int) for a in squares), strict=True):
        image[:, top : top + height, left : left + width] = torch.from_numpy(colour)[:, None, None]
    assert torch.equal(plain.index, covered.index)
    torch.testing.assert_close(covered.views["weak"], expected, atol=1e-3, rtol=0)


def test_randaugment_of_the_only_view(small_digits: Path) -> None:
    """Images that need no resize get what the strong view has; others the operations at the size of the view."""
    strong = first_batch(small_digits, ("weak", "strong"))
    only = first_batch(small_digits, randaugment="weak")
    assert torch.equal(only.views["weak"], strong.views["strong"])
    assert not torch.equal(only.views["weak"], strong.views["weak"])
    none = first_batch(small_digits, randaugment="weak", randaugment_ops=0)
    assert torch.equal(none.views["weak"], strong.views["weak"])
    for options in ({"cutout": 0.5}, {"randaugment": "weak"}):
        with pytest.raises(UserError, match=r"data\.cutout and data\.randaugment weak are for methods with one view"):
            first_batch(small_digits, ("weak", "strong"), **options)


def test_the_square_comes_before_randaugment(small_digits: Path) -> None:
    """As in the programs that have both: Solarize, which inverts every value at this magnitude, inverts the square."""
    covered = first_batch(small_digits, cutout=0.5)
    both = first_batch(small_digits, cutout=0.5, randaugment="weak", randaugment_ops=1, randaugment_magnitude=30)
    inverted = augment.randaugment_choice(5, 1, both.index.numpy(), 1)[0][:, 0] == 11
    assert inverted.any()
    expected = 255 - covered.views["weak"][torch.from_numpy(inverted)].round()
    torch.testing.assert_close(both.views["weak"][torch.from_numpy(inverted)], expected, atol=1e-3, rtol=0)
