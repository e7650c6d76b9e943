"""The training images as the network sees them in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spml_fast.core.precision import autocast, autocast_dtype
from spml_fast.data.loader import EvalLoader
from spml_fast.runs.open import make_eval_loader
from spml_fast.training.batchnorm_state import average_statistics

if TYPE_CHECKING:
    from spml_fast.training.trainer import Trainer


def training_scorer(trainer: Trainer) -> EvalLoader:
    """The loader of the training split's evaluation views."""
    if trainer.train_scorer is None:
        loader = trainer.loader
        trainer.train_scorer = make_eval_loader(
            trainer.config, loader.split, trainer.classifier, trainer.device, loader.bad_images, loader.decoded
        )
    return trainer.train_scorer


@torch.no_grad()
def score_training_split(trainer: Trainer) -> None:
    """A pass over the training split in evaluation mode, for methods that ask for it (collective)."""
    classifier, method = trainer.classifier, trainer.method
    average_statistics(classifier, trainer.ema)
    dtype = autocast_dtype(trainer.config.train.precision, trainer.device)
    classifier.eval()
    with training_scorer(trainer).watched("scoring the training images") as batches:
        for batch in batches:
            with autocast(trainer.device, dtype):
                logits = classifier(batch.views["eval"], alpha=classifier.alpha_train).logits
            if batch.real:
                method.on_train_scores(batch.index[: batch.real], logits[: batch.real])
    classifier.train()
