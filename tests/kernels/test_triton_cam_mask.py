"""Masked images: every pixel whose fp64 map is not at the threshold itself is kept or removed as in the reference."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import cam_mask, map_mask
from spml_kernels.cam_mask.reference import cam_mask_reference, map_mask_reference
from spml_kernels.cam_pool.reference import cam_map_reference

from tests.support.kernels import assert_op_sound

pytestmark = pytest.mark.usefixtures("triton_on")

NORMS = ("per_image", "batch_rawmax", "batch_minmax")
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# fp32 maps decide like fp64 ones at all pixels but those whose map is this close to the threshold.
NEAR = 1e-4


def draw(batch, cells, side, channels=40, chosen=1, device="cpu", dtype=torch.float32, seed=0):
    """Features, weight, bias, classes of which row 1 has none, images without zeros."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, *cells, channels, generator=generator).to(dtype)
    weight, bias = torch.randn(9, channels, generator=generator), torch.randn(9, generator=generator)
    classes = torch.randint(0 if chosen == 1 else -1, 9, (batch, chosen), generator=generator)
    classes[1:2] = -1
    images = torch.randn(batch, 3, *side, generator=generator).clamp(min=0.1)
    return [t.to(device) for t in (features, weight, bias, classes, images)]


def double(tensors):
    return [t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def compare(found, classes, images, threshold, mask):
    """`found` against `mask(threshold)`, a bool [B, 1, H, W] in fp64; both sides of the mask are there."""
    kept = mask(threshold)
    certain = mask(threshold - NEAR) == mask(threshold + NEAR)
    assert certain.float().mean() > 0.99
    assert found.dtype == images.dtype and found.shape == images.shape
    # The sign of zero aside, bit by bit.
    wanted = torch.where(kept, images.cpu(), torch.zeros((), dtype=images.dtype))
    assert torch.equal(torch.where(certain, found.cpu(), 0), torch.where(certain, wanted, 0))
    lonely = (classes.cpu() < 0).all(1)
    assert torch.equal(found.cpu()[lonely], images.cpu()[lonely])
    return kept


def check(inputs, threshold=0.45, norm="per_image", group=16, given=False):
    """The op, and with `given` its other form, from maps that are handed in."""
    *head, classes, images = inputs
    maps = cam_map_reference(*double(head), classes.cpu())
    ones = torch.ones(len(images), 1, *images.shape[2:], dtype=torch.float64)

    def mask(level):
        return map_mask_reference(maps, classes.cpu(), ones, level, norm, group) > 0

    found = cam_mask(*inputs, threshold, norm, group)
    kept = compare(found, classes, images, threshold, mask)
    if given:
        same = map_mask(maps.float().to(images.device), classes, images, threshold, norm, group)
        compare(same, classes, images, threshold, mask)
    return found, kept


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("chosen", [1, 3])
def test_equals_the_reference(chosen, layout, norm, device):
    inputs = draw(4, (5, 4), (17, 22), chosen=chosen, device=device)
    inputs[4] = inputs[4].to(memory_format=layout)
    found, kept = check(inputs, norm=norm, group=3, given=layout == CONTIGUOUS)
    assert found.is_contiguous(memory_format=layout)
    assert 0.01 < kept.float().mean() < 0.99


@pytest.mark.parametrize("images", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
def test_images_of_every_dtype(images, device):
    inputs = draw(2, (4, 4), (16, 16), device=device)
    inputs[4] = (inputs[4] * 50).to(images)
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, None])
def test_features_of_half_precision(weights, dtype, device):
    inputs = draw(2, (7, 7), (16, 28), 300, 2, device, dtype)
    inputs[1:3] = [t.to(weights or dtype) for t in inputs[1:3]]
    check(inputs)


# (cells, image, channels, classes an image): one tile and many, one cell, larger maps than images, and odd sizes.
@pytest.mark.parametrize(
    ("cells", "side", "channels", "chosen", "layout"),
    [
        ((14, 14), (40, 70), 33, 1, CONTIGUOUS),
        ((14, 14), (20, 66), 33, 1, CHANNELS_LAST),
        ((1, 1), (5, 5), 8, 1, CONTIGUOUS),
        ((3, 1), (17, 4), 1, 2, CHANNELS_LAST),
        ((6, 9), (6, 9), 16, 5, CONTIGUOUS),
        ((12, 10), (7, 5), 64, 1, CONTIGUOUS),
        ((20, 40), (18, 18), 20, 1, CHANNELS_LAST),
        ((2, 33), (9, 20), 257, 6, CONTIGUOUS),
        ((4, 4), (1, 33), 16, 1, CHANNELS_LAST),
    ],
    ids=str,
)
def test_shapes(cells, side, channels, chosen, layout, device):
    inputs = draw(2, cells, side, channels, chosen, device)
    inputs[4] = inputs[4].to(memory_format=layout)
    check(inputs, 0.4)


@pytest.mark.parametrize("threshold", [-0.5, 0.1, 0.8, 1.5, 3.0])
def test_thresholds(threshold, device):
    inputs = draw(3, (5, 5), (18, 24), device=device)
    check(inputs, threshold, "batch_rawmax")
    found, _ = check(inputs, threshold)
    assert found[0].any() == (threshold < 1)


def test_threshold_is_strict(device):
    maps = torch.tensor([0.0, 0.5, 0.75, 1.0], device=device).view(1, 1, 2, 2)
    classes, images = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 3, 2, 2, device=device)
    assert map_mask(maps, classes, images, 0.75)[0, 0].flatten().tolist() == [0, 0, 0, 1]
    assert map_mask(maps, classes, images, 0.7499)[0, 2].flatten().tolist() == [0, 0, 1, 1]


def test_values_by_hand(device):
    # Cell by cell over the batch: min (1, 2), max (4, 2); one row of two cells an image, no upsampling.
    maps = torch.tensor([[1.0, 2.0], [4.0, 2.0], [3.0, 2.0]], device=device)[:, None, None].expand(3, 1, 2, 2)
    classes, images = torch.zeros(3, 1, dtype=torch.int64, device=device), torch.ones(3, 3, 2, 2, device=device)

    def kept(norm, threshold):
        return map_mask(maps, classes, images, threshold, norm)[:, 0, 0].bool().tolist()

    assert kept("batch_rawmax", 0.49) == [[False, False], [True, False], [True, False]]
    assert kept("batch_rawmax", 0.74) == [[False, False], [True, False], [False, False]]
    assert kept("batch_minmax", 0.66) == [[False, False], [True, False], [True, False]]
    assert kept("per_image", 0.99) == [[False, True], [True, False], [True, False]]


def test_upsampling_to_the_golden_size(device):
    # A peak in one cell of 4 x 4 under 32 x 32 pixels: centre of gravity by the closed form, eight pixels a cell.
    maps = torch.zeros(1, 1, 4, 4, device=device)
    maps[0, 0, 1, 2] = 1
    classes = torch.zeros(1, 1, dtype=torch.int64, device=device)
    out = map_mask(maps, classes, torch.ones(1, 3, 32, 32, device=device), 0.8)
    rows, columns = torch.nonzero(out[0, 0], as_tuple=True)
    assert rows.float().mean() == 11.5 and columns.float().mean() == 19.5 and len(rows) == 4


def test_flat_maps_and_groups_of_one(device):
    classes, ones = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 3, 16, 16, device=device)
    flat = torch.full((1, 1, 4, 4), 3.0, device=device)
    assert map_mask(flat, classes, ones, 0.8).all()
    for norm in NORMS[1:]:
        assert not map_mask(flat, classes, ones, 0.5, norm).any()
        assert not map_mask(flat - 3, classes, ones, 0.5, norm).any()
        assert not map_mask(torch.rand(1, 1, 4, 4).to(device), classes, ones, 0.5, norm).any()


def test_a_map_with_a_nan_keeps_its_image(device):
    # One map of the second image holds a NaN, all of the third does; the first is as it was.
    maps, ones = torch.randn(3, 2, 4, 4, device=device), torch.ones(3, 3, 16, 16, device=device)
    classes = torch.tensor([[0, 1], [2, 3], [4, -1]], device=device)
    maps[1, 1, 2, 3] = torch.nan
    maps[2] = torch.nan
    out = map_mask(maps, classes, ones, 0.9)
    assert out[1:].all() and not out[0].all()
    assert torch.equal(out.cpu().double(), map_mask_reference(*double([maps, classes, ones]), 0.9, "per_image", 16))


def test_rows_without_a_class_are_left_out_of_groups(device):
    maps, ones = torch.randn(4, 2, 4, 4, device=device), torch.ones(4, 3, 16, 16, device=device)
    classes = torch.tensor([[0, -1], [-1, -1], [2, 4], [-1, 5]], device=device)
    # What belongs to no class must not be read: neither as a map nor in a minimum.
    maps[classes < 0] = torch.nan
    rest = [0, 2, 3]
    for norm in NORMS:
        out = map_mask(maps, classes, ones, 0.3, norm)
        assert out[1].all() and not out[rest].all()
        assert torch.equal(out[rest], map_mask(maps[rest], classes[rest], ones[rest], 0.3, norm))
        assert torch.equal(map_mask(maps[:, :0], classes[:, :0], ones, 0.3, norm), ones)


def test_groups_are_independent(device):
    features, weight, bias, classes, images = draw(5, (5, 5), (12, 12), device=device)
    whole = cam_mask(features, weight, bias, classes, images, 0.4, "batch_minmax", 2)
    parts = [
        cam_mask(features[s], weight, bias, classes[s], images[s], 0.4, "batch_minmax", 16)
        for s in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("norm", NORMS)
def test_ids_that_are_no_class_count_as_none(norm, device):
    """Nothing is looked up outside of the weights, and neither a group nor the union has them."""
    features, weight, bias, classes, images = draw(4, (6, 6), (40, 40), chosen=3, device=device)
    none = torch.where(torch.arange(3, device=device) == 1, -1, classes)
    wanted = cam_mask(features, weight, bias, none, images, 0.45, norm, 2)
    for far in (9, 2**31, 2**62, -5):
        other = torch.where(torch.arange(3, device=device) == 1, far, classes)
        assert torch.equal(cam_mask(features, weight, bias, other, images, 0.45, norm, 2), wanted)
    check([features, weight, bias, other, images], norm=norm)


def test_several_positives_take_the_union(device):
    features, weight, bias, _, images = draw(2, (6, 6), (16, 48), device=device)
    ids = torch.tensor([[1, -1, -1], [-1, -1, 4], [-1, 7, -1], [1, 7, 4]], device=device)
    one, two, three, every = (
        cam_mask(features, weight, bias, c.expand(2, 3), torch.ones_like(images), 0.6) for c in ids
    )
    assert torch.equal(every, torch.maximum(torch.maximum(one, two), three))
    assert not torch.equal(every, one) and not every.all()


def test_extreme_maps(device):
    # A maximum over the batch that is tiny sends the normalised map beyond fp32; neighbours must not become NaN.
    maps = torch.zeros(2, 1, 4, 4, device=device)
    maps[0], maps[1] = -1e30, 1e-30
    maps[:, :, 0] = torch.tensor([0.0, 100.0], device=device)[:, None, None]
    # A column that is removed, so that the tile is neither wholly kept nor wholly removed.
    maps[:, :, :, 3] = torch.tensor([100.0, 0.0], device=device)[:, None, None]
    classes, ones = torch.zeros(2, 1, dtype=torch.int64, device=device), torch.ones(2, 3, 16, 16, device=device)
    out = map_mask(maps, classes, ones, 0.5, "batch_rawmax")
    wanted = map_mask_reference(*double([maps, classes, ones]), 0.5, "batch_rawmax", 16)
    assert torch.equal(out.cpu().double(), wanted) and wanted[1, 0, 0, 0] == 1


def test_empty(device):
    features, weight, bias, classes, images = draw(3, (4, 4), (16, 16), device=device)
    assert cam_mask(features[:0], weight, bias, classes[:0], images[:0], 0.5).shape == (0, 3, 16, 16)
    for none in (classes[:, :0], torch.full_like(classes, -1)):
        assert torch.equal(cam_mask(features, weight, bias, none, images, 0.5), images)


def test_layouts(device):
    features, weight, bias, classes, images = draw(2, (7, 7), (16, 30), 48, 2, device)
    plain = cam_mask(features, weight, bias, classes, images, 0.5)
    maps = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.zeros(2, 3, 16, 60, device=device)
    wide[..., ::2] = images
    crooked = images.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (wide[..., ::2], crooked, images.to(memory_format=CHANNELS_LAST)):
        ids = classes.T.contiguous().T
        out = cam_mask(maps, weight.T.contiguous().T, bias, ids, view, 0.5)
        assert torch.equal(out, plain)


def test_removed_tiles_are_not_read(device):
    # Neither the image nor what was in memory shows where a whole tile is removed, NaN and infinity included.
    inputs = draw(2, (4, 4), (64, 128), device=device)
    inputs[4][:] = torch.nan
    out = cam_mask(*inputs, 0.8)
    assert (out[0].isnan() | (out[0] == 0)).all() and (out[0] == 0).float().mean() > 0.5
    assert out[1].isnan().all()


def test_gradient_goes_to_the_images_alone(device):
    features, weight, bias, classes, images = draw(2, (4, 4), (16, 24), device=device)
    assert not cam_mask(features.requires_grad_(), weight.requires_grad_(), bias, classes, images, 0.5).requires_grad
    leaf = images.clone().requires_grad_()
    maps = cam_map_reference(features, weight, bias, classes)
    for out in (cam_mask(features, weight, bias, classes, leaf, 0.5), map_mask(maps, classes, leaf, 0.5)):
        upstream = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        assert torch.equal(grad, torch.where(out != 0, upstream, 0))
        assert (out == 0).any()


def test_unknown_normalisation(device):
    inputs = draw(2, (4, 4), (8, 8), device=device)
    for function, arguments in ((cam_mask, inputs), (map_mask, [inputs[4][:, :1], *inputs[3:]])):
        with pytest.raises(ValueError, match="sideways"):
            function(*arguments, 0.5, "sideways")


def test_fp64_takes_the_reference(device):
    inputs = [t.double() if t.is_floating_point() else t for t in draw(3, (5, 4), (23, 37), device=device)]
    assert torch.equal(cam_mask(*inputs, 0.5), cam_mask_reference(*inputs, 0.5, "per_image", 16))


def test_two_runs_are_bit_equal(device):
    inputs = draw(3, (6, 6), (16, 20), 70, 3, device, torch.float16)
    for norm in NORMS[:2]:
        assert torch.equal(*(cam_mask(*inputs, 0.5, norm, 2) for _ in range(2)))


def test_ops_are_sound(device):
    *head, classes, images = draw(2, (2, 2), (4, 4), 16, 1, device)
    leaf = images.to(memory_format=CHANNELS_LAST).requires_grad_()
    assert_op_sound(torch.ops.spml.cam_mask.default, (*head, classes, leaf, 0.5, "batch_minmax", 16))
    maps, leaf = cam_map_reference(*head, classes), images.requires_grad_()
    assert_op_sound(torch.ops.spml.map_mask.default, (maps, classes, leaf, 0.5, "per_image", 16))


def test_compiles_into_one_graph(device):
    *head, classes, images = draw(2, (4, 4), (16, 16), 16, 2, device)
    images = images.to(memory_format=CHANNELS_LAST)

    def step(images):
        return cam_mask(*head, classes, images, 0.5, "batch_rawmax") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), step(images))
