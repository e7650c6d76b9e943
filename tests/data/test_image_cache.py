"""The cache of resized images: the same bits as decoding, and what happens when it is stale, damaged or too large."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spml_fast.core import lock
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import image_cache
from spml_fast.data.cached_stream import CachedStream
from spml_fast.data.dali_graph import GraphOptions
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.manifest import Manifest, Split
from tests.support.loading import SIDE, data_config, eval_loader, flat, same, train_loader
from tests.support.pil import make_split, photo
from tests.support.shards import pack_quietly

IMAGES = 11


@pytest.fixture
def photos(tmp_path) -> Split:
    root = tmp_path / "photos"
    root.mkdir()
    names = [f"{i}.jpg" for i in range(IMAGES)]
    for i, name in enumerate(names):
        photo(i, 60 + 9 * i, 90 - 4 * i).save(root / name, quality=92)
    return make_split(tmp_path / "manifest", root, names, orientation=[1, 6, *[1] * (IMAGES - 2)])


def cached(**changes: Any) -> DataConfig:
    return data_config(**{"cache": "auto", "strong_from": "resized", **changes})


def folder(split: Split, side: int = SIDE) -> Path:
    (found,) = (split.folder.parent / "image_cache").glob(f"{split.name}-{side}-*")
    return found


def read_everything(split: Split) -> None:
    list(eval_loader(split, cached()))


@pytest.mark.parametrize("in_threads", [True, False])
def test_views_are_those_of_decoding(in_threads, photos, monkeypatch):
    """Threads make the views, or DALI alone as on a GPU."""
    monkeypatch.setattr(GraphOptions, "in_threads", in_threads)
    plain = cached(cache="none")
    for options in ({}, {"views": ("weak",)}):
        loader = train_loader(photos, cached(), batch_size=4, **options)
        assert isinstance(loader._stream, CachedStream) == in_threads
        fresh = train_loader(photos, plain, batch_size=4, **options)
        for epoch in (0, 1):
            same(flat(loader.epoch(epoch)), flat(fresh.epoch(epoch)))
    one_view = {"randaugment": "weak", "cutout": 0.4}
    views = [train_loader(photos, c, views=("weak",)) for c in (cached(**one_view), cached(cache="none", **one_view))]
    same(*(flat(loader.epoch(2)) for loader in views))
    same(eval_loader(photos, cached()), eval_loader(photos, plain))
    ranks = [eval_loader(photos, cached(), world_size=2, rank=1), eval_loader(photos, plain, world_size=2, rank=1)]
    same(*ranks)


def test_a_resume_and_an_epoch_that_is_left(photos):
    config = cached(prefetch=3)
    loader = train_loader(photos, config, batch_size=2)
    whole = list(loader.epoch(4))
    same(flat(whole[2:]), flat(train_loader(photos, config, batch_size=2).epoch(4, start_update=2)))
    left = loader.epoch(5)
    next(left)
    assert [request.key for request, _ in loader._stream._flight] == [(5, 1, 0), (5, 2, 0), (5, 3, 0)]
    same(flat(loader.epoch(5, 1)), flat(train_loader(photos, cached(cache="none"), batch_size=2).epoch(5, 1)))
    with pytest.raises(RuntimeError, match="abandoned"):
        next(left)


def test_nothing_is_decoded_twice(photos, capfd):
    read_everything(photos)
    said = capfd.readouterr().err
    assert f"data.cache: {IMAGES} images of {SIDE} x {SIDE} px are 1 MB; they are made once, in" in said
    inode = next(folder(photos).glob("images-*.bin")).stat().st_ino
    read_everything(photos)
    same(eval_loader(photos, cached()), eval_loader(photos, cached(cache="none")))
    assert not capfd.readouterr().err and next(folder(photos).glob("images-*.bin")).stat().st_ino == inode


def test_views_of_original_images_are_refused(photos):
    with pytest.raises(UserError, match=r"data\.train_crop random_resized crops the original.*train_crop squash"):
        train_loader(photos, cached(train_crop="random_resized"), views=("weak",))
    with pytest.raises(UserError, match=r"the strong view changes the original ones.*data\.strong_from resized"):
        train_loader(photos, cached(strong_from="original"))
    # No operation, or no strong view: nothing of the original is needed.
    train_loader(photos, cached(strong_from="original", randaugment_ops=0))
    train_loader(photos, cached(strong_from="original"), views=("weak",))
    for word in ("", "off", "No", "true"):
        with pytest.raises(UserError, match=rf"data\.cache is '{word}'; it must be none, auto or a folder"):
            DataConfig(cache=word)
    assert not (photos.folder.parent / "elsewhere").exists()


def test_another_folder_and_images_of_no_manifest(photos, tmp_path):
    list(eval_loader(photos, cached(cache=str(tmp_path / "elsewhere"))))
    assert len(list((tmp_path / "elsewhere").glob("*/images-*.bin"))) == 1
    files = ImageFiles([photos.path(0)], np.ones(1, np.uint8))
    same(eval_loader(files, cached()), eval_loader(files, cached(cache="none")))
    assert not (photos.folder.parent / "image_cache").exists()


def test_sizes_and_splits_do_not_meet(photos, tmp_path):
    where = str(tmp_path / "shared")
    other = make_split(tmp_path / "other", Path(photos.image_root), [f"{i}.jpg" for i in (3, 4)])
    for split, side in ((photos, SIDE), (photos, 32), (other, SIDE)):
        config = cached(cache=where, image_size=side)
        same(eval_loader(split, config), eval_loader(split, dataclasses.replace(config, cache="none")))
    assert len(list(Path(where).iterdir())) == 3


def _swap_pixel(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5 * SIDE * SIDE * 3 + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_a_damaged_image_is_named(photos):
    read_everything(photos)
    _swap_pixel(next(folder(photos).glob("images-*.bin")))
    with pytest.raises(UserError, match=r"image 5 in the cache .* is damaged; remove the folder"):
        read_everything(photos)
    with pytest.raises(UserError, match="image 5 in the cache"):
        flat(train_loader(photos, cached()).epoch(0))
    shutil.rmtree(folder(photos))
    read_everything(photos)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _swap_checksum(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x02")


@pytest.mark.parametrize("spoil", [_cut, _swap_checksum, Path.unlink])
def test_a_damaged_file_is_made_again(spoil, photos, capfd):
    read_everything(photos)
    spoil(next(folder(photos).glob("images-*.bin")))
    capfd.readouterr()
    same(eval_loader(photos, cached()), eval_loader(photos, cached(cache="none")))
    said = capfd.readouterr().err
    assert "is damaged (" in said and "and is made again" in said
    assert len(list(folder(photos).glob("images-*.bin"))) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000, '{"format": 1, "images": 11}'])
def test_a_damaged_description_is_made_again(text, photos, capfd):
    read_everything(photos)
    (folder(photos) / "cache.json").write_text(text)
    capfd.readouterr()
    same(eval_loader(photos, cached()), eval_loader(photos, cached(cache="none")))
    assert "is made again" in capfd.readouterr().err


def test_no_name_leads_out_of_the_folder(photos, tmp_path):
    read_everything(photos)
    about = folder(photos) / "cache.json"
    values = json.loads(about.read_text())
    outside = tmp_path / values["file"]
    shutil.copy(folder(photos) / values["file"], outside)
    _swap_pixel(outside)
    about.write_text(json.dumps({**values, "file": str(outside)}))
    same(eval_loader(photos, cached()), eval_loader(photos, cached(cache="none")))


def _change_image(split: Split, monkeypatch) -> None:
    photo(99, 60, 90).save(split.path(0), quality=92)


def _touch_image(split: Split, monkeypatch) -> None:
    os.utime(split.path(3), ns=(1, 1))


def _change_content_alone(split: Split, monkeypatch) -> None:
    """Another image of the same size and time, as a copy that keeps times leaves it."""
    path = Path(split.path(2))
    before, other = path.stat(), path.with_name("other.jpg")
    photo(77, 60 + 9 * 2, 90 - 4 * 2).save(other, quality=60)
    data = other.read_bytes()
    other.unlink()
    assert len(data) <= before.st_size
    # What follows the end of a JPEG image is nothing.
    path.write_bytes(data.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _turn_image(split: Split, monkeypatch) -> None:
    split.orientation = np.ones(IMAGES, np.uint8)


def _new_version(split: Split, monkeypatch) -> None:
    monkeypatch.setattr(image_cache, "_FORMAT", 99)


@pytest.mark.parametrize("change", [_change_image, _change_content_alone, _touch_image, _turn_image, _new_version])
def test_a_stale_cache_is_made_again(change, photos, monkeypatch, capfd):
    read_everything(photos)
    capfd.readouterr()
    change(photos, monkeypatch)
    same(eval_loader(photos, cached()), eval_loader(photos, cached(cache="none")))
    assert "differs), and is made again" in capfd.readouterr().err
    assert len(list(folder(photos).glob("images-*.bin"))) == 1


def test_a_shard_that_was_restored_is_another_source(photos, tmp_path, capfd):
    split = pack_quietly(photos.folder.parent, tmp_path / "shards").split("train")
    shard = Path(split.shards.path(0))
    packed = shard.read_bytes()
    with shard.open("r+b") as file:
        # Within the first image, behind its header: it still decodes, to other pixels.
        file.seek(int(split.shards.table[0, 1] + split.shards.table[0, 2]) - 300)
        file.write(bytes(8))
    read_everything(split)
    shard.write_bytes(packed)
    capfd.readouterr()
    split = Manifest(tmp_path / "shards").split("train")
    same(eval_loader(split, cached()), eval_loader(split, cached(cache="none")))
    assert "(source differs), and is made again" in capfd.readouterr().err


def test_on_a_disk_without_locks_nothing_of_another_process_goes(photos, monkeypatch):
    """Both make a cache; neither takes the other's file away."""
    read_everything(photos)
    place = folder(photos)
    (place / "cache.json").unlink()
    theirs, old = place / "images-11111111.bin", place / "images-22222222.bin"
    theirs.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)

    def without(descriptor, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    read_everything(photos)
    assert theirs.exists() and not old.exists()


def test_too_little_space_is_said_before(photos, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, IMAGES * SIDE * SIDE * 3))
    with pytest.raises(UserError, match=rf"{IMAGES} images of {SIDE} x {SIDE} px are 1 MB, and .* free; give another"):
        read_everything(photos)
    assert not list(folder(photos).glob("images-*"))


def test_a_full_disk_leaves_nothing(photos, monkeypatch):
    def full(file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "flush_to_disk", full)
    with pytest.raises(UserError, match=r"cannot be written \(no space left on .*MB needed\); give another folder"):
        read_everything(photos)
    assert not list(folder(photos).glob("images-*")) and not (folder(photos) / "cache.json").exists()
    monkeypatch.undo()
    read_everything(photos)


def test_a_folder_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        list(eval_loader(photos, cached(cache=str(tmp_path / "file"))))


def test_a_bad_image_is_named_and_nothing_is_kept(photos):
    Path(photos.path(4)).write_bytes(b"")
    with pytest.raises(UserError, match=r"4\.jpg is empty"):
        read_everything(photos)
    assert not list(folder(photos).glob("images-*"))


def test_what_a_killed_process_left_goes(photos):
    read_everything(photos)
    place = folder(photos)
    (place / "cache.json").unlink()
    (place / "images-00000000.bin").write_bytes(b"half")
    read_everything(photos)
    assert len(list(place.glob("images-*.bin"))) == 1


def test_a_reader_keeps_what_another_one_replaces(photos):
    loader = eval_loader(photos, cached())
    before = eval_loader(photos, cached(cache="none"))
    expected = [batch.views["eval"].clone() for batch in before]
    _touch_image(photos, None)
    read_everything(photos)
    assert all(torch.equal(a.views["eval"], b) for a, b in zip(loader, expected, strict=True))


def _open_in_process(folder: Path, root: Path, start: Any, results: Any) -> None:
    split = Split(folder, root, {"size": IMAGES, "constant": {"orientation": 1}})
    made = []

    def make():
        made.append(1)
        for i in range(IMAGES):
            yield np.full((1, 8, 8, 3), i, np.uint8)

    start.wait()
    kind = image_cache.CacheKind(8, "cpu", {})
    cache = image_cache.open_cache("auto", split, kind, make, lambda text: None)
    results.put((len(made), [int(cache.image(i).mean()) for i in range(IMAGES)]))


def test_processes_that_start_together_make_one_cache(photos):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    arguments = (photos.folder, Path(photos.image_root), start, results)
    processes = [context.Process(target=_open_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(made for made, _ in found) == 1
    assert all(levels == list(range(IMAGES)) for _, levels in found)
