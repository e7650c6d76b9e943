"""The boosted logits and all their gradients against a literal phi-GAP: phi on the full map, then the mean.

Source: BoostLU (CVPR 2023); docs/sources.md#boostlu.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spml_fast.core.config import ModelConfig
from spml_fast.models.classifier import Classifier, boosted_logits
from spml_fast.models.heads import Head, HeadOutput, get_head, head_names
from tests.support.paths import ROOT

CLASSES, SIDE = 5, 64


def cam_map(head: Head, features: Tensor) -> Tensor:
    """Map [B, C, h, w] of the CAM head, in PyTorch's own words."""
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    return torch.nn.functional.conv2d(features.permute(0, 3, 1, 2), weight[:, :, None, None], bias)


# Every head that boosts has its map written out here.
FULL_MAPS: dict[str, Callable[[Head, Tensor], Tensor]] = {"cam": cam_map}


def make(name: str) -> tuple[Classifier, Tensor]:
    """A classifier in fp64 whose maps have cells of both signs in every class, and images that want a gradient."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", pretrained=False, output_stride=8, head=name, freeze_bn=True)
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    classifier = Classifier(config, CLASSES, SIDE).double().train()
    with torch.no_grad():
        # timm starts the scale of every residual branch at 0, and nothing would reach what lies before it.
        for place, parameter in classifier.backbone.named_parameters():
            if parameter.ndim == 1 and not parameter.any() and place.endswith("weight"):
                parameter.fill_(0.5)
        maps = FULL_MAPS[name](classifier.head, classifier.features(images))
        classifier.head.get_parameter("bias").sub_(maps.mean((0, 2, 3)))
    return classifier, images.requires_grad_()


def phi_gap(maps: Tensor, alpha: float) -> Tensor:
    """phi(m) = alpha m where m > 0, else m; mean over the cells."""
    return torch.where(maps > 0, alpha * maps, maps).mean((2, 3))


def slopes(logits: Tensor, classifier: Classifier, images: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Gradients for the images and all parameters of backbone and head."""
    wanted = {"images": images, **dict(classifier.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((logits * upstream).sum(), list(wanted.values())), strict=True))


def test_every_head_that_boosts_is_tested() -> None:
    assert {name for name in head_names() if get_head(name).supports_boostlu} == set(FULL_MAPS)


@pytest.mark.parametrize("alpha", [5.0, 1.0, 0.5])
@pytest.mark.parametrize("name", FULL_MAPS)
def test_logits_and_gradients_are_those_of_the_boosted_map(name: str, alpha: float) -> None:
    classifier, images = make(name)
    maps = FULL_MAPS[name](classifier.head, classifier.features(images))
    assert ((maps > 0).any(3).any(2).any(0) & (maps < 0).any(3).any(2).any(0)).all(), (
        "the boost has nothing to tell apart"
    )
    upstream = torch.randn(3, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = phi_gap(maps, alpha)
    literal = slopes(expected, classifier, images, upstream)
    assert all(slope.abs().max() > 0 for slope in literal.values())
    every = classifier(images, alpha=1.0, boost=True)
    outputs = {
        "forward": classifier(images, alpha=alpha).logits,
        "at_alpha": every.at_alpha(alpha),
        "classify": classifier.classify(classifier.features(images), alpha).logits,
    }
    for way, logits in outputs.items():
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12, msg=way)
        for parameter, slope in slopes(logits, classifier, images, upstream).items():
            torch.testing.assert_close(slope, literal[parameter], rtol=1e-9, atol=1e-12, msg=f"{way}, {parameter}")


@pytest.mark.parametrize("name", FULL_MAPS)
def test_the_two_means_and_their_gradients(name: str) -> None:
    classifier, images = make(name)
    features = classifier.features(images)
    maps = FULL_MAPS[name](classifier.head, features)
    output = classifier.head(features)
    assert isinstance(output, HeadOutput)
    upstream = torch.randn(3, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mean, expected in ((output.mean, maps.mean((2, 3))), (output.mean_relu, maps.relu().mean((2, 3)))):
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        (ours,) = torch.autograd.grad((mean * upstream).sum(), features, retain_graph=True)
        (literal,) = torch.autograd.grad((expected * upstream).sum(), features, retain_graph=True)
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-12)


def test_the_formula_at_a_point() -> None:
    """The map [[1, -2], [3, 0]]: mean 0.5, mean of the positive part 1; phi-GAP at alpha 5 is 4.5."""
    mean = torch.tensor([0.5], requires_grad=True)
    relu = torch.tensor([1.0], requires_grad=True)
    logits = boosted_logits(mean, relu, 5.0)
    assert logits.item() == 4.5
    assert [g.item() for g in torch.autograd.grad(logits, (mean, relu))] == [1.0, 4.0]
    assert boosted_logits(mean, None, 1.0) is mean
    with pytest.raises(ValueError, match="boost=True"):
        boosted_logits(mean, None, 5.0)


def test_nobody_else_computes_them() -> None:
    """Heads give the two means; the factor alpha - 1 stands in the classifier's file alone."""
    package = ROOT / "spml_fast"
    writers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                left = ast.unparse(node.left)
                if left.split(".")[-1].startswith("alpha") and ast.unparse(node.right) == "1":
                    writers.add(str(path.relative_to(package)))
    assert writers == {"models/classifier.py"}
    for name in head_names():
        assert get_head(name).forward.__annotations__["return"] == "HeadOutput", name
