"""Masked images: normalisation, bilinear upsampling, strict threshold, and rows without or with several positives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spml_kernels import cam_map, cam_mask, map_mask, positive_classes
from spml_kernels.cam_mask.reference import normalise_maps
from torch.nn.functional import interpolate

NORMS = ("per_image", "batch_rawmax", "batch_minmax")


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def upsample(cells, side):
    """Bilinear closed form without aligned corners: src = max((i + 0.5) / scale - 0.5, 0), clamped at the far edge."""

    def axis(count):
        src = np.maximum((np.arange(side) + 0.5) * count / side - 0.5, 0)
        low = np.minimum(np.floor(src).astype(int), count - 1)
        matrix = np.zeros((side, count))
        np.add.at(matrix, (np.arange(side), low), 1 - (src - low))
        np.add.at(matrix, (np.arange(side), np.minimum(low + 1, count - 1)), src - low)
        return matrix

    return axis(cells.shape[0]) @ cells @ axis(cells.shape[1]).T


def normal(maps, valid, norm, group):
    """By loops over images or cells."""
    maps, out = maps.numpy(), np.zeros(maps.shape)
    if norm == "per_image":
        for b, n in zip(*np.nonzero(valid.numpy()), strict=True):
            m = maps[b, n]
            out[b, n] = (m - m.min()) / (m.max() - m.min())
        return out
    for start in range(0, len(maps), group):
        part = slice(start, start + group)
        seen = valid[part].numpy()
        if not seen.any():
            continue
        for y, x in np.ndindex(maps.shape[2:]):
            cell = maps[part, :, y, x]
            low, high = cell[seen].min(), cell[seen].max()
            scale = high if norm == "batch_rawmax" else high - low
            out[part, :, y, x] = (cell - low) / scale if scale else 0
    return out


def expected(maps, classes, images, threshold, norm, group):
    valid = classes >= 0
    values = normal(maps, valid, norm, group)
    keep = np.zeros((len(maps), *images.shape[2:]), dtype=bool)
    for b in range(len(maps)):
        chosen = [upsample(values[b, n], images.shape[-1]) > threshold for n in range(maps.shape[1]) if valid[b, n]]
        keep[b] = np.any(chosen, 0) if chosen else True
    return images.numpy() * keep[:, None]


def case(batch=7, positives=2, size=(5, 4), side=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, *size, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(9, generator=generator, dtype=torch.float64)
    classes = torch.randint(-1, 9, (batch, positives), generator=generator)
    classes[2] = -1
    images = torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)
    return features, weight, bias, classes, images


class TestAgainstLoops:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("group", [3, 16])
    @pytest.mark.parametrize("threshold", [0.3, 0.8])
    def test_masked_images(self, norm, group, threshold):
        features, weight, bias, classes, images = case()
        maps = cam_map(features, weight, bias, classes)
        out = cam_mask(features, weight, bias, classes, images, threshold, norm, group)
        wanted = expected(maps, classes, images, threshold, norm, group)
        assert np.array_equal(out.numpy(), wanted)
        assert 0 < np.count_nonzero(wanted) < wanted.size
        assert torch.equal(out, map_mask(maps, classes, images, threshold, norm, group))

    def test_modes_differ(self):
        arguments = case()
        outs = [cam_mask(*arguments, 0.5, norm, 16) for norm in NORMS]
        assert not any(torch.equal(outs[i], outs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    def test_upsampling_is_the_closed_form(self):
        cells = torch.rand(14, 14, dtype=torch.float64)
        out = interpolate(cells[None, None], (448, 448), mode="bilinear", align_corners=False)[0, 0]
        np.testing.assert_allclose(out.numpy(), upsample(cells.numpy(), 448), atol=1e-12)


class TestNormalisation:
    def test_values_by_hand(self):
        # Cell by cell over the batch: min (1, 2), max (4, 2); one row of two cells an image, no upsampling.
        maps = torch.tensor([[1.0, 2.0], [4.0, 2.0], [3.0, 2.0]], dtype=torch.float64)[:, None, None].expand(3, 1, 2, 2)
        classes, images = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 3, 2, 2, dtype=torch.float64)

        def kept(norm, threshold):
            return map_mask(maps, classes, images, threshold, norm)[:, 0, 0].bool().tolist()

        # rawmax: (0, 0), (3/4, 0), (2/4, 0)
        assert kept("batch_rawmax", 0.49) == [[False, False], [True, False], [True, False]]
        assert kept("batch_rawmax", 0.74) == [[False, False], [True, False], [False, False]]
        assert not np.any(kept("batch_rawmax", 0.76))
        # minmax: (0, -), (1, -), (2/3, -)
        assert kept("batch_minmax", 0.66) == [[False, False], [True, False], [True, False]]
        assert kept("batch_minmax", 0.99) == [[False, False], [True, False], [False, False]]
        # per image: (0, 1), (1, 0), (1, 0)
        assert kept("per_image", 0.99) == [[False, True], [True, False], [True, False]]

    def test_threshold_is_strict(self):
        maps = torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
        out = map_mask(maps, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 3, 2, 2, dtype=torch.float64), 0.75)
        assert out[0, 0].flatten().tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("norm", ["batch_rawmax", "batch_minmax"])
    def test_batch_of_one_keeps_nothing(self, norm):
        maps, classes = torch.rand(1, 1, 4, 4) + 0.1, torch.zeros(1, 1, dtype=torch.long)
        assert not map_mask(maps, classes, torch.ones(1, 3, 8, 8), 0.5, norm).any()

    def test_batch_of_one_per_image_keeps_its_peak(self):
        maps = torch.zeros(1, 1, 4, 4)
        maps[0, 0, 1, 2] = 1
        out = map_mask(maps, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 3, 32, 32), 0.8)
        rows, columns = torch.nonzero(out[0, 0], as_tuple=True)
        assert rows.float().mean() == 11.5 and columns.float().mean() == 19.5 and 1 < len(rows) < 64

    def test_flat_map_keeps_the_image(self):
        maps, classes = torch.full((1, 1, 4, 4), 3.0), torch.zeros(1, 1, dtype=torch.long)
        assert map_mask(maps, classes, torch.ones(1, 3, 8, 8), 0.8).all()

    def test_nothing_above_zero_keeps_nothing_in_rawmax(self):
        maps, classes = -torch.rand(4, 1, 4, 4) - 0.1, torch.zeros(4, 1, dtype=torch.long)
        assert not map_mask(maps, classes, torch.ones(4, 3, 8, 8), 0.5, "batch_rawmax").any()
        maps[:, :, 0, 0] = torch.tensor([0.0, -1, -2, -3])[:, None]
        assert not map_mask(maps, classes, torch.ones(4, 3, 8, 8), 0.5, "batch_rawmax").isnan().any()

    @pytest.mark.parametrize("norm", NORMS)
    def test_row_without_positive_is_whole_and_left_out(self, norm):
        maps = torch.randn(5, 1, 4, 4, dtype=torch.float64)
        maps[1] = 1000
        classes = torch.tensor([[0], [-1], [2], [1], [0]])
        images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
        out = map_mask(maps, classes, images, 0.5, norm)
        assert torch.equal(out[1], images[1])
        rest = [0, 2, 3, 4]
        assert torch.equal(out[rest], map_mask(maps[rest], classes[rest], images[rest], 0.5, norm))

    def test_groups_are_independent(self):
        features, weight, bias, classes, images = case(batch=8)
        whole = cam_mask(features, weight, bias, classes, images, 0.4, "batch_minmax", 3)
        parts = [
            cam_mask(features[s], weight, bias, classes[s], images[s], 0.4, "batch_minmax", 16)
            for s in (slice(0, 3), slice(3, 6), slice(6, 8))
        ]
        assert torch.equal(whole, torch.cat(parts))

    @pytest.mark.parametrize("norm", NORMS)
    def test_only_per_image_ignores_its_neighbours(self, norm):
        features, weight, bias, classes, images = case(positives=1)
        whole = cam_mask(features, weight, bias, classes, images, 0.4, norm)[:3]
        alone = cam_mask(features[:3], weight, bias, classes[:3], images[:3], 0.4, norm)
        assert torch.equal(whole, alone) == (norm == "per_image")

    def test_several_positives_take_the_union(self):
        features, weight, bias, _, images = case(batch=3)
        one, two, both = torch.tensor([[1, -1]] * 3), torch.tensor([[-1, 4]] * 3), torch.tensor([[1, 4]] * 3)
        ones = torch.ones_like(images)
        masks = [cam_mask(features, weight, bias, c, ones, 0.6) for c in (one, two, both)]
        assert torch.equal(masks[2], torch.maximum(masks[0], masks[1]))
        assert not torch.equal(masks[2], masks[0])

    def test_unknown_normalisation(self):
        with pytest.raises(ValueError, match="sideways"):
            cam_mask(*case(), 0.5, "sideways")


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_dtype_and_layout(self, dtype):
        features, weight, bias, classes, images = case(side=32)
        images = images.to(dtype).to(memory_format=torch.channels_last)
        out = cam_mask(features.to(dtype), weight.float(), bias.float(), classes, images, 0.5)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)

    def test_no_gradient_reaches_the_map(self):
        features, weight, bias, classes, images = case()
        out = cam_mask(features.requires_grad_(), weight.requires_grad_(), bias, classes, images, 0.5)
        assert not out.requires_grad

    def test_empty_batch_and_no_classes(self):
        features, weight, bias, classes, images = case()
        assert cam_mask(features[:0], weight, bias, classes[:0], images[:0], 0.5).shape == (0, 3, 23, 23)
        assert torch.equal(cam_mask(features, weight, bias, classes[:, :0], images, 0.5), images)
        assert torch.equal(cam_mask(features, weight, bias, torch.full_like(classes, -1), images, 0.5), images)

    def test_positive_classes(self):
        codes = torch.tensor([[-1, 1, 0, 1], [-1, -1, 0, -1], [1, 1, 1, 1]], dtype=torch.int8)
        assert positive_classes(codes, 2).tolist() == [[1, 3], [-1, -1], [0, 1]]
        assert positive_classes(codes, 6).tolist() == [[1, 3, *[-1] * 4], [-1] * 6, [0, 1, 2, 3, -1, -1]]
        assert positive_classes(codes[:0], 2).shape == (0, 2)


def test_normalised_maps_by_hand():
    """Flat maps are above every threshold; where the scale is 0 nothing is, and a scale of 1 is one like any other."""
    there = torch.ones(2, 1, dtype=torch.bool)
    flat = torch.full((2, 1, 2, 2), -3.0)
    assert normalise_maps(flat, there, "per_image", 1).unique().tolist() == [2.0]
    column = torch.tensor([-1.0, 0.0]).view(2, 1, 1, 1)
    assert normalise_maps(column, there, "batch_rawmax", 2).flatten().tolist() == [0, 0]
    assert normalise_maps(column, there, "batch_minmax", 2).flatten().tolist() == [0, 1]
    assert normalise_maps(2 * column + 3, there, "batch_rawmax", 2).flatten().tolist() == pytest.approx([0, 2 / 3])


@pytest.mark.parametrize("norm", NORMS)
def test_no_images_and_no_classes_change_nothing(norm):
    images = torch.rand(2, 3, 8, 8)
    nothing = map_mask(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, dtype=torch.int64), images[:0], 0.5, norm, 1)
    assert nothing.shape == (0, 3, 8, 8)
    whole = map_mask(torch.zeros(2, 0, 4, 4), torch.zeros(2, 0, dtype=torch.int64), images, 0.5, norm, 2)
    assert torch.equal(whole, images)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision_are_normalised_in_fp32(norm, dtype):
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(4, 2, 5, 5, generator=generator).to(dtype)
    images, classes = torch.ones(4, 3, 60, 60), torch.arange(2).expand(4, 2)
    for threshold in (0.4, 0.5, 0.6):
        found = map_mask(maps, classes, images, threshold, norm, 2)
        assert torch.equal(found, map_mask(maps.float(), classes, images, threshold, norm, 2))
