"""RandAugment's operations, bit for bit torchvision's on Pillow images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from spml_fast.data import augment, pillow_ops
from spml_fast.data.pillow_ops import Operation, randaugment
from tests.support.pil import photo


def operations(ops, signs, magnitude, width, height) -> list[Operation]:
    """As the loader hands them over."""
    ids, sign = np.array(ops, np.int32), np.array(signs, np.int32)
    matrices = augment.randaugment_matrices(ids, sign, magnitude, [width] * len(ids), [height] * len(ids))
    mask, threshold = augment.posterize_mask(magnitude), augment.solarize_threshold(magnitude)
    return [
        Operation(op, factor, matrix, mask, threshold)
        for op, factor, matrix in zip(ids, augment.randaugment_factor(magnitude, sign), matrices, strict=True)
    ]


def torchvision_chain(image: Image.Image, ours: list[Operation], signs, magnitude) -> np.ndarray:
    space = RandAugment()._augmentation_space(31, (image.height, image.width))
    for operation, sign in zip(ours, signs, strict=True):
        name = augment.RANDAUGMENT_OPS[operation.op]
        magnitudes, _ = space[name]
        value = float(magnitudes[magnitude]) * sign if magnitudes.ndim else 0.0
        # The last bit of torch.linspace is another one on other processors: ours is taken where it decides.
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            assert value == pytest.approx(float(operation.factor) - 1.0, abs=1e-6)
            value = float(operation.factor) - 1.0
        elif name in ("TranslateX", "TranslateY"):
            value = -operation.matrix[:, 2].sum()
        image = _apply_op(image, name, value, InterpolationMode.NEAREST, None)
    return np.asarray(image)


def different(image: Image.Image, ops, signs, magnitude) -> int:
    """Values that differ from torchvision's."""
    before = np.array(image)
    chain = operations(ops, signs, magnitude, image.width, image.height)
    ours = randaugment(before, chain)
    assert np.array_equal(before, np.asarray(image))
    return int((ours != torchvision_chain(image, chain, signs, magnitude)).sum())


@pytest.mark.parametrize("magnitude", [0, 5, 9, 17, 30])
@pytest.mark.parametrize("op", range(14))
def test_one_operation(op, magnitude):
    for number, size in enumerate([(97, 64), (40, 71), (2, 3), (1, 1)]):
        image = photo(number, *size)
        for sign in (1, -1) if 1 <= op <= 9 else (1,):
            assert different(image, [op], [sign], magnitude) == 0, (augment.RANDAUGMENT_OPS[op], size, sign)


def test_chains():
    """Tables that follow each other become one, histograms go through them, and what is between them ends them."""
    rng = np.random.default_rng(7)
    tables = (6, 8, 10, 11, 12, 13)
    for number in range(150):
        pool = tables if number % 2 else range(14)
        ops = rng.choice(pool, 4).tolist()
        signs = [int(rng.choice([-1, 1])) if 1 <= op <= 9 else 1 for op in ops]
        magnitude = int(rng.integers(0, 31))
        assert different(photo(number, 50, 37), ops, signs, magnitude) == 0, (ops, signs, magnitude)


def test_poor_images():
    """Flat images, images that are nearly all white, and channels of different kinds: Pillow's special cases."""
    rng = np.random.default_rng(0)
    flat = np.full((40, 40, 3), 77, np.uint8)
    few = np.full((40, 40, 3), 255, np.uint8)
    few[:10, :10] = rng.integers(0, 255, (10, 10, 3))
    two = np.where(rng.random((40, 40, 3)) < 0.5, 3, 250).astype(np.uint8)
    mixed = flat.copy()
    mixed[..., 1] = rng.integers(0, 256, (40, 40))
    for pixels in (flat, few, two, mixed):
        for op in (8, 12, 13):
            for before in ([], [6], [11]):
                assert different(Image.fromarray(pixels), [*before, op], [1] * (len(before) + 1), 15) == 0


@pytest.mark.parametrize("height", [1, 2, 3, pillow_ops._BAND + 1, pillow_ops._BAND + 2, pillow_ops._BAND + 3, 90])
def test_smoothing_is_pillows_at_every_edge(height):
    rng = np.random.default_rng(height)
    for width in (1, 2, 3, 64):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = np.asarray(Image.fromarray(pixels).filter(ImageFilter.SMOOTH))
        assert np.array_equal(pillow_ops._smooth(pixels), theirs)


def test_nothing_to_do_costs_no_copy():
    pixels = np.asarray(photo(0, 20, 20))
    assert randaugment(pixels, operations([0, 0], [1, 1], 5, 20, 20)) is pixels
