"""Where a head starts when it is told how frequent the classes are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier, prior_logits


def test_prior_logits_by_hand():
    positives, negatives = torch.tensor([3, 0, 0, 50]), torch.tensor([1, 5, 0, 0])
    logit = lambda p: float(np.log(p) - np.log1p(-p))  # noqa: E731
    by_labels = prior_logits(positives, negatives, 100, "labels", 0.01).tolist()
    assert by_labels == pytest.approx([logit(0.75), logit(0.01), logit(0.01), logit(0.99)], rel=1e-6)
    by_images = prior_logits(positives, negatives, 100, "pictures", 0.01).tolist()
    assert by_images == pytest.approx([logit(0.03), logit(0.01), logit(0.01), 0.0], rel=1e-6)
    with pytest.raises(UserError, match="no observed negative; use images"):
        prior_logits(positives, 0 * negatives, 100, "labels", 0.01)
    for floor in (0.5, 0.0):
        with pytest.raises(UserError, match=f"prior_floor is {floor};"):
            prior_logits(positives, negatives, 100, "labels", floor)


@pytest.mark.parametrize("head", ["cam", "ml_decoder", "query2label"])
def test_head_starts_at_the_prior(head):
    options = {"preset": "tiny"} if head == "query2label" else {}
    config = ModelConfig(
        backbone="test_resnet", pretrained=False, head=head, head_options=options, prior_bias="labels", alpha_train=5.0
    )
    classifier = Classifier(config, 4, 64)
    positives, negatives = torch.tensor([90, 1, 50, 60]), torch.tensor([10, 99, 50, 40])
    classifier.set_prior(positives, negatives, 1000)
    weight = classifier.head.weight if head == "cam" else classifier.head.classify.weight
    with torch.no_grad():
        weight.zero_()
        logits = classifier(torch.randn(2, 3, 64, 64), alpha=classifier.alpha_train).logits
    torch.testing.assert_close(torch.sigmoid(logits), torch.tensor([0.9, 0.01, 0.5, 0.6]).expand(2, 4))
