"""Digit scenes: a function of the seeds, with true boxes, made once."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets import digits
from spml_fast.prepare.observed_labels import draw_published

SIZES = {"train": 40, "val": 10, "test": 20}


def test_digits_are_a_function_of_the_seeds(tmp_path):
    first = digits.prepare_digits(tmp_path / "a", sizes=SIZES)
    again = digits.prepare_digits(tmp_path / "b", sizes=SIZES)
    other = digits.prepare_digits(tmp_path / "c", sizes=SIZES, scene_seed=1)
    redrawn = digits.prepare_digits(tmp_path / "d", sizes=SIZES, seed=7)
    for split, size in SIZES.items():
        a, b, c = (m.split(split) for m in (first, again, other))
        assert len(a) == size
        assert all(Path(a.path(i)).read_bytes() == Path(b.path(i)).read_bytes() for i in range(size))
        assert not any(Path(a.path(i)).read_bytes() == Path(c.path(i)).read_bytes() for i in range(size))
    train, redrawn_train = first.split("train"), redrawn.split("train")
    assert np.array_equal(train.known.rows(range(40)), redrawn_train.known.rows(range(40)))
    assert not np.array_equal(train.observed.rows(range(40)), redrawn_train.observed.rows(range(40)))
    assert np.array_equal(train.observed.rows(range(40)), draw_published(train.known).rows(range(40)))


def test_digits_labels_are_their_boxes(tmp_path):
    split = digits.prepare_digits(tmp_path / "m", sizes=SIZES).split("test")
    assert split.boxes is not None
    indptr, boxes = split.boxes
    counts = np.diff(indptr)
    assert counts.min() >= 1 and counts.max() <= 5
    known = split.known.rows(range(len(split)))
    for i in range(len(split)):
        inside = boxes[indptr[i] : indptr[i + 1]]
        assert set(np.nonzero(known[i] == 1)[0]) == set(inside[:, 0].astype(int))
        assert (known[i] >= 0).all()
        assert (inside[:, 1:3] < inside[:, 3:5]).all() and (inside[:, 1:] >= 0).all() and (inside[:, 1:] <= 1).all()
        with Image.open(split.path(i)) as image:
            assert image.size == (64, 64)


def test_digits_ink_is_inside_the_boxes():
    ink, labels = digits._load_digits()
    scenes = digits.plan_scenes(30, np.arange(digits.TRAIN_DIGITS), labels, [0])
    images = np.concatenate(list(digits.render_scenes(scenes, ink))).astype(int)
    background = scenes.patches.repeat(16, 1).repeat(16, 2).astype(int)
    changed = np.abs(images - background).max(-1) > 100
    boxes = digits._boxes(scenes, ink).astype(int)
    assert np.array_equal(boxes[:, 0], labels[scenes.source])
    covered = np.zeros_like(changed)
    for scene in range(30):
        for _, x0, y0, x1, y1 in boxes[scenes.indptr[scene] : scenes.indptr[scene + 1]]:
            covered[scene, y0:y1, x0:x1] = True
            assert changed[scene, y0:y1, x0:x1].any()
    assert not (changed & ~covered).any()


def test_scenes_are_drawn_digit_by_digit():
    ink, labels = digits._load_digits()
    # More than one block, whose last is not full; digits that overlap.
    scenes = digits.plan_scenes(digits._BLOCK + 30, np.arange(digits.TRAIN_DIGITS), labels, [3])
    canvases = scenes.patches.repeat(16, 1).repeat(16, 2).astype(np.float32)
    for i, canvas in enumerate(canvases):
        for k in range(scenes.indptr[i], scenes.indptr[i + 1]):
            square = canvas[scenes.y[k] : scenes.y[k] + 20, scenes.x[k] : scenes.x[k] + 20]
            square += ink[scenes.source[k], :, :, None] * (scenes.colour[k] - square)
    rng = np.random.default_rng(scenes.noise_seed)
    for start in range(0, len(scenes), digits._BLOCK):
        part = canvases[start : start + digits._BLOCK]
        part += np.float32(digits.NOISE) * rng.standard_normal(part.shape, dtype=np.float32)
    expected = np.clip(np.round(canvases), 0, 255).astype(np.uint8)
    assert np.array_equal(np.concatenate(list(digits.render_scenes(scenes, ink))), expected)


def test_the_digits_are_scikit_learns(monkeypatch):
    from sklearn.datasets import load_digits

    for found in (True, False):
        if not found:
            # As with a version that keeps its file elsewhere.
            monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
        pixels, labels = digits._scikit_learn_digits()
        assert np.array_equal(pixels.reshape(-1, 8, 8), load_digits().images)
        assert np.array_equal(labels, load_digits().target)


def test_an_image_that_cannot_be_written_ends_it(tmp_path, monkeypatch):
    raw = digits.read_digits(SIZES)
    assert raw.make_images is not None
    (tmp_path / "test").touch()
    with pytest.raises(FileExistsError):
        raw.make_images(tmp_path)
    (tmp_path / "b").mkdir()
    make = Image.Image.save

    def fails(image: Image.Image, path: Path, **more: object) -> None:
        if path.name == "00003.jpg":
            raise OSError("no space left")
        make(image, path, **more)

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        raw.make_images(tmp_path / "b")


def test_digits_of_test_scenes_are_never_in_training():
    _, labels = digits._load_digits()
    raw = {
        name: digits.plan_scenes(200, rows, labels, [0])
        for name, rows in (
            ("train", np.arange(digits.TRAIN_DIGITS)),
            ("test", np.arange(digits.TRAIN_DIGITS, len(labels))),
        )
    }
    assert raw["train"].source.max() < digits.TRAIN_DIGITS <= raw["test"].source.min()


def _race(folder: str) -> None:
    digits.prepare_digits(folder, sizes=SIZES)


def test_digits_made_once_by_racing_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(str(tmp_path / "m"),)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    made = (tmp_path / "m" / "manifest.json").stat().st_mtime_ns
    manifest = digits.prepare_digits(tmp_path / "m", sizes=SIZES)
    assert len(manifest.split("train")) == 40
    assert (tmp_path / "m" / "manifest.json").stat().st_mtime_ns == made
    with pytest.raises(UserError, match="another data set than the digit scenes asked for"):
        digits.prepare_digits(tmp_path / "m", sizes={**SIZES, "train": 41})
