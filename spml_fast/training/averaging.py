"""Averages of the weights over updates, which are what is evaluated and saved in the place of the last ones."""

from __future__ import annotations

from typing import TypeAlias

from timm.utils import ModelEmaV3

from spml_fast.core.config import TrainConfig
from spml_fast.models.classifier import Classifier

WeightAverage: TypeAlias = ModelEmaV3
"""What keeps an average: `update(classifier, step)` takes the weights in, `module` has the average."""


def weight_average(classifier: Classifier, train: TrainConfig, linear: bool) -> WeightAverage | None:
    """The average that a phase keeps, at its start the classifier's own weights; None where it keeps none.

    With `train.ema_decay` d the weights after update t count (1 - d) d^(T - t), after a warm-up. With
    `train.average_weights` all updates of fine-tuning count alike, and the weights that it starts from as one of them:
    after T updates (w_0 + ... + w_T) / (T + 1). A head that is trained by steps is not averaged so, since it starts
    from random weights.

    Args:
        classifier: on its device.
        train: the options.
        linear: whether the phase is the linear one.

    Source: docs/sources.md#weight-averaging.
    """
    if train.ema_decay:
        return ModelEmaV3(classifier, train.ema_decay, use_warmup=True)
    if train.average_weights and not linear:
        # timm's warm-up of power 1 is that mean: at update t the average so far keeps 1 - 1 / (1 + t).
        return ModelEmaV3(classifier, decay=1.0, use_warmup=True, warmup_power=1.0, update_after_step=-1)
    return None
