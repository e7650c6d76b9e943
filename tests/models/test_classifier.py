"""Backbones, features that lie where the image says, frozen parts, and weights from files."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier

CNN, VIT, SWIN, CONVNEXT = "test_resnet", "test_vit", "swin_tiny_patch4_window7_224", "test_convnext"
SHAPES = {CNN: (4, 96), VIT: (8, 64), SWIN: (4, 768), CONVNEXT: (4, 64)}
SHAPES |= {"test_efficientnet": (4, 256), "test_mambaout": (4, 64), "test_vit4": (8, 96), "test_vit_relpos": (8, 96)}
EXACT = (CNN, VIT, SWIN, CONVNEXT)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def make(backbone=CNN, image_size=64, classes=5, **options):
    torch.manual_seed(0)
    return Classifier(ModelConfig(backbone=backbone, pretrained=False, **options), classes, image_size)


def images(count=2, side=64, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# ---- features


@pytest.mark.parametrize("backbone", SHAPES)
@torch.no_grad()
def test_cells_lie_where_the_image_says(backbone):
    side, channels = SHAPES[backbone]
    model = make(backbone, 128).eval()
    assert model.feature_size == (side, side) and model.channels == channels
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
    with pytest.raises(ValueError, match="boost=True"):
        plain.at_alpha(5.0)
    pooled = linear(model.features(images()).mean((1, 2)), model.head.weight, model.head.bias)
    torch.testing.assert_close(plain.logits, pooled)


@torch.no_grad()
def test_maps_of_asked_classes_average_to_the_logits():
    model = make(output_stride=8).eval()
    out = model(images(), classes=torch.tensor([[0, 4], [2, -1]]))
    assert out.maps.shape == (2, 2, 8, 8)
    torch.testing.assert_close(out.maps[0].mean((1, 2)), out.mean[0, [0, 4]])
    assert out.maps[1, 1].abs().max() == 0


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
        assert parameter.abs().max() <= bound and parameter.abs().max() > 0.9 * bound
    assert head.weight.shape == (200, 96) and head.bias.shape == (200,)


def test_normalisation_is_the_backbones():
    assert make("resnet18").input_normalisation() == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert make("test_vit").input_normalisation() == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


# ---- frozen parts


def statistics(model):
    return {k: v.clone() for k, v in model.backbone.named_buffers() if "running" in k}


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_bn(frozen):
    model = make(freeze_bn=frozen).train()
    before = statistics(model)
    model(images(), alpha=5.0).logits.sum().backward()
    after = statistics(model)
    assert all(torch.equal(before[k], after[k]) for k in before) is frozen
    assert model.training and model.backbone.training
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.training is not frozen for m in norms)
    assert all(m.weight.grad is not None for m in norms), "its weights still train"
    model.eval()
    assert not any(m.training for m in norms)
    model.train()
    assert all(m.training is not frozen for m in norms)


def test_freeze_backbone():
    model = make().train()
    model.freeze_backbone(True)
    before = statistics(model)
    assert model.training and not any(m.training for m in model.backbone.modules())
    out = model(images(), alpha=5.0).logits
    assert not model.features(images()).requires_grad
    out.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())
    model.train()
    assert not model.backbone.training
    model.freeze_backbone(False)
    assert model.backbone.training
    model(images(), alpha=5.0).logits.sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_a_frozen_backbone_in_evaluation_stays_in_evaluation_when_thawed():
    model = make().eval()
    model.freeze_backbone(True)
    model.freeze_backbone(False)
    assert not model.training and not model.backbone.training


# ---- weights


@pytest.mark.parametrize(("backbone", "file"), [(CNN, "w.safetensors"), (CNN, "w.pth"), (VIT, "w.safetensors")])
def test_local_weights_are_loaded(tmp_path, backbone, file):
    torch.manual_seed(99)
    source = (
        timm.create_model(backbone, pretrained=False, img_size=64) if backbone == VIT else timm.create_model(backbone)
    )
    for buffer in source.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    (save_file if file.endswith("safetensors") else torch.save)(source.state_dict(), str(tmp_path / file))
    model = make(backbone, weights=str(tmp_path / file))
    loaded, expected = model.backbone.state_dict(), source.state_dict()
    assert len(loaded) > 10
    for key, value in loaded.items():
        assert torch.equal(value, expected[key]), key
    torch.testing.assert_close(
        model.eval().backbone.forward_features(images()), source.eval().forward_features(images())
    )


def test_loading_weights_leaves_the_random_head_as_it_is_without(tmp_path):
    save_file(timm.create_model(CNN).state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(make(weights=str(tmp_path / "w.safetensors")).head.weight, make().head.weight)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize(
    ("other", "file"), [(VIT, "w.pth"), ("test_efficientnet", "w.safetensors"), ("resnet18", "w.pth")]
)
def test_weights_of_another_model(tmp_path, other, file):
    state = timm.create_model(other).state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(state, str(tmp_path / file))
    with pytest.raises(UserError) as error:
        make(weights=str(tmp_path / file))
    text = one_sentence(error)
    assert file in text and CNN in text


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "w.bin"])
@pytest.mark.parametrize("content", [b"", b"hello, I am no weights"])
def test_damaged_weights(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded into backbone test_resnet") as error:
        make(weights=str(tmp_path / file))
    assert file in one_sentence(error)


def test_weights_that_lack_a_layer(tmp_path):
    state = timm.create_model(CNN).state_dict()
    del state["layer4.0.conv1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"has no weights for 1 of .* layer4.0.conv1.weight") as error:
        make(weights=str(tmp_path / "w.safetensors"))
    one_sentence(error)


def test_missing_weights_file(tmp_path):
    with pytest.raises(UserError, match=r"model.weights: .*nowhere.pth does not exist"):
        make(weights=str(tmp_path / "nowhere.pth"))


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="pretrained weights of test_resnet could not be downloaded") as error:
        Classifier(ModelConfig(backbone=CNN, pretrained=True), 5, 64)
    assert "--model.weights FILE" in one_sentence(error) and "--model.pretrained false" in str(error.value)


# ---- what cannot be made


@pytest.mark.parametrize(
    ("backbone", "options", "says"),
    [
        ("resnet_50", {}, "timm has no model 'resnet_50'"),
        ("no_such_thing", {}, "timm has no model 'no_such_thing'"),
        (CNN, {"output_stride": 7}, "backbone test_resnet cannot be made with output_stride 7"),
        (VIT, {"output_stride": 8}, "backbone test_vit cannot be made with output_stride 8"),
        (CNN, {"alpha_train": 0.0}, "model.alpha_train is 0.0"),
        (CNN, {"alpha_eval": -1.0}, "model.alpha_eval is -1.0"),
        (CNN, {"alpha_eval": float("nan")}, "model.alpha_eval is nan"),
    ],
)
def test_bad_options_are_one_sentence(backbone, options, says):
    with pytest.raises(UserError) as error:
        make(backbone, **options)
    assert one_sentence(error).startswith(says)


def test_a_name_nearly_right_gets_a_suggestion():
    with pytest.raises(UserError, match=r"did you mean .*resnet50"):
        make("resnet50x")


def test_a_image_size_that_the_backbone_cannot_take():
    with pytest.raises(UserError, match="backbone test_vit does not take 60 px images") as error:
        make(VIT, 60)
    one_sentence(error)
