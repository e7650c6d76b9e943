"""Small classifiers on random images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spml_fast.core.config import ModelConfig
from spml_fast.models.classifier import Classifier

CNN, VIT, SWIN, CONVNEXT = "test_resnet", "test_vit", "swin_tiny_patch4_window7_224", "test_convnext"


def make(backbone: str = CNN, image_size: int = 64, classes: int = 5, **options: Any) -> Classifier:
    """A classifier with random weights, always the same for equal arguments."""
    torch.manual_seed(0)
    return Classifier(ModelConfig(backbone=backbone, pretrained=False, **options), classes, image_size)


def images(count: int = 2, side: int = 64, seed: int = 1) -> Tensor:
    """Images [count, 3, side, side] of noise."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error, which must be a single short line."""
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text
