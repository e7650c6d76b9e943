"""The one description of a run: dataclasses whose fields are the YAML keys and the command line options.

Field comments below are the help texts (jsonargparse reads the docstrings).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataConfig:
    """Pictures and how they reach the model.

    Attributes:
        dir: Manifest directory made by launch/prepare.py; null builds and uses the embedded digit scenes.
        image_root: picture folder, when it is not where it was at preparation.
        image_size: side of the square model input in pixels.
        train_split: split to train on.
        val_split: split for model selection after every epoch; null for none.
        test_split: split for the final figures; null for none.
        train_crop: squash resizes to the square ignoring the aspect ratio (the papers' way); random_resized crops.
        crop_scale: smallest share of the picture's area that random_resized keeps.
        hflip: probability of a horizontal flip in training.
        randaugment_ops: RandAugment operations a picture in the strong view.
        randaugment_magnitude: RandAugment magnitude, 0 to 30.
        mean: per-channel mean in 0..1; null takes the backbone's.
        std: per-channel standard deviation in 0..1; null takes the backbone's.
        threads: decoding threads a rank; 0 shares the cores out evenly over the ranks of a machine.
        prefetch: batches decoded ahead.
    """

    dir: str | None = None
    image_root: str | None = None
    image_size: int = 448
    train_split: str = "train"
    val_split: str | None = "val"
    test_split: str | None = "test"
    train_crop: Literal["squash", "random_resized"] = "squash"
    crop_scale: float = 0.5
    hflip: float = 0.5
    randaugment_ops: int = 3
    randaugment_magnitude: int = 5
    mean: list[float] | None = None
    std: list[float] | None = None
    threads: int = 0
    prefetch: int = 2
