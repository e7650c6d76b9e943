"""The classifier: features that lie where the image says, logits, maps."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import map_mask
from torch.nn.functional import linear

from spml_fast.core.errors import UserError
from spml_fast.models import classifier
from spml_fast.models.heads import MaskOptions
from spml_fast.models.heads.base import HeadOptions
from spml_fast.models.heads.cam import CamHead
from tests.support.classifiers import CNN, CONVNEXT, SWIN, VIT, images, make

SHAPES = {
    CNN: (4, 96),
    VIT: (8, 64),
    SWIN: (4, 768),
    CONVNEXT: (4, 64),
    "test_efficientnet": (4, 256),
    "test_mambaout": (4, 64),
    "test_vit4": (8, 96),
    "test_vit_relpos": (8, 96),
}
EXACT = (CNN, VIT, SWIN, CONVNEXT)
# Their position codes, windows or biases belong to one size of images.
ONE_SIZE = (VIT, SWIN, "test_vit4", "test_vit_relpos")


@pytest.mark.parametrize("backbone", SHAPES)
@torch.no_grad()
def test_cells_lie_where_the_image_says(backbone):
    side, channels = SHAPES[backbone]
    model = make(backbone, 128).eval()
    assert model.feature_size == (side, side) and model.channels == channels
    assert model.accepts_any_size is (backbone not in ONE_SIZE)
    base = images(1, 128)
    features = model.features(base)
    assert features.shape == (1, side, side, channels)
    pixels = 128 // side
    # Off the diagonal as well, so that a swap of rows and columns would show.
    for row, column in ((0, 0), (0, side - 1), (side - 1, 0), (side - 1, side - 1), (1, side - 2)):
        changed = base.clone()
        changed[:, :, row * pixels : (row + 1) * pixels, column * pixels : (column + 1) * pixels] += 3.0
        moved = (model.features(changed) - features)[0].norm(dim=-1)
        if backbone in EXACT:
            assert divmod(int(moved.argmax()), side) == (row, column)
        # Random weights with a wide view may move a neighbour more, but not another quarter of the image.
        quarters = moved.unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum((1, 3)).flatten()
        assert row not in (0, side - 1) or divmod(int(quarters.argmax()), 2) == (2 * row // side, 2 * column // side)


def test_a_single_token_is_a_grid_of_one():
    model = make(VIT, 16).eval()
    assert model.feature_size == (1, 1) and model.features(images(3, 16)).shape == (3, 1, 1, 64)


class Shaped(torch.nn.Module):
    """A backbone whose features, all the mean of the images, have a given shape behind the batch."""

    def __init__(self, *shape: int, channels: int = 8, **attributes: object) -> None:
        super().__init__()
        self.shape, self.num_features = shape, channels
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean().expand(len(images), *self.shape)


class Pyramid(Shaped):
    """A backbone of several feature maps."""

    def forward_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [super().forward_features(images)]


@pytest.fixture
def made_of(monkeypatch):
    """A classifier of such a backbone."""

    def build(backbone: torch.nn.Module, name: str = CNN):
        monkeypatch.setattr(classifier, "create_backbone", lambda config, image_size: backbone)
        return make(name)

    return build


def test_tokens_that_are_no_square(made_of):
    with pytest.raises(UserError, match="backbone test_vit gives 8 tokens, which are no square grid"):
        made_of(Shaped(8, 8, num_prefix_tokens=1), VIT)


def test_all_tokens_are_cells_where_nothing_is_said_of_others(made_of):
    model = made_of(Shaped(4, 8))
    assert model.feature_size == (2, 2) and model.features(images()).shape == (2, 2, 2, 8)


@pytest.mark.parametrize("shape", [(8, 2, 3), (2, 3, 8)])
def test_a_grid_that_is_higher_than_wide_or_the_other_way_round(made_of, shape):
    model = made_of(Shaped(*shape))
    assert model.feature_size == (2, 3) and model.features(images()).shape == (2, 2, 3, 8)


@pytest.mark.parametrize("shape", [(8, 2, 2), (2, 2, 8), (4, 8)])
def test_features_of_every_layout_carry_a_gradient(made_of, shape):
    leaf = images().requires_grad_()
    (slope,) = torch.autograd.grad(made_of(Shaped(*shape)).features(leaf).sum(), leaf)
    # Two images of 32 features each.
    torch.testing.assert_close(slope, torch.full_like(leaf, 2 * 32 / leaf.numel()))


@pytest.mark.parametrize(
    "backbone",
    [Pyramid(8, 2, 2), Shaped(8), Shaped(8, 2, 2, 2), Shaped(4, 2, 2), Shaped(4, 4, channels=1)],
    ids=["several", "pooled", "volume", "other_channels", "as_many_channels_as_images"],
)
def test_a_backbone_without_a_feature_map(made_of, backbone):
    with pytest.raises(UserError, match="backbone test_resnet gives no feature map; choose another timm model"):
        made_of(backbone)


def test_features_carry_a_gradient_only_where_one_is_wanted():
    model = make().eval()
    leaf = images().requires_grad_()
    assert model.features(leaf).requires_grad
    with torch.no_grad():
        assert not model.features(leaf).requires_grad
    model.freeze_backbone(True)
    assert not model.features(leaf).requires_grad


def test_output_stride():
    assert make(output_stride=8).feature_size == (8, 8)
    assert make(output_stride=16).feature_size == (4, 4)
    assert make().feature_size == (2, 2)


def test_cnn_features_stay_channels_last_without_a_copy():
    model = make().to(memory_format=torch.channels_last)
    features = model.features(images().to(memory_format=torch.channels_last))
    assert features.is_contiguous()


@torch.no_grad()
def test_one_pass_gives_the_logits_of_every_alpha():
    model = make().eval()
    every = model(images(), alpha=1.0, boost=True)
    for alpha in (0.5, 1.0, 5.0):
        torch.testing.assert_close(every.at_alpha(alpha), model(images(), alpha=alpha).logits)
    plain = model(images())
    assert plain.mean_relu is None and torch.equal(plain.logits, plain.mean)
    assert torch.equal(model.classify(model.features(images())).logits, plain.mean), "of itself alpha is 1"
    with pytest.raises(ValueError, match="boost=True"):
        plain.at_alpha(5.0)
    pooled = linear(model.features(images()).mean((1, 2)), model.head.weight, model.head.bias)
    torch.testing.assert_close(plain.logits, pooled)


def test_maps_of_asked_classes_average_to_the_logits():
    model = make(output_stride=8).eval()
    out = model(images(), classes=torch.tensor([[0, 4], [2, -1]]))
    assert out.maps.shape == (2, 2, 8, 8) and not out.maps.requires_grad and out.masked is None
    torch.testing.assert_close(out.maps[0].mean((1, 2)), out.mean[0, [0, 4]])
    assert out.maps[1, 1].abs().max() == 0


def test_masked_images_take_the_place_of_maps():
    """Of a classifier whose map of class 0 is its feature 0: what is kept lies where that is large."""
    model = make(output_stride=8).eval()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(5, 96))
    classes, mask = torch.tensor([[0], [-1]]), MaskOptions(0.5, "per_image", 16)
    out = model(images(), classes=classes, mask=mask)
    assert out.maps is None and not out.masked.requires_grad
    maps = model(images(), classes=classes).maps
    assert torch.equal(out.masked, map_mask(maps, classes, images(), 0.5))
    assert torch.equal(out.masked[1], images()[1]), "an image without a class stays as it is"
    kept = out.masked[0].ne(0).any(0)
    assert kept.any() and not kept.all()
    # The images that are masked may be others than those that the map was made of.
    other = images(seed=9)
    again = model.classify(model.features(images()), classes=classes, images=other, mask=mask)
    assert torch.equal(again.masked[0], other[0] * kept)
    assert model.classify(model.features(images()), classes=classes, images=other).masked is None


def test_logits_are_fp32_under_autocast():
    model = make(alpha_train=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images(), alpha=5.0)
        features = model.features(images())
    assert features.dtype == torch.bfloat16
    assert out.logits.dtype == out.mean.dtype == out.mean_relu.dtype == torch.float32
    exact = linear(features.double().mean((1, 2)), model.head.weight.double(), model.head.bias.double())
    torch.testing.assert_close(out.mean.double(), exact, rtol=0, atol=1e-5)


def test_head_starts_as_the_released_convolution_does():
    head = make(classes=200).head
    bound = 96**-0.5
    for parameter in (head.weight, head.bias):
        assert 0.9 * bound < parameter.max() <= bound and 0.9 * bound < -parameter.min() <= bound
    assert head.weight.shape == (200, 96) and head.bias.shape == (200,)


def test_a_head_made_by_hand_needs_neither_grid_nor_options():
    assert CamHead(96, 5).options == HeadOptions() == make().head.options


@pytest.mark.parametrize(("head", "has_map"), [("cam", True), ("ml_decoder", False), ("query2label", False)])
def test_alpha_is_one_for_heads_without_a_map(head, has_map):
    model = make(head=head, head_options={"preset": "tiny"} if head == "query2label" else {})
    assert model.head.supports_boostlu is has_map and model.head.affine_in_mean is has_map
    assert (model.alpha_train, model.alpha_eval) == ((5, 5) if has_map else (1, 1))


@torch.no_grad()
def test_a_head_takes_the_solution_of_its_affine_map():
    """At alpha 1 its logits are W times the mean feature plus b, of whatever W and b it is given."""
    model = make().eval()
    weight, bias = torch.randn(5, 96), torch.randn(5)
    model.head.set_affine(weight, bias)
    pooled = model.features(images()).mean((1, 2))
    torch.testing.assert_close(model(images()).logits, linear(pooled, weight, bias))


def test_a_head_that_does_not_exist():
    with pytest.raises(UserError) as error:
        make(head="camm")
    assert str(error.value) == (
        "model.head: there is no head 'camm'; choose one of cam, ml_decoder, query2label (did you mean cam?)"
    )


def test_normalisation_is_the_backbones():
    assert make("resnet18").input_normalisation() == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert make("test_vit").input_normalisation() == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
