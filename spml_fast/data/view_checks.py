"""Which training views can be made: what does not go together is told before a run starts."""

from __future__ import annotations

import torch

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Split
from spml_fast.data.remote.shards import RemoteShards


def _check_shuffle(split: Split, config: DataConfig) -> None:
    """Refuse random reads of more than the cache holds: each would be a request, in every epoch."""
    if not isinstance(split.shards, RemoteShards) or config.shuffle == "window":
        return
    size, limit = split.shards.size / 1e9, config.cache_size
    if size > limit:
        raise UserError(
            f"data.shuffle global reads the {size:,.3g} GB of split {split.name!r} at {split.image_root} in random "
            f"order, and data.cache_size is {limit:g}: every image would be a request of its own; give --data.shuffle "
            f"window, or a data.cache_size of {size * 1.01:,.3g} GB"
        )


def _check_cache(views: tuple[str, ...], config: DataConfig) -> None:
    """Training views that are made of resized images alone."""
    if config.cache == "none":
        return
    ending = "; set data.cache none, or"
    if config.train_crop != "squash":
        raise UserError(
            f"data.cache keeps resized images, and data.train_crop {config.train_crop} crops the original ones"
            f"{ending} data.train_crop squash"
        )
    if "strong" in views and config.randaugment_ops and config.strong_from != "resized":
        raise UserError(
            "data.cache keeps resized images, and RandAugment of the strong view changes the original ones"
            f"{ending} data.strong_from resized"
        )


def _check_reduced(views: tuple[str, ...], config: DataConfig, device: torch.device) -> None:
    """Training views that are made of smaller images."""
    if config.decode == "full":
        return
    if device.type == "cuda":
        raise UserError(
            "data.decode reduced is for training without a GPU, which decodes whole images; set data.decode full"
        )
    if "strong" in views and config.randaugment_ops and config.strong_from != "resized":
        raise UserError(
            "data.decode reduced makes images smaller, and RandAugment of the strong view changes the original ones; "
            "set data.decode full, or data.strong_from resized"
        )


def check_views(views: tuple[str, ...], split: Split, config: DataConfig, device: torch.device) -> None:
    """Views that exist, with augmentation that suits them, and images that can be had in this way and order.

    Args:
        views: as of `TrainLoader`.
        split: the images.
        config: the `data` section of the run.
        device: where the views are made.

    Raises:
        UserError: options of the section do not go together, or not with the split or device.
        ValueError: there are no such views.
    """
    if views not in (("weak",), ("weak", "strong")):
        raise ValueError(f"views {views!r}")
    if len(views) > 1 and (config.cutout or config.randaugment == "weak"):
        raise UserError(
            "data.cutout and data.randaugment weak are for methods with one view; this one has a weak view that stays "
            "as it is, and a strong one"
        )
    _check_cache(views, config)
    _check_reduced(views, config, device)
    _check_shuffle(split, config)
