"""cam_pool and cam_map against plain convolutions, closed forms and the worked example."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import cam_map, cam_pool
from torch.nn.functional import adaptive_avg_pool2d, conv2d, linear

GOLDEN_X = [[1, 0, 2, -1], [0.5, -1, 1, 3]]
GOLDEN_W = [[1, -1], [0.5, 2]]
GOLDEN_BETA = [0.5, -1]


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def golden():
    features = doubles(GOLDEN_X).T.reshape(1, 2, 2, 2).clone().requires_grad_()
    return features, doubles(GOLDEN_W).requires_grad_(), doubles(GOLDEN_BETA).requires_grad_()


def random_inputs(B=3, H=4, W=5, K=6, C=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(B, H, W, K), draw(C, K), draw(C)


def boosted(mean, mean_relu, alpha):
    return mean + (alpha - 1) * mean_relu


def by_convolution(features, weight, bias, alpha):
    """BoostLU as the papers write it: 1x1 convolution, alpha on positive cells, average pooling."""
    cam = conv2d(features.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return adaptive_avg_pool2d(torch.where(cam > 0, alpha * cam, cam), 1).flatten(1)


def test_worked_example():
    features, weight, bias = golden()
    mean, mean_relu = cam_pool(features, weight, bias)
    assert mean.tolist() == [[0.125, 1]]
    assert mean_relu.tolist() == [[1, 1.75]]
    logits = boosted(mean, mean_relu, 5)
    assert logits.tolist() == [[4.125, 8]]
    (logits * doubles([[1, 2]])).sum().backward()
    assert weight.grad.tolist() == [[3.5, 1.375], [5, 10.75]]
    assert bias.grad.tolist() == [4, 8]
    assert features.grad.reshape(4, 2).T.tolist() == [[2.5, 1.5, 2.5, 1.5], [3.75, -0.25, 3.75, 4.75]]


def test_boosted_mean_of_four_cells():
    # The only channel is the map itself.
    features = doubles([1, -2, 3, 0]).reshape(1, 2, 2, 1)
    mean, mean_relu = cam_pool(features, doubles([[1]]), doubles([0]))
    assert boosted(mean, mean_relu, 5).item() == 4.5


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 5])
def test_equals_convolution_boost_and_pooling(alpha):
    inputs = [t.requires_grad_() for t in random_inputs()]
    upstream = torch.randn(3, 7, dtype=torch.float64)
    mean, mean_relu = cam_pool(*inputs)
    ours = torch.autograd.grad((boosted(mean, mean_relu, alpha) * upstream).sum(), inputs)
    expected = by_convolution(*inputs, alpha)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(boosted(mean, mean_relu, alpha), expected, rtol=0, atol=1e-13)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("boost", [True, False])
def test_alpha_one_is_pooling_and_a_linear_layer(boost):
    features, weight, bias = random_inputs()
    mean, mean_relu = cam_pool(features, weight, bias, boost)
    torch.testing.assert_close(mean, linear(features.mean((1, 2)), weight, bias), rtol=0, atol=1e-14)
    assert (mean_relu is None) is not boost


def test_closed_form_gradients():
    alpha = 5.0
    features, weight, bias = (t.requires_grad_() for t in random_inputs())
    g = torch.randn(3, 7, dtype=torch.float64)
    mean, mean_relu = cam_pool(features, weight, bias)
    boosted(mean, mean_relu, alpha).backward(g)
    with torch.no_grad():
        cells, share = features.flatten(1, 2), 1 / 20
        positive = (cells @ weight.T + bias > 0).double()
        boosted_part = (alpha - 1) * share * torch.einsum("bc,bpc,bpk->ck", g, positive, cells)
        torch.testing.assert_close(weight.grad, g.T @ cells.mean(1) + boosted_part, rtol=0, atol=1e-13)
        count = positive.sum(1)
        torch.testing.assert_close(bias.grad, (g * (1 + (alpha - 1) * count * share)).sum(0), rtol=0, atol=1e-13)
        sign_part = (alpha - 1) * share * torch.einsum("bc,bpc,ck->bpk", g, positive, weight)
        expected = (g @ weight * share)[:, None] + sign_part
        torch.testing.assert_close(features.grad.flatten(1, 2), expected, rtol=0, atol=1e-13)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in random_inputs(B=2, H=2, W=3, K=3, C=2)]
    assert torch.autograd.gradcheck(lambda *x: cam_pool(*x), inputs)


def test_a_cell_of_exactly_zero_is_not_boosted():
    features = torch.zeros(1, 1, 2, 1, dtype=torch.float64).requires_grad_()
    weight, bias = doubles([[3.0]]).requires_grad_(), doubles([0.0]).requires_grad_()
    mean, mean_relu = cam_pool(features, weight, bias)
    boosted(mean, mean_relu, 5).sum().backward()
    # 1/HW each, not alpha/HW: the comparison is a strict ">".
    assert bias.grad.item() == 1
    assert features.grad.flatten().tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_fp32_means(dtype):
    features, weight, bias = random_inputs(H=7, W=7, K=64)
    half = features.to(dtype).requires_grad_()
    weight32, bias32 = weight.float().requires_grad_(), bias.float()
    mean, mean_relu = cam_pool(half, weight32, bias32)
    assert mean.dtype == mean_relu.dtype == torch.float32
    exact = cam_pool(half.detach().double(), weight32.detach().double(), bias32.double())
    # Of the inputs' own precision only: the sums are made in fp32.
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(mean_relu.double(), exact[1], rtol=0, atol=2e-5)
    (mean.sum() + mean_relu.sum()).backward()
    assert half.grad.dtype == dtype and weight32.grad.dtype == torch.float32
    assert cam_map(half, weight32, bias32, torch.tensor([[0], [1], [2]])).dtype == torch.float32


@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "sliced"])
def test_memory_layouts_give_equal_results(layout):
    features, weight, bias = random_inputs()
    expected = cam_pool(features, weight, bias)
    if layout == "channels_first":
        other = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert not other.is_contiguous()
    elif layout == "channels_last":
        other = features.permute(0, 3, 1, 2).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        assert other.is_contiguous()
    else:
        # As a transformer's tokens less the class token.
        tokens = torch.cat([torch.ones(3, 1, 6, dtype=torch.float64), features.flatten(1, 2)], 1)
        other = tokens[:, 1:].unflatten(1, (4, 5))
        assert not other.is_contiguous()
    other = other.detach().requires_grad_()
    found = cam_pool(other, weight.T.contiguous().T, bias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    found[1].sum().backward()
    plain = features.requires_grad_()
    cam_pool(plain, weight, bias)[1].sum().backward()
    torch.testing.assert_close(other.grad, plain.grad, rtol=0, atol=1e-14)


def test_no_gradient_is_asked_of_frozen_features():
    features, weight, bias = random_inputs()
    weight.requires_grad_()
    mean, mean_relu = cam_pool(features, weight, bias)
    (mean.sum() + mean_relu.sum()).backward()
    assert features.grad is None and weight.grad is not None


def test_maps_of_chosen_classes():
    features, weight, bias = random_inputs()
    classes = torch.tensor([[0, 3], [6, 6], [-1, 2]])
    maps = cam_map(features, weight, bias, classes)
    whole = conv2d(features.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    assert maps.shape == (3, 2, 4, 5)
    for b in range(3):
        for n, c in enumerate(classes[b].tolist()):
            expected = torch.zeros(4, 5, dtype=torch.float64) if c < 0 else whole[b, c]
            torch.testing.assert_close(maps[b, n], expected, rtol=0, atol=1e-13)


def test_ids_that_are_no_class_give_maps_of_zeros():
    features, weight, bias = random_inputs()
    maps = cam_map(features, weight, bias, torch.tensor([[7, 6], [2**40, 0], [-9, 3]]))
    assert not maps[:, 0].any() and all(maps[b, 1].any() for b in range(3))
    # Of one class too, where there is no other to look up in its place.
    assert not cam_map(features, weight[:1], bias[:1], torch.tensor([[-1], [1], [-1]])).any()


def test_maps_are_differentiable_and_padding_gets_nothing():
    features, weight, bias = (t.requires_grad_() for t in random_inputs(B=1, H=2, W=2, K=3, C=4))
    assert torch.autograd.gradcheck(lambda *x: cam_map(*x, torch.tensor([[2, -1, 2]])), (features, weight, bias))
    cam_map(features, weight, bias, torch.tensor([[-1, 3]])).sum().backward()
    assert weight.grad[:3].abs().sum() == 0 and weight.grad[3].abs().sum() > 0


def test_means_of_the_map_are_the_means():
    features, weight, bias = random_inputs()
    everything = torch.arange(7).expand(3, 7)
    maps = cam_map(features, weight, bias, everything)
    mean, mean_relu = cam_pool(features, weight, bias)
    torch.testing.assert_close(maps.mean((2, 3)), mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(maps.relu().mean((2, 3)), mean_relu, rtol=0, atol=1e-13)


def test_an_empty_batch_gives_empty_means():
    _, weight, bias = random_inputs()
    mean, mean_relu = cam_pool(torch.zeros(0, 4, 5, 6, dtype=torch.float64), weight, bias)
    assert mean.shape == mean_relu.shape == (0, 7)
