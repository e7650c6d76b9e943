"""Small classifiers on random images."""

from __future__ import annotations

import torch

from spml_fast.core.config import ModelConfig
from spml_fast.models.classifier import Classifier

CNN, VIT, SWIN, CONVNEXT = "test_resnet", "test_vit", "swin_tiny_patch4_window7_224", "test_convnext"


def make(backbone=CNN, image_size=64, classes=5, **options):
    torch.manual_seed(0)
    return Classifier(ModelConfig(backbone=backbone, pretrained=False, **options), classes, image_size)


def images(count=2, side=64, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text
