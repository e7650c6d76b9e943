"""Frozen BatchNorm statistics and frozen backbones."""

from __future__ import annotations

import pytest
import torch

from tests.support.classifiers import images, make


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


def test_what_is_frozen_stands_still_from_the_start():
    """Before anybody has asked for a mode: in a new classifier, which trains as all new modules do."""
    model = make(freeze_bn=True, freeze=["layer1.*"])
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert model.training and model.backbone.training and norms and not any(m.training for m in norms)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad is not name.startswith("layer1."), name


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
