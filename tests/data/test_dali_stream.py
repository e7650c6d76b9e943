"""Batches in flight, epochs that are left, and bad images that are named."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import dali_stream
from spml_fast.data.bad_images import BadImages, NoReplacementError
from spml_fast.data.manifest import Split
from spml_fast.data.read_retry import RETRY_PAUSES
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
        flight = [request.key for request in loader._stream._undelivered]
        # Three that DALI decodes, and one that threads make views of.
        assert len(flight) == 4
        # What follows the last update is the next epoch.
        assert flight[0] == ((0, update + 1, 0) if update < last else (1, 0, 0))
    first = next(loader.epoch(1))
    assert first[0].index.tolist() == next(train_loader(photos, accumulation=2).epoch(1))[0].index.tolist()


def _spoiled(tmp_path: Path, photos: Split, spoil) -> Split:
    """A copy of some photographs, prepared and then spoiled at sample 13."""
    names = [f"{i} ü.jpg" for i in range(20)]
    tmp_path.mkdir(exist_ok=True)
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


REPLACE = {"bad_images": "replace"}


def _samples(loader, *epochs: int) -> list[list[int]]:
    return [batch.index.tolist() for epoch in epochs for batch in flat(loader.epoch(epoch))]


def _weak_loader(split: Split, config=None, **more):
    return train_loader(split, config or data_config(**REPLACE), **{"views": ("weak",), "batch_size": 4, **more})


def test_bad_images_are_replaced_by_those_of_the_next_update(tmp_path, photos, capfd):
    split = _spoiled(tmp_path, photos, _remove)
    good = _spoiled(tmp_path / "good", photos, lambda path: None)
    # The order of one epoch in a loader that finds nothing wrong; a batch after the last one is the first.
    sampler = _weak_loader(good).sampler
    expected = []
    for epoch in (0, 1):
        rows = sampler.permutation(epoch).tolist()
        place = rows.index(13)
        rows[place] = rows[(place + 4) % 20]
        expected += [rows[i : i + 4] for i in range(0, 20, 4)]
    loader = train_loader(split, data_config(**REPLACE), batch_size=4)
    batches = [batch for epoch in (0, 1) for batch in flat(loader.epoch(epoch))]
    assert [batch.index.tolist() for batch in batches] == expected
    assert list(loader.bad_images.reasons) == [13] and "13 ü.jpg" in loader.bad_images.reasons[13]
    assert capfd.readouterr().err.count("13 ü.jpg") == 1
    # What is shown is what the index says, in its own augmentation of the epoch.
    views = by_index(flat(train_loader(good).epoch(1)), "strong")
    for batch in batches[5:]:
        assert all(torch.equal(batch.views["strong"][i], views[s]) for i, s in enumerate(batch.index.tolist()))
    # A loader that begins later, as one that resumes does, or that is one of two ranks, shows the same.
    assert [batch.index.tolist() for batch in flat(_weak_loader(split).epoch(1, 2))] == expected[7:]
    ranks = [_samples(_weak_loader(split, world_size=2, rank=r), 0) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == expected[:5]


@pytest.mark.parametrize("spoil", [_truncate, _empty, _to_gif])
def test_every_kind_of_bad_image_is_replaced(spoil, tmp_path, photos):
    loader = _weak_loader(_spoiled(tmp_path, photos, spoil))
    assert all(13 not in index for index in _samples(loader, 0)) and list(loader.bad_images.reasons) == [13]


def test_replacements_have_a_limit_and_an_end(tmp_path, photos):
    split = _spoiled(tmp_path, photos, _remove)
    for i in (2, 5):
        _remove(tmp_path / f"{i} ü.jpg")
    loader = _weak_loader(split, data_config(bad_images="replace", bad_image_limit=2))
    with pytest.raises(UserError, match=r"3 images could not be used, more than data\.bad_image_limit 2; .*is missing"):
        _samples(loader, 0)
    assert len(_samples(_weak_loader(split, data_config(bad_images="replace", bad_image_limit=3)), 0)) == 5
    for i in range(20):
        (tmp_path / f"{i} ü.jpg").unlink(missing_ok=True)
    with pytest.raises(NoReplacementError, match="is missing"):
        _samples(_weak_loader(split), 0)


def test_evaluation_stops_unless_it_is_given_the_bad_images_of_training(tmp_path, photos):
    split = _spoiled(tmp_path, photos, _truncate)
    with pytest.raises(UserError, match=r"13 ü\.jpg"):
        list(eval_loader(split, data_config(**REPLACE)))
    bad = BadImages(split, replace=True, limit=1)
    views = by_index(eval_loader(split, bad_images=bad), "eval")
    assert len(views) == 20 and torch.equal(views[13], views[14]) and list(bad.reasons) == [13]


def test_an_image_without_a_known_size_is_replaced(tmp_path, photos):
    split = _spoiled(tmp_path, photos, _truncate)
    split.width = split.height = np.broadcast_to(np.int32(0), 20)
    (tmp_path / "13 ü.jpg").write_bytes(b"<html>")
    loader = _weak_loader(split, data_config(train_crop="random_resized", **REPLACE))
    assert sum(map(len, _samples(loader, 0))) == 20 and list(loader.bad_images.reasons) == [13]


# Reading a process's memory at address 0 is an input/output error of the system.
EIO = Path("/proc/self/mem")


def _failing_disk(path: Path, monkeypatch, failures: int) -> list[float]:
    """Have a file give input/output errors until it was waited for so many times; returns what was waited for."""
    good, pauses = path.with_suffix(".good"), []
    path.rename(good)
    path.symlink_to(EIO)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == failures:
            path.unlink()
            good.rename(path)

    monkeypatch.setattr(time, "sleep", sleep)
    return pauses


@pytest.mark.parametrize("config", [{}, REPLACE])
def test_input_output_errors_are_met_by_further_attempts(config, tmp_path, photos, monkeypatch):
    split = _spoiled(tmp_path, photos, lambda path: None)
    fresh = flat(_weak_loader(split, data_config(prefetch=3)).epoch(0))
    pauses = _failing_disk(tmp_path / "13 ü.jpg", monkeypatch, 3)
    loader = _weak_loader(split, data_config(prefetch=3, **config))
    again = flat(loader.epoch(0))
    # Three attempts to read the file, and then the batches are made again.
    assert pauses[:3] == list(RETRY_PAUSES) and len(pauses) == 4
    assert not loader.bad_images.reasons
    for ours, theirs in zip(again, fresh, strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert all(torch.equal(ours.views[v], theirs.views[v]) for v in ours.views)


def test_an_input_output_error_that_lasts_is_named(tmp_path, photos, monkeypatch):
    split = _spoiled(tmp_path, photos, lambda path: None)
    pauses = _failing_disk(tmp_path / "13 ü.jpg", monkeypatch, 99)
    with pytest.raises(UserError, match=r"13 ü\.jpg cannot be read \(Input/output error\); restore it"):
        list(eval_loader(split))
    assert pauses == list(RETRY_PAUSES)


def test_an_evaluation_is_made_to_its_end_after_an_input_output_error(tmp_path, photos, monkeypatch):
    """Fewer batches are left then than a pipeline's queue holds."""
    split = _spoiled(tmp_path, photos, lambda path: None)
    _failing_disk(tmp_path / "19 ü.jpg", monkeypatch, 1)
    loader = eval_loader(split, data_config(prefetch=4))
    assert len(by_index(loader, "eval")) == 20
    assert len(by_index(loader, "eval")) == 20 and loader._stream._depth == 4


def test_threads_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert dali_stream.decoding_threads(DataConfig(threads=3)) == 3
    assert dali_stream.decoding_threads(DataConfig()) == 12
    for ranks, threads in (("4", 3), ("8", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert dali_stream.decoding_threads(DataConfig()) == threads
