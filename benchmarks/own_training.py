"""Training and evaluation as `spml-fast train` makes them, an epoch at a time, for comparisons with others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timm_rival import LOSSES
from spml_fast.core.batch import Batch
from spml_fast.core.config import Config, DataConfig, EngineConfig, EvalConfig, ModelConfig, TrainConfig
from spml_fast.data.labels import LabelStore
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Split
from spml_fast.evaluation.evaluate import evaluate_split
from spml_fast.methods import Progress, get_method
from spml_fast.models.classifier import Classifier
from spml_fast.runs.open import input_normalisation, make_eval_loader
from spml_fast.training.engine import Engine
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.module import TrainingModule
from spml_fast.training.optim import make_optimizer, make_schedule, parameter_groups


class OwnTraining:
    """One training; the head is a linear layer on the spatial mean, as timm's (BoostLU's factor is 1).

    Args:
        splits: training split, of which all known labels are seen, and the one that is evaluated.
        classes: their names.
        options: as in `TimmTraining`.
        device: that trains.
        folder: of the Manifest.
    """

    def __init__(
        self, splits: Sequence[Split], classes: Sequence[str], options: Any, device: torch.device, folder: Path
    ) -> None:
        self.train_split, self.eval_split = splits
        self.classes, self.epochs = classes, options.epochs
        method_class = get_method(LOSSES[options.loss][1])
        self.config = Config(
            method_class.Options(name=LOSSES[options.loss][1], **LOSSES[options.loss][2]),
            DataConfig(dir=str(folder), image_size=options.image_size, hflip=0.0, threads=options.threads),
            ModelConfig(backbone=options.backbone, pretrained=False, alpha_train=1.0, alpha_eval=1.0),
            TrainConfig(
                epochs=options.epochs,
                batch_size=options.batch_size,
                lr=options.lr,
                head_lr_multiplier=1.0,
                optimizer="adamw",
                weight_decay=options.weight_decay,
                precision=options.precision,
                # As timm's loader does in training.
                drop_last=True,
            ),
            EvalConfig(batch_size=options.eval_batch_size, empty_classes="zero"),
            EngineConfig(tensorboard=False),
        )
        train = self.config.train
        self.store = LabelStore(self.train_split.known, device)
        self.classifier = Classifier(self.config.model, len(classes), options.image_size)
        method = method_class(self.config.method, self.store)
        mean, std = input_normalisation(self.config, self.classifier)
        self.loader = TrainLoader(
            self.train_split,
            self.config.data,
            views=method.views,
            batch_size=train.batch_size,
            accumulation=1,
            seed=options.seed,
            device=device,
            mean=mean,
            std=std,
        )
        groups = parameter_groups(self.classifier, method, train, head_only=False)
        optimizer = make_optimizer(groups, train)
        schedule = make_schedule(optimizer, train, options.epochs * self.loader.updates_per_epoch)
        self._scratch = tempfile.TemporaryDirectory()
        settings = deepspeed_config(train, self.config.deepspeed, 1, device, Path(self._scratch.name))
        self.engine = Engine(TrainingModule(self.classifier, method), optimizer, schedule, settings)
        self.eval_loader = make_eval_loader(self.config, self.eval_split, self.classifier, device)

    def train_epoch(self, epoch: int) -> int:
        """Train an epoch; returns the number of images."""
        self.engine.train()
        images, lr = 0, self.config.train.lr
        for update, (micro,) in enumerate(self.loader.epoch(epoch)):
            done = (epoch - 1) * self.loader.updates_per_epoch + update
            progress = Progress(epoch, self.epochs, done, self.loader.updates_per_epoch, "finetune", lr)
            batch = Batch(micro.views, self.store.rows(micro.index), micro.index, micro.update_size)
            self.engine.backward(self.engine(batch, progress)[0])
            self.engine.step()
            images += len(micro.index)
        return images

    def evaluate(self) -> float:
        """mAP of the evaluated split, in per cent; classes without a positive count as 0."""
        found = evaluate_split(self.classifier, self.eval_loader, self.eval_split, [1.0], self.config, self.classes)
        return float(found[1.0]["map"])

    def close(self) -> None:
        """Release the engine and its folder."""
        self.engine.close()
        self._scratch.cleanup()
