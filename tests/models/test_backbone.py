"""Backbones: weights from files, and what cannot be made."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier
from tests.support.classifiers import CNN, VIT, images, make, one_sentence


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
