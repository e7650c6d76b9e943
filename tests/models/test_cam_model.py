"""The classifier for tools that draw maps: its own logits, layers in PyTorch's shape, and the tools themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.core.errors import UserError
from spml_fast.models.cam_model import CamModel
from spml_fast.models.classifier import Classifier
from tests.support.classifiers import CNN, CONVNEXT, SWIN, VIT, images, make

GRAD_CAM = "grad-cam is not installed (pip install 'spml_fast[cam]')"
TORCH_CAM = "torchcam is not installed (pip install 'spml_fast[cam]')"


def own_map(classifier: Classifier, views: Tensor, class_id: int) -> Tensor:
    """What speaks for a class, without the bias, scaled to 0..1 as the tools do it, [B, h, w]."""
    ids = torch.full((len(views), 1), class_id)
    with torch.no_grad():
        maps = classifier(views, classes=ids).maps[:, 0] - classifier.head.bias[class_id]
    maps = maps.clamp(min=0)
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


class TestModule:
    @pytest.mark.parametrize(("backbone", "side"), [(CNN, 64), (VIT, 160), (CONVNEXT, 64)])
    def test_logits_and_layer(self, backbone: str, side: int) -> None:
        classifier = make(backbone, side).eval()
        model, views = CamModel(classifier), images(2, side)
        seen = []
        model.target_layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
        logits = model(views)
        assert torch.equal(logits, classifier(views).logits) and not model.training
        assert seen[0].shape == (2, classifier.channels, *classifier.feature_size)
        logits[0, 1].backward()

    def test_alpha(self) -> None:
        classifier = make().eval()
        assert torch.equal(CamModel(classifier, 5)(images()), classifier(images(), alpha=5.0).logits)
        with pytest.raises(UserError, match="alpha is 0"):
            CamModel(classifier, 0)

    def test_gradients_of_a_frozen_backbone(self) -> None:
        """Tools ask for the gradient at the layer, which frozen parameters would not give."""
        classifier = make().eval()
        classifier.freeze_backbone(True)
        model, found = CamModel(classifier), []
        hook = model.target_layers[0].register_forward_hook(
            lambda _m, _i, out: out.register_hook(found.append) and None
        )
        model(images())[:, 2].sum().backward()
        hook.remove()
        cells = classifier.feature_size[0] * classifier.feature_size[1]
        wanted = (classifier.head.weight[2] / cells)[None, :, None, None].expand_as(found[0])
        torch.testing.assert_close(found[0], wanted)
        with torch.no_grad():
            assert not model(images()).requires_grad

    def test_layers_within_the_backbone(self) -> None:
        vit = CamModel(make(VIT, 160).eval())
        tokens = torch.randn(2, 101, 64)
        assert torch.equal(vit.reshape_transform(tokens)[1, :, 3, 4], tokens[1, 1 + 34])
        with pytest.raises(ValueError, match="97 tokens are no square grid"):
            vit.reshape_transform(torch.zeros(1, 98, 64))
        maps = torch.randn(1, 8, 4, 4)
        assert CamModel(make().eval()).reshape_transform(maps) is maps

    @pytest.mark.slow
    def test_channels_last_backbones(self) -> None:
        swin = CamModel(make(SWIN, 224).eval())
        maps = torch.randn(1, 7, 6, 5)
        assert torch.equal(swin.reshape_transform(maps), maps.permute(0, 3, 1, 2))
        assert swin.features(images(1, 224)).shape == (1, 768, 7, 7)


class TestTools:
    """The packages, where they are installed."""

    def test_grad_cam(self) -> None:
        """With a linear head Grad-CAM is the class activation map, which is the head's own."""
        tool = pytest.importorskip("pytorch_grad_cam", reason=GRAD_CAM)
        targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
        classifier, views = make(output_stride=8).eval(), images()
        model = CamModel(classifier)
        with tool.GradCAM(model, model.target_layers) as cam:
            found = cam(views, [targets.ClassifierOutputTarget(3)] * 2)
        assert found.shape == (2, 64, 64) and found.min() == 0 and found.max() == pytest.approx(1, abs=1e-5)
        wanted = own_map(classifier, views, 3)
        for row in range(2):
            # The tool enlarges its map, so the peak is compared.
            y, x = np.unravel_index(found[row].argmax(), (64, 64))
            cell = int(wanted[row].argmax())
            assert abs(y / 8 - 0.5 - cell // 8) <= 1 and abs(x / 8 - 0.5 - cell % 8) <= 1

    def test_grad_cam_within_a_transformer(self) -> None:
        tool = pytest.importorskip("pytorch_grad_cam", reason=GRAD_CAM)
        targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
        model = CamModel(make(VIT, 160).eval())
        for layers, reshape in ((model.target_layers, None), ([model.backbone.blocks[-1]], model.reshape_transform)):
            with tool.GradCAM(model, layers, reshape_transform=reshape) as cam:
                found = cam(images(1, 160), [targets.ClassifierOutputTarget(1)])
            assert found.shape == (1, 160, 160) and found.max() > 0

    def test_torch_cam(self) -> None:
        methods = pytest.importorskip("torchcam.methods", reason=TORCH_CAM)
        classifier, views = make(output_stride=8).eval(), images()
        model = CamModel(classifier)
        wanted = own_map(classifier, views, 3)
        with methods.CAM(model, model.target_layers, fc_layer=model.head) as cam:
            with torch.no_grad():
                model(views)
            torch.testing.assert_close(cam(3)[0], wanted, atol=1e-5, rtol=0)
        with methods.GradCAM(model, model.target_layers) as cam:
            torch.testing.assert_close(cam(3, model(views))[0], wanted, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(("head", "options"), [("ml_decoder", {"groups": 2}), ("query2label", {"preset": "tiny"})])
    def test_torch_cam_of_heads_with_queries(self, head: str, options: dict[str, object]) -> None:
        methods = pytest.importorskip("torchcam.methods", reason=TORCH_CAM)
        model = CamModel(make(head=head, head_options=options, output_stride=8).eval())
        with methods.LayerCAM(model, model.target_layers) as cam:
            found = cam(2, model(images()))[0]
        assert found.shape == (2, 8, 8) and found.max() > 0
