"""The average of the weights that a phase keeps."""

from __future__ import annotations

import pytest
import torch

from spml_fast.core.config import ModelConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier
from spml_fast.training.averaging import weight_average


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ModelConfig(backbone="test_resnet", pretrained=False), 3, 32)


def change(classifier: Classifier, step: int) -> None:
    """Other weights and statistics, as an update makes them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in classifier.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))


def test_all_updates_and_the_start_count_alike(classifier: Classifier) -> None:
    average = weight_average(classifier, TrainConfig(average_weights=True), linear=False)
    assert average is not None
    seen = [{name: value.clone() for name, value in classifier.state_dict().items()}]
    for step in range(1, 8):
        change(classifier, step)
        average.update(classifier, step=step)
        seen.append({name: value.clone() for name, value in classifier.state_dict().items()})
        if step in (1, 2, 7):
            for name, value in average.module.state_dict().items():
                if value.is_floating_point():
                    mean = torch.stack([weights[name].double() for weights in seen]).mean(0)
                    torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-5)


def test_which_phase_keeps_which(classifier: Classifier) -> None:
    assert weight_average(classifier, TrainConfig(), linear=False) is None
    assert weight_average(classifier, TrainConfig(average_weights=True), linear=True) is None
    decayed = weight_average(classifier, TrainConfig(ema_decay=0.5), linear=True)
    assert decayed is not None and decayed.get_decay(1000) == 0.5


def test_there_is_one_average() -> None:
    with pytest.raises(UserError, match=r"train\.average_weights and train\.ema_decay are two averages"):
        TrainConfig(average_weights=True, ema_decay=0.9)
