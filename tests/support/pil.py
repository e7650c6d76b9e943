"""A loader of Pillow and torchvision, which tests and benchmarks compare ours with.

Its augmentation parameters are those of `spml_fast.data.augment`, so that its views can be compared with DALI's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from spml_fast.core.config import DataConfig
from spml_fast.data import augment
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from tests.support.paths import find_data

# Pillow's name of what shows an image with that EXIF orientation upright, as PIL.ImageOps.exif_transpose does it.
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def coco_mini() -> Path | None:
    """Folder of real photographs; None when there is none."""
    return find_data("coco_mini", "images")


def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A noisy image with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 7):
        small = rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32) / (
            1.6**octave
        )
    total += rng.normal(0, 6, total.shape)
    low, high = total.min(), total.max()
    span = rng.integers(150, 250)
    return Image.fromarray(((total - low) * (span / (high - low)) + rng.integers(0, 255 - span)).astype(np.uint8))


def make_split(
    folder: Path,
    root: Path,
    names: list[str],
    orientation: list[int] | None = None,
    sizes: list[tuple[int, int]] | None = None,
) -> Split:
    """A Manifest of images, with one class that all of them have.

    Args:
        folder: the Manifest.
        root: image folder.
        names: paths of the images, relative to it.
        orientation: EXIF orientation of each; None for 1.
        sizes: width and height of each as shown; None reads them from the images.
    """
    turned = orientation or [1] * len(names)
    if sizes is None:
        sizes = []
        for name, turn in zip(names, turned, strict=True):
            with Image.open(os.path.join(root, name)) as image:
                sizes.append(image.size if turn < 5 else image.size[::-1])
    writer = ManifestWriter(folder, "images", ["thing"], image_root=root)
    writer.add_split(
        "train",
        known=SparseLabels.from_positives([[0]] * len(names), 1, 0),
        width=[s[0] for s in sizes],
        height=[s[1] for s in sizes],
        orientation=turned,
        paths=names,
    )
    return writer.finish({}).split("train")


class ReferenceViews(Dataset[dict[str, Any]]):
    """Views of single samples, {"index": int, view: float32 [3, S, S]}, by Pillow and torchvision.

    Args:
        split: the images.
        config: the `data` section of a run.
        views: as in `spml_fast.data.loader.TrainLoader`; "eval" is a view too.
        seed: of the run.
        epoch: whose augmentation.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        views: tuple[str, ...],
        seed: int = 0,
        epoch: int = 0,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        self.split, self.config, self.views, self.seed, self.epoch = split, config, views, seed, epoch
        self.mean, self.std = list(mean), list(std)

    def __len__(self) -> int:
        return len(self.split)

    def image(self, index: int) -> Image.Image:
        """The image as shown."""
        with Image.open(self.split.path(index)) as stored:
            image = stored.convert("RGB")
        turn = TRANSPOSE.get(int(self.split.orientation[index]))
        return image if turn is None else image.transpose(turn)

    def _randaugment(self, image: Image.Image, index: int) -> Image.Image:
        ops, signs = augment.randaugment_choice(self.seed, self.epoch, [index], self.config.randaugment_ops)
        space = RandAugment()._augmentation_space(31, (image.height, image.width))
        for op, sign in zip(ops[0], signs[0], strict=True):
            name = augment.RANDAUGMENT_OPS[op]
            magnitudes, _ = space[name]
            value = float(magnitudes[self.config.randaugment_magnitude]) if magnitudes.ndim > 0 else 0.0
            image = _apply_op(image, name, value * int(sign), InterpolationMode.NEAREST, None)
        return image

    def view(self, image: Image.Image, name: str, index: int) -> torch.Tensor:
        """One view of an image as shown."""
        side = self.config.image_size
        resized = self.config.strong_from == "resized"
        if name == "strong" and not resized:
            image = self._randaugment(image, index)
        if name != "eval" and self.config.train_crop == "random_resized":
            box = augment.crop_boxes(
                self.seed, self.epoch, [index], [image.width], [image.height], self.config.crop_scale
            )
            image = F.crop(image, *box[0].tolist())
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        if name == "strong" and resized:
            image = self._randaugment(image, index)
        if name != "eval" and augment.flips(self.seed, self.epoch, [index], name, self.config.hflip)[0]:
            image = F.hflip(image)
        return F.normalize(F.to_tensor(image), self.mean, self.std)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.image(index)
        return {"index": index, **{name: self.view(image, name, index) for name in self.views}}
