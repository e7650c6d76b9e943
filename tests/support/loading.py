"""Loaders on the CPU with views in grey levels, and how far their views are from Pillow's and torchvision's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spml_fast.core.batch import MicroBatch
from spml_fast.core.config import DataConfig
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Split
from tests.support.pil import ReferenceViews, make_split, photo

CPU = torch.device("cpu")
# Views in grey levels, 0 to 255.
GREY: dict[str, Any] = {"device": CPU, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
SIDE = 48
SIZES = [(160, 120), (90, 130), (64, 64), (200, 77), (48, 48), (33, 150)]


def make_photos(root: Path) -> Split:
    """29 noisy JPEG images of several sizes; the last batches are smaller."""
    names = []
    for i in range(29):
        names.append(f"{i}.jpg")
        photo(i, *SIZES[i % len(SIZES)]).save(root / names[-1], quality=92)
    return make_split(root / "manifest", root, names)


def data_config(**changes: Any) -> DataConfig:
    """Small images, two threads."""
    return DataConfig(**{"image_size": SIDE, "threads": 2, **changes})


def train_loader(split: Split, config: DataConfig | None = None, **changes: Any) -> TrainLoader:
    """Weak and strong views in batches of eight."""
    options = {"views": ("weak", "strong"), "batch_size": 8, "accumulation": 1, "seed": 5, "world_size": 1, "rank": 0}
    return TrainLoader(split, config or data_config(), **{**options, **GREY, **changes})


def eval_loader(split: Split, config: DataConfig | None = None, **changes: Any) -> EvalLoader:
    """Evaluation views in batches of four."""
    options = {"batch_size": 4, "world_size": 1, "rank": 0, **GREY, **changes}
    return EvalLoader(split, config or data_config(), **options)


def flat(updates: Iterable[list[MicroBatch]]) -> list[MicroBatch]:
    """The micro-batches of all updates."""
    return list(itertools.chain.from_iterable(updates))


def by_index(batches: Iterable[MicroBatch], view: str) -> dict[int, Tensor]:
    """Sample index -> its view, float32 [3, S, S]; no sample may come twice."""
    views: dict[int, Tensor] = {}
    for batch in batches:
        for position in range(batch.real):
            index = int(batch.index[position])
            assert index not in views
            views[index] = batch.views[view][position].clone()
    return views


def reference_views(split: Split, config: DataConfig | None = None, epoch: int = 0, seed: int = 5) -> ReferenceViews:
    """The same views by Pillow and torchvision.

    Args:
        split: the images.
        config: of the data; None for `data_config()`.
        epoch: whose augmentation.
        seed: of the run.
    """
    return ReferenceViews(split, config or data_config(), ("eval",), seed, epoch, GREY["mean"], GREY["std"])


def distances(views: dict[int, Tensor], reference: ReferenceViews, view: str) -> Tensor:
    """Mean distance in grey levels per sample, float32 [N], in index order."""
    pairs = ((views[i], reference.view(reference.image(i), view, i)) for i in sorted(views))
    return torch.stack([(ours - theirs).abs().mean() for ours, theirs in pairs])


def same(ours: Iterable[MicroBatch], theirs: Iterable[MicroBatch]) -> None:
    """Two loaders made the same batches, to the bit and in the same layout."""
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and (a.real, a.update_size) == (b.real, b.update_size)
        assert a.views.keys() == b.views.keys()
        for view in a.views:
            assert torch.equal(a.views[view], b.views[view]), view
            assert a.views[view].stride() == b.views[view].stride()
