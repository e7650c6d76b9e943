"""Batches in flight, epochs that are left, and bad images that are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import dali_stream
from spml_fast.data.manifest import Split
from tests.support.loading import (
    by_index,
    data_config,
    eval_loader,
    flat,
    make_photos,
    train_loader,
)
from tests.support.pil import make_split, photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    return make_photos(tmp_path_factory.mktemp("photos"))


def test_an_epoch_may_be_left_at_any_point(photos):
    fresh = {epoch: [v.index.tolist() for v in flat(train_loader(photos).epoch(epoch))] for epoch in range(3)}
    expected = by_index(flat(train_loader(photos).epoch(2)), "strong")
    loader = train_loader(photos)
    left = loader.epoch(0)
    next(left)
    left.close()
    abandoned = loader.epoch(1)
    assert next(abandoned)[0].index.tolist() == fresh[1][0]
    # Going on where the consumer stopped, and again from the start.
    assert [u[0].index.tolist() for u in loader.epoch(1, 1)] == fresh[1][1:]
    assert [u[0].index.tolist() for u in loader.epoch(1)] == fresh[1]
    with pytest.raises(RuntimeError, match="abandoned"):
        next(abandoned)
    ours = by_index(flat(loader.epoch(2)), "strong")
    assert all(torch.equal(ours[i], expected[i]) for i in expected)
    evaluation = eval_loader(photos)
    for _ in range(2):
        next(iter(evaluation))
    assert len(by_index(evaluation, "eval")) == len(photos)


def test_batches_stay_in_flight(photos):
    loader = train_loader(photos, data_config(prefetch=3), accumulation=2)
    last = loader.updates_per_epoch - 1
    for update, _ in enumerate(loader.epoch(0)):
        flight = [request.key for request in loader._stream._flight]
        assert len(flight) == 3
        # What follows the last update is the next epoch.
        assert flight[0] == ((0, update + 1, 0) if update < last else (1, 0, 0))
    first = next(loader.epoch(1))
    assert first[0].index.tolist() == next(train_loader(photos, accumulation=2).epoch(1))[0].index.tolist()


def _spoiled(tmp_path: Path, photos: Split, spoil) -> Split:
    """A copy of some photographs, prepared and then spoiled at sample 13."""
    names = [f"{i} ü.jpg" for i in range(20)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(Path(photos.path(i)).read_bytes())
    split = make_split(tmp_path / "manifest", tmp_path, names)
    spoil(tmp_path / names[13])
    return split


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _shrink(path: Path) -> None:
    photo(3, 9, 7).save(path)


def _to_gif(path: Path) -> None:
    with Image.open(path) as image:
        size = image.size
    photo(3, *size).save(path, "GIF")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (_remove, "is missing; restore it, or prepare the data again"),
        (_truncate, "cannot be read .*; restore it, or prepare the data again"),
        (_empty, "is empty; restore it"),
        (_to_gif, "is a GIF file that DALI does not decode; convert it"),
    ],
)
def test_bad_images_are_named(spoil, says, tmp_path, photos):
    split = _spoiled(tmp_path, photos, spoil)
    with pytest.raises(UserError, match=rf"13 ü\.jpg {says}"):
        list(eval_loader(split))
    loader = train_loader(split)
    with pytest.raises(UserError, match=rf"13 ü\.jpg {says}"):
        list(loader.epoch(0))
    # The loader lives on: put right, the next epoch runs.
    (tmp_path / "13 ü.jpg").write_bytes(Path(photos.path(13)).read_bytes())
    assert len(by_index(flat(loader.epoch(1)), "weak")) == 20


def test_a_replaced_image_is_named_where_its_size_matters(tmp_path, photos):
    split = _spoiled(tmp_path, photos, _shrink)
    with pytest.raises(UserError, match=r"13 ü\.jpg is 9 x 7 pixels now and was 90 x 130"):
        list(train_loader(split, data_config(train_crop="random_resized"), views=("weak",)).epoch(0))


def test_threads_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert dali_stream._threads(DataConfig(threads=3)) == 3
    assert dali_stream._threads(DataConfig()) == 12
    for ranks, threads in (("4", 3), ("8", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert dali_stream._threads(DataConfig()) == threads
