"""Training and evaluation put together from timm's own parts, as its training script does it for several labels.

timm's wheel has no train.py. From timm come the model, the loader with its worker processes and transforms, the task
with its loss, the optimizer and the evaluator; the loop around them is the script's. What differs from the script:

* images and labels come from a Manifest, by a reader of a few lines, as dense float targets; unknown labels are
  negatives, which is all that timm knows;
* images are squashed to the square without augmentation in both programs, and the learning rate is constant;
* no mixup, no exponential moving average, no checkpoints, no distribution, no torch.compile, none of which is its
  default or ours here;
* weights and images are channels_last, which the script does with --channels-last, and the optimizer is the fused one:
  the rival is the fastest that its options make it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import MultiLabelClassificationTask

from spml_fast.core.precision import autocast, autocast_dtype
from spml_fast.data.manifest import Split

# --loss -> options of timm's loss, and method and options of ours that say the same.
LOSSES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "bce": ({"loss_type": "bce", "smoothing": 0.0}, "an", {}),
    "asl": (
        {"loss_type": "asl", "asl_gamma_pos": 1.0, "asl_gamma_neg": 4.0, "asl_clip": 0.05, "asl_reduction": "sum"},
        "asl",
        {"gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05, "focal_weight": "attached", "reduction": "sum"},
    ),
}


class ManifestReader:
    """What timm's dataset reads: an open file and a dense target for each image of a split."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[BinaryIO, npt.NDArray[np.float32]]:
        codes = self.split.known.rows([index])[0]
        return open(self._path(index), "rb"), (codes == 1).astype(np.float32)

    def _path(self, index: int) -> str:
        return self.split.path(index)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Path of an image, for timm's messages."""
        return os.path.basename(self._path(index)) if basename else self._path(index)


class TimmTraining:
    """One training with timm's parts.

    Args:
        splits: training split and the one that is evaluated.
        num_classes: C.
        options: `backbone`, `image_size`, `batch_size`, `eval_batch_size`, `lr`, `weight_decay`, `precision`, `loss`
            and `threads` of the command line.
        device: that trains.
    """

    def __init__(self, splits: Sequence[Split], num_classes: int, options: Any, device: torch.device) -> None:
        self.device, self.batch_size = device, options.batch_size
        self.dtype = autocast_dtype(options.precision, device)
        model = timm.create_model(options.backbone, pretrained=False, num_classes=num_classes)
        model.to(device=device, memory_format=torch.channels_last)
        criterion = LOSSES[options.loss][0]
        self.task = MultiLabelClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
        decay = options.weight_decay
        self.optimizer = create_optimizer_v2(model, "adamw", lr=options.lr, weight_decay=decay, fused=True)
        self.train_loader, self.eval_loader = (
            self._loader(split, options, training) for split, training in zip(splits, (True, False), strict=True)
        )

    def _loader(self, split: Split, options: Any, training: bool) -> Any:
        size = options.image_size
        return create_loader(
            ImageDataset(str(split.image_root), reader=ManifestReader(split)),
            (3, size, size),
            options.batch_size if training else options.eval_batch_size,
            is_training=training,
            no_aug=True,
            crop_pct=1.0,
            crop_mode="squash",
            num_workers=options.threads,
            pin_memory=self.device.type == "cuda",
            device=self.device,
        )

    def train_epoch(self, epoch: int) -> int:
        """Train an epoch; returns the number of images."""
        self.task.train()
        images = 0
        for given, target in self.train_loader:
            given = given.contiguous(memory_format=torch.channels_last)
            with autocast(self.device, self.dtype):
                loss = self.task(given, target)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            images += len(given)
        return images

    @torch.inference_mode()
    def evaluate(self) -> float:
        """mAP of the evaluated split, in per cent; classes without a positive count as 0."""
        self.task.eval()
        evaluator = self.task.create_evaluator()
        for given, target in self.eval_loader:
            given = given.contiguous(memory_format=torch.channels_last)
            with autocast(self.device, self.dtype):
                output = self.task.get_trainable_module()(given)
            evaluator.update(output, target)
        return float(evaluator.compute()["map"])

    def close(self) -> None:
        """Nothing is held outside of this process but the loader's workers, which end with it."""
