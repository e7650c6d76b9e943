"""Activation checkpointing."""

from __future__ import annotations

import pytest
import torch

from spml_fast.core.config import ModelConfig
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_activation_checkpointing_gives_the_same_gradients(backbone):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    saved, gradients, statistics = [], [], []
    for on in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(backbone=backbone, pretrained=False, grad_checkpointing=on)
        classifier = Classifier(config, 4, 64).train()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, into: list[int] = sizes) -> torch.Tensor:
            into.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = classifier(images, alpha=5.0).logits.square().sum()
        saved.append(sum(sizes))
        # As the trainer does: a second forward must not move BatchNorm's statistics again.
        with bn_behaviour(classifier, "no_update" if on else "update"):
            loss.backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters()})
        statistics.append({name: b for name, b in classifier.named_buffers() if "running" in name})
    assert saved[1] < 0.6 * saved[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])
    assert bool(statistics[0]) == (backbone == "test_resnet")
