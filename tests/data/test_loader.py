"""What the loaders promise about batches: who sees what, resume, ranks, and other sizes of batches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from spml_fast.core import distributed, progress
from spml_fast.data.manifest import Split
from tests.support.loading import (
    SIDE,
    by_index,
    data_config,
    distances,
    eval_loader,
    flat,
    make_photos,
    reference_views,
    train_loader,
)
from tests.support.pil import make_split, photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_evaluation(world, photos):
    single = {tuple(v.index.tolist()): v.views["eval"].clone() for v in eval_loader(photos)}
    loaders = [eval_loader(photos, world_size=world, rank=r) for r in range(world)]
    for _ in range(2):
        seen: list[int] = []
        for step in zip(*loaders, strict=True):
            for views in step:
                assert views.views["eval"].shape == (4, 3, SIDE, SIDE) and views.index.dtype == torch.int64
                assert views.global_size == sum(v.real for v in step)
                seen += views.index[: views.real].tolist()
                if views.real:
                    assert torch.equal(views.views["eval"], single[tuple(views.index.tolist())])
        assert sorted(seen) == list(range(len(photos)))


def test_a_watched_evaluation_counts_the_images_of_all_ranks(photos, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    loader = eval_loader(photos, world_size=2, rank=0)
    with loader.watched("scoring") as batches:
        shown = [len(capsys.readouterr().err.splitlines()) for _ in batches]
    assert len(shown) == len(loader) and sum(shown) == len(loader) - 1
    assert capsys.readouterr().err.startswith(f"scoring | {len(photos)} of {len(photos)} images")
    with loader.watched(None) as batches:
        assert len(list(batches)) == len(loader)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with loader.watched("scoring") as batches:
        assert len(list(batches)) == len(loader)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_two_ranks_make_the_views_of_one(crop, photos):
    config = data_config(train_crop=crop)
    one = flat(train_loader(photos, config, accumulation=1).epoch(1))
    two = [flat(train_loader(photos, config, accumulation=2, world_size=2, rank=r).epoch(1)) for r in range(2)]
    for view in ("weak", "strong"):
        alone, shared = by_index(one, view), by_index(two[0] + two[1], view)
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[i], shared[i]) for i in alone)
    # Four micro-batches of two images each make an update of eight.
    assert [(v.real, v.global_size, v.update_size) for v in two[0][:2]] == [(2, 4, 8)] * 2
    first = torch.cat([two[0][0].index, two[1][0].index, two[0][1].index, two[1][1].index])
    assert torch.equal(first, one[0].index)


def test_resume_gives_the_rest_of_the_epoch(photos):
    whole = list(train_loader(photos, accumulation=2).epoch(4))
    rest = list(train_loader(photos, accumulation=2).epoch(4, start_update=1))
    assert len(whole) == len(rest) + 1 == train_loader(photos).updates_per_epoch
    for theirs, ours in zip(flat(whole[1:]), flat(rest), strict=True):
        assert torch.equal(theirs.index, ours.index)
        assert all(torch.equal(theirs.views[name], ours.views[name]) for name in ("weak", "strong"))


def test_views_outlive_later_batches(photos):
    loader = train_loader(photos)
    kept = [(v, v.views["weak"].clone()) for v in flat(loader.epoch(0))]
    list(loader.epoch(1))
    assert all(torch.equal(v.views["weak"], copy) for v, copy in kept)


def test_batch_of_one(photos):
    views = flat(train_loader(photos, batch_size=1).epoch(0))
    assert len(views) == len(photos) and views[0].views["weak"].shape == (1, 3, SIDE, SIDE)
    assert len(list(eval_loader(photos, batch_size=1))) == len(photos)


def test_a_split_of_one_image(tmp_path):
    photo(0).save(tmp_path / "only.jpg")
    split = make_split(tmp_path / "manifest", tmp_path, ["only.jpg"])
    assert len(flat(train_loader(split, batch_size=16).epoch(0))) == 1
    (views,) = eval_loader(split, batch_size=16)
    assert views.real == 1 and views.views["eval"].shape[0] == 16


def test_awkward_names(tmp_path):
    names = ["with space.jpg", "été 日本.jpg", os.fsdecode(b"not \xff utf8.jpg"), "sub/quote'\".jpg"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), os.fsencode(name)), "wb") as file:
            photo(i).save(file, "JPEG")
    split = make_split(tmp_path / "manifest", tmp_path, names, sizes=[(160, 120)] * len(names))
    ours = by_index(eval_loader(split), "eval")
    assert distances(ours, reference_views(split), "eval").max() < 1.0


def test_sizes_that_preparation_did_not_read(photos):
    names = [photos.relative_path(i) for i in range(len(photos))]
    folder = photos.folder.parent.with_name("unread")
    unread = make_split(folder, Path(photos.image_root), names, sizes=[(0, 0)] * len(names))
    config = data_config(train_crop="random_resized")
    known, ours = (by_index(flat(train_loader(s, config).epoch(0)), "strong") for s in (photos, unread))
    assert all(torch.equal(known[i], ours[i]) for i in known)


def test_unknown_views_are_refused(photos):
    with pytest.raises(ValueError, match="strong"):
        train_loader(photos, views=("strong",))
