"""The tiled products with reducing epilogue, their sign bits and gradients, against fp64."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from spml_kernels import cam_pool
from spml_kernels.cam_pool import forward, tiles
from spml_kernels.cam_pool.backward import cam_pool_backward_op
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.forward import cam_pool_op
from spml_kernels.cam_pool.reference import cam_pool_reference
from spml_kernels.common import heuristics
from spml_kernels.common.heuristics import CAM_POOL_BACKWARD_WAYS, CAM_POOL_WAYS, cam_pool_launch
from spml_kernels.common.jit import INTERPRETED
from spml_kernels.devtools.counting import count

from tests.support.kernels import TOLERANCE, assert_close, assert_op_sound

pytestmark = pytest.mark.usefixtures("triton_on")

# (B, H, W, K, C): several images in a tile, images over several tiles, tiles that end with an image, odd sizes.
SHAPES = [
    (3, 4, 4, 16, 5),
    (5, 7, 7, 40, 20),
    (2, 14, 14, 72, 81),
    (2, 16, 16, 64, 10),
    (1, 7, 9, 33, 130),
    (9, 5, 5, 70, 65),
    (2, 15, 18, 32, 3),
]


@pytest.fixture(params=[*CAM_POOL_WAYS, "sparse"])
def way(request, device):
    """All ways of the forward, whatever the card; the vendor's in several chunks of classes, where there are several.

    The backward goes through the cells in one chunk or in many, the first of them in the end of dX; or, `sparse`, it
    leaves classes out, in chunks of 64 cells.
    """
    small = request.param == "vendor"
    if request.param == "sparse":
        request.getfixturevalue("sparse")
        yield "sparse"
        return
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(heuristics, "SMALL_BYTES", 1)
            patch.setattr(heuristics, "CHUNK_BYTES", 64 << 10)
            patch.setattr(heuristics, "chunk_bytes", lambda _: 64 << 10)
        patch.setenv("SPML_CAM_POOL", request.param)
        # Two programs, so that each takes several tiles where there are more.
        patch.setattr(tiles, "FULL_GPU", 2)
        yield request.param


@pytest.fixture
def sparse(monkeypatch):
    """The backward that leaves classes out, in several chunks of cells where there are several."""
    monkeypatch.setenv("SPML_CAM_POOL_BACKWARD", "sparse")
    monkeypatch.setattr(heuristics, "SPARSE_LINES", 2)


@pytest.fixture(params=CAM_POOL_BACKWARD_WAYS)
def backward(request, monkeypatch):
    monkeypatch.setenv("SPML_CAM_POOL_BACKWARD", request.param)
    return request.param


def draw(shape, dtype, device, seed=0, shift=0.0):
    batch, height, width, channels, classes = shape
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, height, width, channels, generator=generator)
    weight = torch.randn(classes, channels, generator=generator) / channels**0.5
    bias = torch.randn(classes, generator=generator) * 0.3 + shift
    return [t.to(dtype).to(device) for t in (features, weight, bias)]


def run(function, inputs, seed=5):
    """Both means and all gradients for upstream gradients that are not 1 and differ by entry."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    mean, relu = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(mean.shape, generator=generator).to(mean.device, mean.dtype) * s for s in (0.7, 2.0)]
    loss = (mean * upstream[0]).sum() + (relu * upstream[1]).sum()
    return [mean, relu, *torch.autograd.grad(loss, leaves)]


def exact(inputs):
    return run(lambda *t: cam_pool_reference(*t, True), [t.detach().double().cpu() for t in inputs])


def check(inputs):
    found, wanted = run(cam_pool, inputs), exact(inputs)
    tolerance = TOLERANCE[inputs[0].dtype]
    for name, a, b in zip(("mean", "relu", "features", "weight", "bias"), found, wanted, strict=True):
        if name in ("mean", "relu"):
            assert a.dtype == torch.float32
            assert_close(name, a, b, 1e-5)
        else:
            # Operands of the backward are rounded to the features' type, sums are not.
            assert_close(f"gradient of {name}", a, b, max(tolerance, 5e-5))
    for a, t in zip(found[2:], inputs, strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_equals_the_reference(shape, dtype, device, way):
    check(draw(shape, dtype, device))


@pytest.mark.parametrize("name", ["tile", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 10, 15, 64, 129), (3, 10, 10, 40, 270), (5, 8, 8, 32, 65)], ids=str)
def test_launch_of_large_inputs(shape, dtype, name, device, monkeypatch):
    monkeypatch.setattr("spml_kernels.common.heuristics.FULL_GPU", 0.01)
    monkeypatch.setenv("SPML_CAM_POOL", name)
    batch, height, width, channels, classes = shape
    half = dtype != torch.float32
    cards = [(90, half and height * width >= 64)]
    cards += [(80, False)]
    for capability, wide in cards:
        launch = cam_pool_launch(batch, height * width, classes, channels, half, capability, name, 2)
        assert launch.tiles.rows == (256 if wide else 128) and launch.way == (
            name if half and capability == 90 else "tile"
        )
        # A card has a capability of its own.
        chosen = mock.Mock(return_value=launch) if device == "cpu" else forward.launch_of
        with mock.patch.object(forward, "launch_of", chosen):
            check(draw(shape, dtype, device))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("spare", [True, False])
def test_chunks_of_cells(dtype, spare, device, monkeypatch):
    # Many chunks: first in the end of dX, then in memory of their own; without dX all in memory of their own.
    monkeypatch.setattr(heuristics, "SMALL_BYTES", 1)
    monkeypatch.setattr(heuristics, "EXPAND_ROWS", 64)
    monkeypatch.setattr(heuristics, "chunk_bytes", lambda _: 128 * 80 * dtype.itemsize)
    batch, side, channels, classes = 9, 7, 40, 70
    chunks = heuristics.cam_pool_chunks(batch * side * side, classes, 80, channels, dtype.itemsize, spare)
    assert len(chunks) > 4 and {c.own for c in chunks} == ({True, False} if spare else {True})
    inputs = draw((batch, side, side, channels, classes), dtype, device)
    if spare:
        check(inputs)
        return
    features, *rest = inputs
    found = run(lambda w, b: cam_pool(features, w, b), rest)
    wanted = exact(inputs)
    for name, a, b in zip(("mean", "relu", "weight", "bias"), found, [*wanted[:2], *wanted[3:]], strict=True):
        assert_close(name, a, b, max(TOLERANCE[dtype], 5e-5))


@pytest.mark.parametrize("parts", [(0, 1), (1, 0), (1, 1)])
def test_tiny_gradients_in_fp16(parts, device, backward):
    # Means over a batch of 10^4 classes: below what fp16 holds, so gradients are scaled.
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float16, device)
    bits = cam_pool_op(features, weight, bias, True)[2]
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(3, 20, generator=generator).to(device)
    grads = [grad * part for part in parts]
    one = cam_pool_backward_op(*grads, features, weight.float(), bits, False, True)[1:]
    two = cam_pool_backward_op(*[g * 1e-9 for g in grads], features, weight.float(), bits, False, True)[1:]
    for a, b in zip(one, two, strict=True):
        assert_close("gradient", b * 1e9, a.double(), 1e-3)


def test_products_beyond_fp16_before_they_are_scaled_back(device, backward):
    # Many classes with large weights: the sum over classes passes 65,504 while gradients are scaled to 1.
    features, weight, bias = draw((1, 4, 4, 16, 4096), torch.float16, device)
    leaves = [t.detach().requires_grad_() for t in (features, torch.full_like(weight, 20.0), bias)]
    mean, _ = cam_pool(*leaves)
    (found,) = torch.autograd.grad(mean.sum() * 1e-3, leaves[:1])
    torch.testing.assert_close(found.cpu(), torch.full_like(found.cpu(), 4096 * 20 * 1e-3 / 16), rtol=2e-3, atol=0)


def test_features_gradient_of_a_scale_below_fp16(device, backward):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float16, device)
    bits = cam_pool_op(features, weight, bias, True)[2]
    grad = torch.full((3, 20), 1e-5, device=device)
    weight = torch.full_like(weight, 50.0).float()
    d_x = cam_pool_backward_op(grad, torch.zeros_like(grad), features, weight, bits, True, False)[0]
    wanted = 20 * 50 * 1e-5 / 49
    assert (d_x.double() / wanted - 1).abs().max() < 2e-3


def test_fp32_weights_under_half_features(device, way):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device)
    inputs = [features.half(), weight, bias]
    found = run(cam_pool, inputs)
    # Weights are rounded to the features' type for the products, and for nothing else.
    wanted = exact([inputs[0], weight.half(), bias])
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.float16, torch.float32, torch.float32]
    for name, a, b in zip(("mean", "relu", "x", "w", "b"), found, wanted, strict=True):
        assert_close(name, a, b, 1e-5 if name in ("mean", "relu") else 2e-3)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_nothing_or_everything_positive(shift, device, way):
    inputs = draw((3, 7, 7, 48, 70), torch.float32, device, shift=shift)
    found = check(inputs)
    if shift < 0:
        assert not found[1].any()
    else:
        assert_close("relu", found[1], found[0], 1e-6)


def test_few_positive_cells(device, way):
    # Two classes of one image.
    features, weight, bias = draw((6, 9, 9, 32, 200), torch.float32, device, shift=-30)
    bias[7] = bias[150] = 0
    features[2, 1:3] *= 3
    check([features, weight, bias])


def test_zero_is_not_positive(device):
    features, weight, bias = draw((2, 5, 5, 16, 4), torch.float32, device)
    inputs = [features, weight * 0, bias * 0]
    mean, relu, *grads = check(inputs)
    assert not mean.any() and not relu.any()
    assert len(grads) == 3


def test_extreme_logits_stay_finite(device):
    features, weight, bias = draw((2, 7, 7, 64, 20), torch.float32, device)
    for scale in (100.0, 1e4):
        assert all(torch.isfinite(t).all() for t in check([features * scale, weight, bias]))


def test_signs_are_one_bit_a_cell(device, way):
    features, weight, bias = draw((3, 7, 7, 32, 21), torch.float32, device)
    bits = cam_pool_op(features, weight, bias, True)[2]
    cam = torch.nn.functional.linear(features.double(), weight.double(), bias.double()).reshape(147, 21)
    assert bits.shape == (5, 64) and bits.dtype == torch.int32
    lanes = (bits.cpu()[:, None] >> torch.arange(32)[None, :, None]) & 1
    found = lanes.reshape(160, 64).bool()
    assert not found[147:].any() and not found[:, 21:].any()
    assert torch.equal(found[:147, :21], cam.cpu() > 0)
    assert cam_pool_op(features, weight, bias, False)[2].numel() == 0


@pytest.mark.parametrize(("channels", "shift", "wanted"), [(40, 0, "persistent"), (40, 1, "tile"), (44, 0, "tile")])
def test_operands_that_descriptors_cannot_describe_go_the_other_way(channels, shift, wanted, device, monkeypatch):
    """Weights that begin 2 bytes after an aligned address; rows of 88 bytes."""
    monkeypatch.setenv("SPML_CAM_POOL", "persistent")
    features, weight, bias = draw((3, 7, 7, channels, 20), torch.float16, device)
    room = torch.empty(weight.numel() + shift, dtype=weight.dtype, device=device)
    seen = []

    def noted(name, way):
        return lambda *arguments: seen.append(name) or way(*arguments)

    monkeypatch.setattr(forward, "_WAYS", {name: noted(name, way) for name, way in forward._WAYS.items()})
    check([features, room[shift:].view_as(weight).copy_(weight), bias])
    assert seen == [wanted]


def test_without_boost_there_is_no_map(device):
    inputs = draw((3, 7, 7, 32, 21), torch.bfloat16, device)
    assert cam_pool(*inputs, False)[1] is None
    leaves = [t.requires_grad_() for t in inputs]
    mean = cam_pool(*leaves, False)[0]
    grads = torch.autograd.grad((mean * 0.3).sum(), leaves)
    double = [t.detach().double().cpu().requires_grad_() for t in inputs]
    wanted = cam_pool_reference(*double, False)[0]
    assert_close("mean", mean, wanted, 1e-5)
    for a, b in zip(grads, torch.autograd.grad((wanted * 0.3).sum(), double), strict=True):
        assert_close("gradient", a, b, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_in_chunks_of_classes(dtype, device, monkeypatch):
    chunked = importlib.import_module("spml_kernels.cam_pool.chunked")
    monkeypatch.setattr(chunked, "CACHE_BYTES", 1)
    monkeypatch.setattr(chunked, "chunk_size", lambda *a: 64)
    inputs = draw((5, 7, 7, 40, 150), dtype, device)
    for name, a, b in zip(("mean", "relu", "x", "w", "b"), run(cam_pool_chunked, inputs), exact(inputs), strict=True):
        # The map itself is rounded to half precision here.
        assert_close(name, a, b, max(2 * TOLERANCE[dtype], 5e-5))


def test_tiny_maps_go_in_chunks(device):
    check(draw((4, 2, 2, 32, 20), torch.float32, device))
    check(draw((4, 1, 1, 32, 20), torch.float32, device))


def test_empty(device, way):
    features, weight, bias = draw((0, 7, 7, 32, 20), torch.float32, device)
    found = run(cam_pool, [features, weight, bias])
    assert found[0].shape == found[1].shape == (0, 20) and found[2].shape == features.shape
    assert not found[3].any() and not found[4].any()


def test_a_nan_feature_is_seen_in_both_means(device, way):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device)
    features[1, 3, 3, 0] = torch.nan
    mean, relu = cam_pool(features, weight, bias)
    for result in (mean, relu):
        assert result[1].isnan().all() and not result[[0, 2]].isnan().any()


def test_layouts(device, backward):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device)
    maps = features.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    plain = run(cam_pool, [features, weight, bias])
    for view in (maps.permute(0, 2, 3, 1), maps.contiguous().permute(0, 2, 3, 1)):
        found = run(cam_pool, [view, weight.T.contiguous().T, bias])
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_only_wanted_gradients_are_made(device, backward):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device)
    whole = run(cam_pool, [features, weight, bias])
    bits = cam_pool_op(features, weight, bias, True)[2]
    grads = [torch.randn(3, 20, device=device) for _ in range(2)]
    d_x, d_w, d_b = cam_pool_backward_op(*grads, features, weight, bits, True, False)
    assert d_w.numel() == d_b.numel() == 0 and d_x.shape == features.shape
    assert cam_pool_backward_op(*grads, features, weight, bits, False, True)[0].numel() == 0
    mean, relu = cam_pool(features, weight.clone().requires_grad_(), bias)
    assert torch.equal(mean, whole[0]) and relu.requires_grad
    with torch.no_grad():
        assert not cam_pool(features, weight.clone().requires_grad_(), bias)[0].requires_grad


def test_two_runs_are_bit_equal(device, way):
    inputs = draw((5, 14, 14, 96, 20), torch.float16, device)
    one, two = run(cam_pool, inputs), run(cam_pool, inputs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_op_is_sound(device, way):
    inputs = [t.requires_grad_() for t in draw((2, 5, 5, 32, 9), torch.float32, device)]
    assert_op_sound(torch.ops.spml.cam_pool.default, (*inputs, True))
    bits = cam_pool_op(*inputs, True)[2]
    grads = [torch.randn(2, 9, device=device) for _ in range(2)]
    plain = [t.detach() for t in inputs]
    for wanted in ((True, True), (True, False), (False, True)):
        assert_op_sound(torch.ops.spml.cam_pool_backward.default, (*grads, *plain[:2], bits, *wanted))


def test_compiles_into_one_graph(device):
    inputs = draw((2, 5, 5, 32, 9), torch.float32, device)
    compiled = torch.compile(lambda *t: cam_pool(*t), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(cam_pool, inputs), run(compiled, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_few_classes_are_positive_somewhere(dtype, device, sparse):
    """Most are left out of every product, and have the mean's part of their gradient all the same."""
    features, weight, bias = draw((9, 7, 7, 48, 150), dtype, device, shift=-40.0)
    bias[::29] = 0
    check([features, weight, bias])


@pytest.mark.parametrize("shape", [(1, 4, 4, 1, 1), (9, 5, 5, 20, 1), (3, 11, 11, 300, 2)], ids=str)
def test_sparse_with_one_class_and_few_or_many_channels(shape, device, sparse):
    check(draw(shape, torch.bfloat16, device, shift=-0.5))


def lists_of(inputs):
    """What the backward that leaves classes out launches, by name of the kernel."""
    found = {}
    for launch in count(lambda: run(cam_pool, inputs)):
        found.setdefault(launch.name, []).append(launch)
    return found


@pytest.mark.skipif(not INTERPRETED, reason="launches are seen under Triton's interpreter")
def test_lists_hold_what_is_positive_and_nothing_else(device, sparse):
    """Of each chunk classes by positive cells, most first, ties by class; lines of each block, classes of each tile."""
    inputs = draw((5, 7, 7, 24, 150), torch.float32, device, shift=-1.5)
    bits = cam_pool_op(*inputs, True)[2]
    positive = torch.nn.functional.linear(inputs[0].double(), *[t.double() for t in inputs[1:]]).reshape(-1, 150) > 0
    found = lists_of(inputs)
    (lines,) = found["_cam_pool_lines_kernel"]
    words = bits[:, :150] != 0
    for chunk, cells in enumerate(positive.split(64)):
        number = cells.sum(0).tolist()
        order = sorted(range(150), key=lambda c, n=number: (-n[c], c))
        assert lines.arguments["order_ptr"][chunk].tolist() == order and 0 < number.count(0) < 150
        assert lines.arguments["sorted_ptr"][chunk].tolist() == [number[c] for c in order]
        for block in range(3):
            own = [c for c in order[64 * block :][:64] if number[c]]
            wanted = [n for n in range(2 * chunk, min(2 * chunk + 2, len(words))) if words[n, own].any()]
            length = lines.arguments["number_ptr"][chunk, block]
            assert lines.arguments["list_ptr"][chunk, block][:length].tolist() == wanted
    (tiles,) = found["_cam_pool_list_kernel"]
    for tile, part in enumerate(words.split(2)):
        length = tiles.arguments["number_ptr"][tile]
        assert tiles.arguments["list_ptr"][tile][:length].tolist() == part.any(0).nonzero().flatten().tolist()


@pytest.mark.skipif(not INTERPRETED, reason="launches are seen under Triton's interpreter")
def test_the_host_does_not_learn_how_many_classes_are_left(device, sparse):
    """The same launches whatever the signs, none of which gives a number to the host; only the bytes differ."""
    names, read = [], []
    for shift in (-100.0, 0.0, 100.0):
        found = lists_of(draw((5, 7, 7, 24, 150), torch.float32, device, shift=shift))
        names.append({name: len(launches) for name, launches in found.items()})
        products = [*found["_cam_pool_sparse_x_kernel"], *found["_cam_pool_sparse_w_kernel"]]
        read.append([launch.moved.read for launch in products])
        if shift == -100.0:
            # No program of the weights' gradient does anything, and no weights are read.
            assert not any(launch.moved.written for launch in products[1:])
            assert products[0].moved.unique_read == 4 * (4 + 5 * 24)
    assert names[0] == names[1] == names[2]
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in names[0])
    assert all(a < b <= c for a, b, c in zip(*read, strict=True))


def test_a_gradient_of_classes_without_a_positive_cell_is_not_looked_at(device, backward):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device)
    bias[3] = -100
    bits = cam_pool_op(features, weight, bias, True)[2]
    grads = [torch.randn(3, 20, generator=torch.Generator().manual_seed(n)).to(device) for n in range(2)]
    clean = cam_pool_backward_op(*grads, features, weight, bits, True, True)
    grads[1][:, 3] = torch.nan
    for a, b in zip(clean, cam_pool_backward_op(*grads, features, weight, bits, True, True), strict=True):
        assert torch.equal(a, b)
    grads[0][1, 5] = torch.nan
    d_x, d_w, d_b = cam_pool_backward_op(*grads, features, weight, bits, True, True)
    assert d_x[1].isnan().all() and not d_x[[0, 2]].isnan().any()
    assert d_w[5].isnan().all() and d_b[5].isnan() and d_w.isnan().sum() == 48 and d_b.isnan().sum() == 1


def test_a_nan_feature_is_seen_in_the_weights_gradient(device, backward):
    features, weight, bias = draw((3, 7, 7, 48, 20), torch.float32, device, shift=-100.0)
    features[1, 3, 3, 7] = torch.nan
    d_w = run(cam_pool, [features, weight, bias])[3]
    assert d_w[:, 7].isnan().all() and d_w.isnan().sum() == 20


@pytest.mark.skipif(not INTERPRETED, reason="launches are seen under Triton's interpreter")
def test_who_multiplies_in_the_backward(device, monkeypatch):
    """PyTorch, unless heuristics or the environment say otherwise, and the environment is asked first."""
    inputs = draw((2, 4, 4, 16, 3), torch.float32, device)
    monkeypatch.delenv("SPML_CAM_POOL_BACKWARD", raising=False)
    assert "_cam_pool_expand_kernel" in lists_of(inputs)
    monkeypatch.setattr(heuristics, "CAM_POOL_BACKWARD", "sparse")
    assert "_cam_pool_expand_kernel" not in (found := lists_of(inputs)) and "_cam_pool_sparse_x_kernel" in found
    monkeypatch.setenv("SPML_CAM_POOL_BACKWARD", "vendor")
    assert "_cam_pool_expand_kernel" in lists_of(inputs)
