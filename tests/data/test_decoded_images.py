"""Decoded images that stay in memory: the same bits as decoding in every epoch, and nothing is decoded twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.decoded_images import DecodedImages, KeepingDecoder, decoded_bytes, room_for
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Manifest, Split
from tests.support.loading import data_config, eval_loader, flat, make_photos, same, train_loader
from tests.support.pil import make_split, photo
from tests.support.shards import pack_quietly

IMAGES = 13


@pytest.fixture
def photos(tmp_path) -> Split:
    """13 images, two of which have to be turned."""
    root = tmp_path / "photos"
    root.mkdir()
    names = [f"{i}.jpg" for i in range(IMAGES)]
    for i, name in enumerate(names):
        photo(i, 60 + 9 * i, 90 - 4 * i).save(root / name, quality=92)
    return make_split(tmp_path / "manifest", root, names, orientation=[1, 6, 3, *[1] * (IMAGES - 3)])


def anew(**changes: Any) -> DataConfig:
    """Every epoch decodes."""
    return data_config(keep_decoded=0, **changes)


def remove_images(split: Split) -> None:
    for sample in range(len(split)):
        Path(split.path(sample)).unlink()


def loaders(split: Split, batch_size: int = 4, **changes: Any) -> list[TrainLoader]:
    """One that keeps images, and one that decodes them in every epoch."""
    return [train_loader(split, c, batch_size=batch_size) for c in (data_config(**changes), anew(**changes))]


@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_views_are_those_of_decoding(crop, prefetch, photos):
    ours, theirs = loaders(photos, train_crop=crop, prefetch=prefetch)
    for epoch in range(3):
        same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
    assert ours.decoded is not None and theirs.decoded is None


def test_what_was_decoded_is_not_read_again(photos):
    ours = train_loader(photos, batch_size=4)
    # The last batch of an epoch is filled up or left out, so that two epochs show every image.
    expected = [flat(train_loader(photos, anew(), batch_size=4).epoch(epoch)) for epoch in range(6)]
    for epoch in range(3):
        same(flat(ours.epoch(epoch)), expected[epoch])
    assert ours.decoded.complete
    remove_images(photos)
    for epoch in range(3, 6):
        same(flat(ours.epoch(epoch)), expected[epoch])
    # Threads of DALI have nothing to do any more, and are gone.
    assert ours._stream._pipe._pipe is None


def test_an_epoch_that_decodes_a_part(photos):
    """Two ranks: each meets images in later epochs that it has not seen."""
    for rank in range(2):
        ours, theirs = (
            train_loader(photos, config, batch_size=4, accumulation=2, world_size=2, rank=rank)
            for config in (data_config(prefetch=3), anew(prefetch=3))
        )
        sizes = []
        for epoch in range(5):
            same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
            sizes.append(len(ours.decoded.missing(np.arange(IMAGES))))
        assert 0 < sizes[0] < IMAGES and sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


def test_epochs_may_be_left_and_resumed(photos):
    ours, theirs = loaders(photos, batch_size=2, prefetch=3)
    left = ours.epoch(0)
    next(left)
    for epoch, start in ((1, 2), (0, 0), (5, 4), (2, 0), (2, 3), (7, 1)):
        same(flat(ours.epoch(epoch, start)), flat(theirs.epoch(epoch, start)))
    with pytest.raises(RuntimeError, match="abandoned"):
        next(left)


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_shards_are_read_once(shuffle, photos, tmp_path):
    packed = pack_quietly(photos.folder.parent, tmp_path / "m").split("train")
    more = {"shuffle": shuffle, "shuffle_window": 6, "shuffle_block": 3}
    ours, theirs = loaders(packed, batch_size=3, **more)
    read: list[int] = []
    submit = ours._stream._reader.submit

    def counted(samples):
        read.extend(samples.tolist())
        return submit(samples)

    ours._stream._reader.submit = counted
    epochs = 4
    for epoch in range(epochs):
        same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
    # What is read ahead may be on its way to the decoder already.
    assert IMAGES <= len(read) < 2 * IMAGES < epochs * IMAGES


def test_evaluation_keeps_what_it_is_told_to(photos):
    plain = list(eval_loader(photos, anew()))
    room = room_for(photos, data_config())
    kept = eval_loader(photos, decoded=room)
    same(kept, plain)
    assert room.complete
    forgets = eval_loader(photos)
    same(forgets, plain)
    # The training views of the same images need no decoding either.
    expected = flat(train_loader(photos, anew()).epoch(0))
    remove_images(photos)
    same(kept, plain)
    same(eval_loader(photos, decoded=room), plain)
    loader = train_loader(photos)
    loader._stream._decoded = room
    same(flat(loader.epoch(0)), expected)
    with pytest.raises(UserError, match="is missing"):
        list(forgets)


def test_a_bad_image_is_replaced_in_every_epoch(tmp_path):
    photos = make_photos(tmp_path)
    Path(photos.path(13)).write_bytes(b"no image")
    ours, theirs = loaders(photos, bad_images="replace")
    for epoch in range(4):
        same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
    assert list(ours.bad_images.reasons) == list(theirs.bad_images.reasons) == [13]
    assert ours.decoded.missing(np.arange(len(photos))).tolist() == [13]


def test_images_in_memory_are_not_looked_for_among_the_bad_ones(photos):
    ours = train_loader(photos, data_config(bad_images="replace", bad_image_limit=1), batch_size=2)
    first = ours.epoch(0)
    seen = next(first)[0].index.tolist()
    next(first)
    bad = next(i for i in range(IMAGES) if ours.decoded.missing(np.array([i])).size and i not in seen)
    for sample in (bad, *seen):
        Path(photos.path(sample)).write_bytes(b"no image")
    for epoch in range(3):
        flat(ours.epoch(epoch))
    assert set(ours.bad_images.reasons) == {bad}


@pytest.mark.parametrize("size", [(20, 20), (300, 200), (78, 87)])
def test_an_image_that_was_replaced_is_not_kept(size, photos):
    """Smaller ones and those on their side decode; larger ones are an error as ever."""
    photo(50, *size).save(photos.path(3))
    ours, theirs = loaders(photos, bad_images="replace")
    for epoch in range(3):
        same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
    assert ours.decoded.missing(np.arange(IMAGES)).tolist() == [3]
    assert ours.bad_images.reasons.keys() == theirs.bad_images.reasons.keys()
    cropped = train_loader(photos, data_config(train_crop="random_resized"))
    with pytest.raises(UserError, match=r"3\.jpg is .* pixels now and was 87 x 78"):
        flat(cropped.epoch(0))


def test_which_splits_stay_in_memory(photos):
    size = sum(3 * w * h for w, h in zip(photos.width.tolist(), photos.height.tolist(), strict=True))
    assert decoded_bytes(photos) == size == 3 * sum((60 + 9 * i) * (90 - 4 * i) for i in range(IMAGES))
    fits = data_config(keep_decoded=size / 1e9)
    assert room_for(photos, fits) is not None
    assert room_for(photos, data_config(keep_decoded=(size - 1) / 1e9)) is None
    assert room_for(photos, anew()) is None
    assert room_for(photos, dataclasses.replace(fits, decode="reduced", strong_from="resized")) is None
    assert room_for(photos, dataclasses.replace(fits, cache="auto", strong_from="resized")) is None
    photos.width = np.where(np.arange(IMAGES) == 5, 0, photos.width).astype(np.int32)
    assert decoded_bytes(photos) is None and room_for(photos, fits) is None
    # Beyond 2^63 bytes, as in a wrong Manifest.
    photos.width = photos.height = np.full(IMAGES, 2**30, np.int32)
    assert decoded_bytes(photos) == 3 * IMAGES * 2**60


def test_negative_sizes_are_refused():
    with pytest.raises(UserError, match=r"data\.keep_decoded is -1; it must not be negative"):
        data_config(keep_decoded=-1)


class _Counting:
    """Stands where a DALI pipeline stands: counts what is in its queue, and decodes an image to its number."""

    def __init__(self, depth: int) -> None:
        self.depth, self.fed, self.queue, self.first = depth, [], [], True

    def feed_input(self, name: str, value: Any) -> None:
        assert name == "path"
        self.fed.append(value)

    def schedule_run(self) -> None:
        for _ in range(self.depth if self.first else 1):
            self.queue.append(self.fed.pop(0))
        self.first = False
        assert len(self.queue) <= self.depth, "DALI would wait for ever"

    def share_outputs(self) -> tuple[list[torch.Tensor]]:
        return ([torch.full((2, 3, 3), int(value[0]), dtype=torch.uint8) for value in self.queue[0]],)

    def release_outputs(self) -> None:
        self.queue.pop(0)


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_of_the_pipeline_never_overflows(seed):
    rng = np.random.default_rng(seed)
    decoded = DecodedImages(np.full(40, 3), np.full(40, 2))
    for sample in rng.choice(40, int(rng.integers(0, 40)), replace=False):
        decoded.keep(int(sample), np.full((2, 3, 3), sample, np.uint8))
    made: list[_Counting] = []

    def make(depth: int) -> _Counting:
        made.append(_Counting(depth))
        return made[-1]

    decoder, flight = KeepingDecoder(decoded, make), []
    ahead = int(rng.integers(1, 6))
    for _ in range(60):
        while len(flight) < ahead:
            samples = rng.integers(0, 40, int(rng.integers(1, 6)))
            decoder.feed_input("sample", samples)
            decoder.feed_input("path", [np.array([sample]) for sample in samples])
            flight.append(samples.tolist())
            decoder.schedule_run()
        (images,) = decoder.share_outputs()
        assert [int(image[0, 0, 0]) for image in images] == flight.pop(0)
        decoder.release_outputs()
    assert not decoded.complete or decoder._pipe is None
    with pytest.raises(KeyError):
        DecodedImages(np.ones(3), np.ones(3)).image(1)


def test_a_manifest_of_the_digits_stays(tmp_path):
    from spml_fast.prepare.datasets.digits import prepare_digits

    prepare_digits(tmp_path / "digits")
    split = Manifest(tmp_path / "digits").split("train")
    assert decoded_bytes(split) == len(split) * 64 * 64 * 3
    assert room_for(split, DataConfig()) is not None
