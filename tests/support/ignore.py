"""Logits, methods and rigs for IGNORE's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spml_fast.core.batch import Batch
from spml_fast.core.config import ModelConfig
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Progress
from spml_fast.methods.ignore import Ignore, IgnoreOptions
from spml_fast.models.classifier import Classifier
from tests.support.methods import Rig

D = torch.float64
Z = [[2, 0.5, -1], [-0.5, 1.5, 0.2]]
STRONG = [[1.5, 1, -2], [0.3, 1, -0.4]]
MASKED = [[1.8, -1, -1.2], [0.1, 1.2, 0.9]]
CODES = [[1, -1, -1], [-1, 1, -1]]


def epoch(number: int, update: int = 0) -> Progress:
    """A place in a run."""
    return Progress(number, 10, update, 4)


def method_for(codes: object, **options: Any) -> Ignore:
    """The method in fp64 on a store with these codes [N, C]."""
    store = LabelStore(SparseLabels.from_dense(np.asarray(codes, dtype=np.int8)))
    return Ignore(IgnoreOptions(**options), store).to(D)


def batch_of(codes: object, global_size: int | None = None) -> Batch:
    """A batch without images."""
    labels = torch.as_tensor(codes, dtype=torch.int8)
    return Batch({}, labels, torch.arange(len(labels)), global_size or len(labels))


def random_case(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Weak, strong, masked logits in fp64 and int8 codes: a positive or two a row, some negatives, an empty row."""
    generator = torch.Generator().manual_seed(seed)
    weak, strong, masked = (2 * torch.randn(batch, classes, generator=generator, dtype=D) for _ in range(3))
    codes = torch.full((batch, classes), -1, dtype=torch.int8)
    codes[torch.arange(batch), torch.arange(batch) % classes] = 1
    codes[torch.arange(batch), (torch.arange(batch) + 2) % classes] = (
        torch.arange(batch).remainder(2).neg().to(torch.int8)
    )
    codes[-1] = -1
    codes[0, 1] = 1
    return weak, strong, masked, codes


def make_rig(name: str = "ignore", **options: object) -> Rig:
    """The shared rig with images and maps large enough to be masked: 8 x 8 cells of 64 x 64 pixels."""
    rig = Rig(name, **options)
    torch.manual_seed(3)
    config = ModelConfig(backbone="test_resnet", pretrained=False, freeze_bn=True, alpha_train=2.0, output_stride=8)
    rig.classifier = Classifier(config, 6, 64).train()
    rig.images = {view: torch.randn(len(p), 3, 64, 64) for view, p in rig.images.items()}
    return rig


def count_calls(classifier: Classifier) -> list[torch.Tensor]:
    """The images of every forward from now on."""
    calls: list[torch.Tensor] = []
    classifier.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0]))
    return calls
