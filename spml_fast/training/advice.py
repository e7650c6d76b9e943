"""Options that make no sense together: what a run says about them before it trains. Nothing is changed."""

from __future__ import annotations

import numpy as np

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.text import counted
from spml_fast.models.batchnorm import BATCH_NORMS
from spml_fast.models.classifier import Classifier
from spml_fast.training.setup import RunData

# Adam's rates outside of which nothing was ever reported to work: too small to leave random weights within ten epochs,
# and large enough to lose what pretrained weights know.
SMALLEST_FOR_RANDOM, LARGEST_FOR_PRETRAINED = 1e-4, 1e-3
# Fewer images than these make statistics that say little: of a BatchNorm, and of a validation.
FEW_IN_A_BATCH, FEW_TO_VALIDATE = 8, 50
# Larger images than the data have add arithmetic and no detail.
TOO_LARGE = 1.5


def opening_notes(config: Config, data: RunData, classifier: Classifier, updates: int) -> list[str]:
    """The lines after a run's first one: warnings, and what it will lack. As `warnings_of`."""
    notes = [f"warning: {sentence}" for sentence in warnings_of(config, data, classifier, updates)]
    if data.val is None:
        notes.append("no validation split: the weights of the last epoch are kept, not the best ones")
    if data.test is None:
        notes.append("no test split: there will be no test figures")
    return notes


def warnings_of(config: Config, data: RunData, classifier: Classifier, updates: int) -> list[str]:
    """One sentence for each combination of options that is probably a mistake.

    Args:
        config: the run's, with its epochs resolved.
        data: the run's.
        classifier: its feature map, and whether it has BatchNorm.
        updates: optimizer updates of the whole run.
    """
    found = [*_of_weights(config, classifier), *_of_sizes(config, data, classifier)]
    return [*found, *_of_choice(config, data, updates), *_of_boost(config, classifier)]


def _of_weights(config: Config, classifier: Classifier) -> list[str]:
    """Learning rates and what is frozen, against the weights that training starts from."""
    model, train = config.model, config.train
    pretrained = model.pretrained or model.weights is not None
    batch_norm = any(isinstance(module, BATCH_NORMS) for module in classifier.backbone.modules())
    adam = train.optimizer != "sgd"
    out = []
    if not pretrained:
        if adam and train.lr < SMALLEST_FOR_RANDOM:
            out.append(
                f"train.lr {train.lr:g} is for pretrained weights and hardly moves random ones: take 1e-3 to 3e-3 "
                "(--config scratch)"
            )
        if model.freeze_bn and batch_norm:
            out.append("model.freeze_bn keeps the BatchNorm statistics of random weights: leave it off")
        if train.linear_epochs:
            out.append(
                f"train.linear_epochs {train.linear_epochs} trains a head on random features: take 0 with "
                "model.pretrained false"
            )
        if model.freeze:
            out.append("model.freeze keeps random weights as they are: leave it out with model.pretrained false")
        return out
    if adam and train.lr > LARGEST_FOR_PRETRAINED:
        out.append(
            f"train.lr {train.lr:g} is for random weights and loses what pretrained ones know: take 1e-5 to 1e-4"
        )
    micro = train.batch_size / (train.accumulation * distributed.world_size())
    if batch_norm and not model.freeze_bn and not model.sync_bn and micro < FEW_IN_A_BATCH:
        images = "one image" if micro == 1 else f"{micro:g} images"
        out.append(
            f"BatchNorm normalises by {images} at a time, which ruins pretrained features: give a larger batch a rank, "
            "or --model.freeze_bn true"
        )
    return out


def _of_sizes(config: Config, data: RunData, classifier: Classifier) -> list[str]:
    """The batch against the data, and the image against the network and the data."""
    train, size, images = config.train, config.data.image_size, len(data.train)
    out = []
    if train.batch_size > images:
        out.append(
            f"train.batch_size {train.batch_size} is larger than the training split ({images} images), so that an "
            "epoch is one smaller update: take a fraction of the images"
        )
    height, width = classifier.feature_size
    if min(height, width) < 2:
        out.append(
            f"data.image_size {size} leaves {config.model.backbone} a feature map of {height} x {width}, on which "
            "class activation maps and BoostLU mean nothing: take twice the network's stride (64 px for most) or more"
        )
    sides = np.maximum(data.train.width[:10_000], data.train.height[:10_000])
    # 0 is a size that the Manifest does not know.
    largest = int(np.quantile(sides, 0.9))
    if 0 < TOO_LARGE * largest < size:
        out.append(f"data.image_size {size} only enlarges the images: nine in ten have {largest} px or fewer")
    return out


def _of_choice(config: Config, data: RunData, updates: int) -> list[str]:
    """What the validation split is to decide, and averages that are longer than the run."""
    train, out = config.train, []
    if data.val is None:
        stops = [name for name in ("stop_after_drop", "patience") if getattr(train, name)]
        out += [f"train.{name} does nothing without a validation split" for name in stops]
    elif len(data.val) < FEW_TO_VALIDATE:
        out.append(
            f"the validation split has {counted(len(data.val), 'image')}: the epoch that it chooses is chosen by chance"
        )
    if train.ema_decay and 1 / max(1 - train.ema_decay, 1e-12) > updates:
        out.append(
            f"train.ema_decay {train.ema_decay:g} averages over more updates than the run has ({updates}): take "
            f"{1 - 10 / max(updates, 11):.3g} or less"
        )
    return out


def _of_boost(config: Config, classifier: Classifier) -> list[str]:
    """BoostLU in training, where the paper found that it hurts."""
    if config.method.name != "an" or classifier.alpha_train == 1:
        return []
    return [
        f"method an with model.alpha_train {classifier.alpha_train:g}: boosting assumed negatives in training is worse "
        "than boosting at inference alone (BoostLU's paper); take --model.alpha_train 1"
    ]
