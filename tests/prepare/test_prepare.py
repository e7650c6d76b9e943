"""launch/prepare.py from raw files to Manifest: image verification, every data set, and what users get wrong."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from spml_fast.cli import prepare as prepare_command
from spml_fast.core import workers
from spml_fast.core.errors import UserError
from spml_fast.data.image_check import check_image, check_images, choose_level
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare import build, raw
from spml_fast.prepare.datasets import base, csv_table, digits, load_all
from spml_fast.prepare.observed_labels import draw_published, published_split
from tests.support import data as make
from tests.support.paths import need_data


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait until something is so; fail if it is not in half a minute."""
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def prepare(*arguments: object) -> Manifest:
    """Run the command in this process; a user error stays an exception."""
    words = [str(a) for a in arguments]
    assert prepare_command.main(words) == 0
    return Manifest(words[words.index("--out") + 1])


def report_of(manifest: Manifest) -> dict:
    return json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))


# --- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["decode", "header"])
def test_good_images_pass(tmp_path, level):
    make.write_files(tmp_path, make.good_images())
    for name in make.good_images():
        checked = check_image(str(tmp_path / name), level)
        assert checked.reason is None, (name, checked)
        assert (checked.width, checked.height) == (make.WIDTH, make.HEIGHT), name
        assert checked.orientation == {"turned.jpg": 6, "turned.png": 8, "turned.tif": 6}.get(name, 1), name


def test_bad_images_are_named(tmp_path):
    make.write_files(tmp_path, {name: data for name, (data, _) in make.bad_images().items()})
    for name, (_, reason) in make.bad_images().items():
        checked = check_image(str(tmp_path / name))
        assert checked.reason is not None and reason in checked.reason, (name, checked)
    assert check_image(str(tmp_path / "absent.jpg")).reason == "missing file"
    assert check_image(str(tmp_path / "a.gif" / "below.jpg")).reason == "missing file"
    assert check_image(str(tmp_path)).reason == "a folder, not a file"
    assert check_image("nul\0byte.jpg").reason == "unusable file name"
    # Headers alone show kinds that the loader does not read, and not that the end is missing.
    assert "GIF" in (check_image(str(tmp_path / "a.gif"), "header").reason or "")
    assert check_image(str(tmp_path / "empty.jpg"), "header").reason == "empty file"
    assert check_image(str(tmp_path / "truncated a little.jpg"), "header").reason is None


def test_loader_decodes_what_passes(tmp_path):
    from nvidia.dali import fn, pipeline_def, types

    make.write_files(tmp_path, make.good_images())
    names = list(make.good_images())

    @pipeline_def(batch_size=len(names), num_threads=2, device_id=None)
    def read():
        path = fn.external_source(name="path", dtype=types.UINT8)
        return fn.decoders.image(fn.io.file.read(path), output_type=types.RGB, adjust_orientation=False)

    pipeline = read()
    pipeline.build()
    pipeline.feed_input("path", [np.frombuffer(os.fsencode(tmp_path / name), np.uint8) for name in names])
    (decoded,) = pipeline.run()
    for i, name in enumerate(names):
        pixels = np.asarray(decoded.at(i))
        assert pixels.shape == (make.HEIGHT, make.WIDTH, 3), name
        if name not in ("grey16.png", "one bit.png", "cmyk.jpg", "palette.png") and "grey" not in name:
            assert np.abs(pixels.astype(int) - make.pixels()).mean() < 12, name


def test_verify_images_in_processes(tmp_path):
    files = {f"{i:03d}.jpg": make.encoded(make.drawn_image(16 + i, 20)) for i in range(150)}
    files["070.jpg"] = b""
    files["149.jpg"] = files["149.jpg"][:-30]
    make.write_files(tmp_path, files)
    checked = check_images(151, lambda i: str(tmp_path / f"{i:03d}.jpg"), "decode", workers=2, progress=False)
    assert np.nonzero(~checked.ok)[0].tolist() == [70, 149, 150]
    assert {i: reason for i, (reason, _) in checked.rejected.items()} == {
        70: "empty file",
        149: "damaged or truncated",
        150: "missing file",
    }
    kept = np.nonzero(checked.ok)[0]
    assert np.array_equal(checked.width[kept], 16 + kept) and (checked.height[kept] == 20).all()


def test_processes_that_die_at_once_are_one_sentence(monkeypatch):
    class Broken(workers.ProcessPoolExecutor):
        def submit(self, *_: object, **__: object):
            raise BrokenProcessPool

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Broken)
    with pytest.raises(UserError, match=r"a process that was checking images died near 0\.jpg"):
        check_images(100, lambda i: f"{i}.jpg", "header", workers=2, progress=False)


def test_workers_end_with_a_killed_parent(tmp_path):
    path = tmp_path / "lock"

    def parent():
        with path.open("w") as file, workers.worker_pool(2) as pool:
            fcntl.flock(file, fcntl.LOCK_EX)
            pool.submit(os.getpid).result()
            (tmp_path / "ready").touch()
            signal.pause()

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    wait_for((tmp_path / "ready").exists)
    with path.open("w") as file:

        def is_free() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        assert not is_free()
        process.kill()
        process.join()
        # Workers have inherited the lock, and would hold it.
        wait_for(is_free)


def test_level_by_number():
    assert choose_level(None, 200_000) == "decode" and choose_level(None, 200_001) == "header"
    assert choose_level("none", 5) == "none"


def test_boxes_turn_with_the_image():
    # A white box in a black image, turned by Pillow, must be where turn_boxes says.
    box = np.array([[3, 0.25, 0.125, 0.5, 0.25]], np.float32)
    pixels = np.zeros((32, 64), np.uint8)
    pixels[4:8, 16:32] = 255
    for orientation in range(1, 9):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        shown = np.asarray(ImageOps.exif_transpose(image))
        rows, columns = np.nonzero(shown)
        height, width = shown.shape
        seen = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        turned = build.turn_boxes(box, np.array([orientation], np.uint8))
        assert np.allclose(turned[0], [3, *seen]), orientation


# --- digits ---------------------------------------------------------------------------------------------------------

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
    images = digits.render_scenes(scenes, ink).astype(int)
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


# --- VOC ------------------------------------------------------------------------------------------------------------


def test_voc(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012")
    manifest = prepare("voc", "--root", root, "--out", tmp_path / "m")
    assert manifest.classes == make.VOC_CLASSES
    rows = {name: len(split) for name, split in manifest.splits.items()}
    assert rows == {"train": 16, "val": 4, "test": 6}
    train, val = published_split(20)
    for name, official, prefix in (("train", train, "2008"), ("val", val, "2008"), ("test", range(6), "2009")):
        split = manifest.split(name)
        assert [split.relative_path(i) for i in range(len(split))] == [f"{prefix}_{i:06d}.jpg" for i in official]
        # Difficult is negative.
        expected = [[int(make.voc_flag(i, c) == 1) for c in range(20)] for i in official]
        assert split.known.rows(range(len(split))).tolist() == expected
        assert (split.width == make.WIDTH).all() and (split.height == make.HEIGHT).all()
        assert split.boxes is not None
        # Pixels 13..24 of 48 and 9..16 of 32, counted from 1, the last included.
        assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    # The draw runs over all official rows before the cut.
    full = SparseLabels.from_dense(
        np.array([[make.voc_flag(i, c) == 1 for c in range(20)] for i in range(20)], np.int8), 0
    )
    drawn = draw_published(full)
    assert np.array_equal(manifest.split("train").observed.rows(range(16)), drawn.rows(train))
    assert np.array_equal(manifest.split("val").observed.rows(range(4)), drawn.rows(val))


def test_a_bad_image_changes_no_other_row(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012")
    whole = prepare("voc", "--root", root, "--out", tmp_path / "whole")
    victim = root / "JPEGImages" / "2008_000004.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    (root / "JPEGImages" / "2009_000001.jpg").unlink()
    holed = prepare("voc", "--root", root, "--out", tmp_path / "holed")
    for name in ("train", "val", "test"):
        columns = []
        for manifest in (whole, holed):
            split = manifest.split(name)
            observed, known = (s.rows(range(len(split))).tolist() for s in (split.observed, split.known))
            assert split.boxes is not None
            boxes = [split.boxes[1][a:b].tolist() for a, b in zip(split.boxes[0], split.boxes[0][1:], strict=False)]
            columns.append({split.relative_path(i): (observed[i], known[i], boxes[i]) for i in range(len(split))})
        before, after = columns
        assert (
            before.keys() - after.keys()
            == {"train": {"2008_000004.jpg"}, "val": set(), "test": {"2009_000001.jpg"}}[name]
        )
        assert all(before[path] == row for path, row in after.items())
    report = report_of(holed)
    assert report["left_out"]["reasons"] == {"damaged or truncated": 1, "missing file": 1}
    assert {(p["split"], p["path"]) for p in report["left_out"]["images"]} == {
        ("train", "2008_000004.jpg"),
        ("test", "2009_000001.jpg"),
    }


def test_voc_without_annotations_and_without_cut(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012", xml=False)
    manifest = prepare("voc", "--root", root, "--out", tmp_path / "m", "--val-fraction", "0", "--observe", "all")
    assert set(manifest.splits) == {"train", "test"} and manifest.split("train").boxes is None
    assert not manifest.split("train").hides_labels
    assert any("no boxes" in note for note in report_of(manifest)["notes"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "ImageSets"), "ImageSets/Main does not exist"),
        (lambda r: (r / "ImageSets/Main/cat_val.txt").unlink(), r"cat_val\.txt cannot be read"),
        (lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000099 1\n"), "same images.*2008_000099"),
        (lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000001 -1\n"), "line 21: image 2008_000001"),
        (
            lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000001 maybe\n"),
            "line 21: expected an image name",
        ),
        (
            lambda r: (r / "Annotations/2008_000003.xml").write_text("<annotation><obj"),
            r"2008_000003\.xml is not valid XML",
        ),
        (lambda r: shutil.rmtree(r / "JPEGImages"), "none of the 20 images of split 'train'.*missing file"),
    ],
)
def test_voc_bad_input(tmp_path, damage, message):
    root = make.make_voc(tmp_path / "VOC2012")
    damage(root)
    with pytest.raises(UserError, match=message):
        prepare("voc", "--root", root, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


# --- COCO -----------------------------------------------------------------------------------------------------------

TRAIN = {9: [7, 1], 10: [1], 100: [90, 90, 1], 11: [], 2: [7], 30: [90]}
TEST = {5: [1], 40: [7, 90]}


def test_coco(tmp_path):
    train, train_images = make.make_coco(tmp_path, "train2014", TRAIN)
    test, test_images = make.make_coco(tmp_path, "val2014", TEST)
    manifest = prepare(
        *("coco", "--annotations", train, "--images", train_images, "--test-annotations", test),
        *("--test-images", test_images, "--val-fraction", "0", "--out", tmp_path / "m"),
    )
    # Class index in the file's order of categories; ids sorted as strings; images without annotation left out.
    assert manifest.classes == ["zebra", "ant", "traffic light"]
    split = manifest.split("train")
    assert [Path(split.path(i)).stem.lstrip("0") for i in range(len(split))] == ["10", "100", "2", "30", "9"]
    assert split.known.rows(range(5)).tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert split.boxes is not None and np.diff(split.boxes[0]).tolist() == [1, 3, 1, 1, 2]
    assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    assert manifest.split("test").known.rows([0, 1]).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert all(Path(s.path(i)).is_file() for s in manifest.splits.values() for i in range(len(s)))
    assert report_of(manifest)["notes"][0].startswith("train: not used, as in the papers: 1 without")


def test_coco_annotated_sizes_without_looking(tmp_path):
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    shutil.rmtree(images)
    images.mkdir()
    manifest = prepare(
        *("coco", "--annotations", train, "--images", images, "--val-fraction", "0", "--verify", "none"),
        *("--out", tmp_path / "m"),
    )
    assert manifest.split("train").width.tolist() == [make.WIDTH] * 5


def test_coco_boxes_follow_the_annotated_size(tmp_path):
    # Images that somebody scaled down after annotating: boxes are fractions of the annotated size.
    train, images = make.make_coco(tmp_path, "train", {1: [1], 2: [7]})
    make.write_files(images, {f"{i:012d}.jpg": make.encoded(make.drawn_image(24, 16)) for i in (1, 2)})
    manifest = prepare("coco", "--annotations", train, "--images", images, "--val-fraction", 0, "--out", tmp_path / "m")
    split = manifest.split("train")
    assert split.width.tolist() == [24, 24] and split.boxes is not None
    assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    assert any("another size than the annotation says: 2 images" in note for note in report_of(manifest)["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "not valid JSON"),
        (lambda d: [], "no list 'images'"),
        (lambda d: {**d, "categories": 3}, "no list 'categories'"),
        (lambda d: {**d, "annotations": [{"image_id": 9}]}, "entry 0 of 'annotations' has no 'category_id'"),
        (lambda d: {**d, "annotations": [{"image_id": [9], "category_id": 1}]}, "as its 'image_id'"),
        (lambda d: {**d, "annotations": [{"image_id": 77, "category_id": 1}]}, "image 77"),
        (lambda d: {**d, "annotations": [{"image_id": 9, "category_id": 5}]}, "category 5"),
        (
            lambda d: {**d, "annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 2]}]},
            "annotation 0 has .* 'bbox'",
        ),
        (lambda d: {**d, "images": d["images"] + d["images"][:1]}, "listed twice"),
        (lambda d: {**d, "images": [{**d["images"][0], "width": "wide"}]}, "'wide' as its 'width'"),
        (lambda d: {**d, "categories": d["categories"] + [{"id": 7, "name": "x"}]}, "same id"),
        (lambda d: {**d, "categories": d["categories"] + [{"id": 8, "name": "ant"}]}, "class 'ant' is listed twice"),
        (lambda d: {**d, "annotations": []}, "split 'train' of coco is empty"),
    ],
)
def test_coco_bad_input(tmp_path, change, message):
    path, images = make.make_coco(tmp_path, "train", TRAIN)
    changed = change(make.coco_instances(TRAIN))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=message):
        prepare("coco", "--annotations", path, "--images", images, "--val-fraction", "0", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_coco_test_categories_must_match(tmp_path):
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    other = make.coco_instances(TEST)
    other["categories"] = [{"id": 7, "name": "horse"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"category 7 \(horse\) is zebra"):
        prepare(
            *("coco", "--annotations", train, "--images", images, "--test-annotations", tmp_path / "other.json"),
            *("--out", tmp_path / "m"),
        )
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        prepare("coco", "--annotations", tmp_path / "absent.json", "--images", images, "--out", tmp_path / "m")


def test_coco_mini(tmp_path):
    folder = need_data("coco_mini")
    files = [folder / "coco_format" / "lizhogn+tiny_coco_dataset" / f"instances_{s}2017.json" for s in ("train", "val")]
    manifest = prepare(
        *("coco", "--annotations", files[0], "--images", folder / "images"),
        *("--test-annotations", files[1], "--test-images", folder / "images", "--out", tmp_path / "m"),
    )
    assert manifest.num_classes == 80 and manifest.classes[0] == "person" and manifest.classes[79] == "toothbrush"
    report = report_of(manifest)
    # Every photo is a real one, whole, and of the size that its annotation says; one of the set is grey.
    assert report["left_out"]["total"] == 0 and not any("another size" in note for note in report["notes"])
    table = json.loads((folder / "labels.json").read_text())
    assert table["classes"] == manifest.classes
    truth = {line.split(",")[0]: line.split(",")[2] for line in (folder / "labels.csv").read_text().splitlines()[1:]}
    for split in manifest.splits.values():
        assert split.observed.row_counts(1).tolist() == [1] * len(split)
        for i in range(len(split)):
            positives = np.nonzero(split.known.rows([i])[0] == 1)[0]
            assert {manifest.classes[c] for c in positives} == set(truth[Path(split.path(i)).name].split(";"))


# --- CSV ------------------------------------------------------------------------------------------------------------


def make_table(folder: Path, text: str | bytes) -> tuple[Path, Path]:
    """A table and the images that it names (in a first column without quotes). Returns (table, image folder)."""
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "table.csv").write_bytes(data)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for line in data.decode("utf-8-sig").splitlines()[1:]:
        name = line.split(",")[0]
        if name:
            make.write_files(images, {name: make.encoded()})
    return folder / "table.csv", images


def prepare_table(folder: Path, text: str | bytes, *options: object) -> Manifest:
    table, images = make_table(folder, text)
    return prepare("csv", "--table", table, "--images", images, "--out", folder / "m", *options)


SPLIT_ROWS = (
    "path,positives{columns},split\na.jpg,cat;dog{train},train\nb.jpg,dog{empty},train\nc.jpg,cat{empty},test\n"
)


@pytest.mark.parametrize(
    ("columns", "train", "empty", "options", "expected"),
    [
        # Classes: ant, cat, dog. Rows a and b of train, then c of test.
        ("", "", "", [], [[-9, 1, 1], [-9, 0, 1], [-9, 1, 0]]),
        (",negatives", ",ant", ",", [], [[0, 1, 1], [-1, -1, 1], [-1, 1, -1]]),
        (",unknowns", ",ant", ",", [], [[-1, 1, 1], [0, 0, 1], [0, 1, 0]]),
        (",negatives,unknowns", ",,ant", ",,", [], [[-1, 1, 1], [-1, -1, 1], [-1, 1, -1]]),
        (",negatives", ",ant", ",", ["--unlisted", "negative"], [[0, 1, 1], [0, 0, 1], [0, 1, 0]]),
        ("", "", "", ["--unlisted", "unknown"], [[-9, 1, 1], [-9, -1, 1], [-9, 1, -1]]),
        (",negatives", ",ant", ",", ["--unlisted-eval", "negative"], [[0, 1, 1], [-1, -1, 1], [0, 1, 0]]),
    ],
)
def test_csv_meaning_of_unlisted_classes(tmp_path, columns, train, empty, options, expected):
    text = SPLIT_ROWS.format(columns=columns, train=train, empty=empty)
    manifest = prepare_table(tmp_path, text, *options)
    expected = np.array(expected)
    if (expected == -9).any():
        # Without further columns nothing names an ant.
        assert manifest.classes == ["cat", "dog"]
        expected = expected[:, 1:]
    else:
        assert manifest.classes == ["ant", "cat", "dog"]
    assert np.array_equal(manifest.split("train").known.rows([0, 1]), expected[:2])
    assert np.array_equal(manifest.split("test").known.rows([0]), expected[2:])
    assert not manifest.split("train").hides_labels
    assert any("does not list were read as" in note for note in report_of(manifest)["notes"])


def test_csv_odd_and_broken_images(tmp_path):
    good, bad = make.good_images(), make.bad_images()
    images = make.write_files(tmp_path / "images", {**good, **{name: data for name, (data, _) in bad.items()}})
    names = [*good, *bad, "absent.jpg"]
    rows = "".join(f'"{name}",{"cat" if i % 2 else "dog"},train\n' for i, name in enumerate(names))
    (tmp_path / "table.csv").write_text("path,positives,split\n" + rows, encoding="utf-8")
    arguments = ["csv", "--table", tmp_path / "table.csv", "--images", images, "--out"]
    manifest = prepare(*arguments, tmp_path / "m")
    split = manifest.split("train")
    assert [split.relative_path(i) for i in range(len(split))] == list(good)
    assert split.known.rows(range(len(split)))[:, 0].tolist() == [i % 2 for i in range(len(good))]
    turned = {"turned.jpg": 6, "turned.png": 8, "turned.tif": 6}
    assert split.orientation.tolist() == [turned.get(name, 1) for name in good]
    sizes = list(zip(split.width.tolist(), split.height.tolist(), strict=True))
    assert sizes == [(make.HEIGHT, make.WIDTH) if name in turned else (make.WIDTH, make.HEIGHT) for name in good]
    left_out = report_of(manifest)["left_out"]
    assert left_out["total"] == len(bad) + 1 == sum(left_out["reasons"].values())
    named = {p["path"]: p["reason"] for p in left_out["images"]}
    assert named.keys() == {*bad, "absent.jpg"} and all(reason in named[name] for name, (_, reason) in bad.items())
    ignoring = prepare(*arguments, tmp_path / "ignoring", "--orientation", "ignore").split("train")
    assert set(ignoring.orientation.tolist()) == {1}
    assert set(ignoring.width.tolist()) == {make.WIDTH}
    # Nothing is opened: nothing is left out, and sizes are not known.
    blind = prepare(*arguments, tmp_path / "unseen", "--verify", "none")
    unseen = blind.split("train")
    assert len(unseen) == len(names) and set(unseen.width.tolist()) == {0}
    # EXIF data neither, which the summary says.
    assert set(unseen.orientation.tolist()) == {1}
    assert "--orientation exif turns none" in " ".join(report_of(blind)["notes"])


def test_csv_without_splits_is_cut_as_published(tmp_path):
    rows = "".join(f"{i:02d}.jpg,{'cat' if i % 2 else 'dog'}\n" for i in range(20))
    manifest = prepare_table(tmp_path, "path,positives\n" + rows)
    for name, rows_of in zip(("train", "val"), published_split(20), strict=True):
        split = manifest.split(name)
        assert [split.relative_path(i) for i in range(len(split))] == [f"{i:02d}.jpg" for i in rows_of]
    assert set(manifest.splits) == {"train", "val"}
    assert any("no test split" in note for note in report_of(manifest)["notes"])


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfpath,positives,split\r\na b.jpg,caf\xc3\xa9;tea pot,train\r\n\r\nc.jpg,tea pot,train\r\n",
        'path,positives,split\n"a b.jpg"," café ; tea pot;",train\nc.jpg,tea pot,train\n'.encode(),
        'split,path,positives\ntrain,a b.jpg,"tea pot;café"\n\ntrain,c.jpg,tea pot'.encode(),
    ],
)
def test_csv_spellings(tmp_path, text):
    images = make.write_files(tmp_path / "images", {"a b.jpg": make.encoded(), "c.jpg": make.encoded()})
    (tmp_path / "table.csv").write_bytes(text)
    manifest = prepare("csv", "--table", tmp_path / "table.csv", "--images", images, "--out", tmp_path / "m")
    assert manifest.classes == ["café", "tea pot"]
    assert manifest.split("train").known.rows([0, 1]).tolist() == [[1, 1], [0, 1]]


def test_csv_rows_of_one_image_merge(tmp_path):
    rows = ["a.jpg,cat,dog", "b.jpg,dog,", "a.jpg,ant;cat,", "a.jpg,cat,dog"]
    text = "path,positives,negatives,split\n" + "".join(f"{row},train\n" for row in rows)
    manifest = prepare_table(tmp_path, text)
    split = manifest.split("train")
    assert len(split) == 2 and split.known.rows([0, 1]).tolist() == [[1, 1, 0], [-1, -1, 1]]
    assert "2 rows named an image again" in " ".join(report_of(manifest)["notes"])


def test_csv_conflicts(tmp_path):
    text = "path,positives,negatives,split\na.jpg,cat,dog,train\nb.jpg,dog,,train\na.jpg,dog,cat,train\n"
    with pytest.raises(
        UserError, match=r"table\.csv, line 4: class 'dog' of image a\.jpg is positive here and negative in line 2"
    ):
        prepare_table(tmp_path, text)
    manifest = prepare_table(tmp_path, text, "--conflicts", "positive")
    assert manifest.split("train").known.rows([0]).tolist() == [[1, 1]]
    assert "2 contradicting labels" in " ".join(report_of(manifest)["notes"])


def test_csv_class_file(tmp_path):
    (tmp_path / "classes.txt").write_text("zebra\ncat\n\nant\n")
    manifest = prepare_table(tmp_path, "path,positives,split\na.jpg,cat,train\n", "--classes", tmp_path / "classes.txt")
    assert manifest.classes == ["zebra", "cat", "ant"]
    assert manifest.split("train").known.rows([0]).tolist() == [[0, 1, 0]]
    assert report_of(manifest)["splits"]["train"]["classes_without_positive"] == 2


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("positives\ncat\n", [], "line 1: there is no column 'path'"),
        ("path,labels\na.jpg,cat\n", [], "line 1: there is no column 'positives'"),
        ("path,positives,negative\na.jpg,cat,dog\n", [], "line 1: column 'negative' is not one of"),
        ("path,positives,positives\na.jpg,cat,dog\n", [], "line 1: a column is there twice"),
        ("", [], "line 1: there is no column 'path'; found nothing"),
        ("path,positives\n", [], "has no rows"),
        ("path,positives\na.jpg,cat\nb.jpg,cat,dog\n", [], "line 3: 3 fields, but the header has 2"),
        ("path,positives\n,cat\n", [], "line 2: the path is empty"),
        ('path,positives\na.jpg,"cat\n', [], "line 2: unexpected end of data"),
        ("path,positives\na.jpg,\nb.jpg,\n", [], "no row has a positive class"),
        ("path,positives,split\na.jpg,cat,test\n", [], r"no row has split train \(found test\)"),
        ("path,positives,split\na.jpg,cat,../x\n", [], "line 2: '../x' cannot be the name of a split"),
        ("path,positives,split\na.jpg,cat,train\nb.jpg,cat,\n", [], "line 3: '' cannot be the name of a split"),
        (
            "path,positives,split\na.jpg,cat,train\na.jpg,cat,test\n",
            [],
            "line 3: image a.jpg is in split 'test' here and in 'train' in line 2",
        ),
        ("path,positives,negatives,split\na.jpg,cat,cat,train\n", [], "line 2: class 'cat' of image a.jpg"),
        (
            "path,positives,split\na.jpg,cat,train\nb.jpg,cow,train\n",
            ["--classes", "{}/classes.txt"],
            "line 3: class 'cow' is not in",
        ),
        (
            "path,positives,split\na.jpg,cat,train\n",
            ["--classes", "{}/double.txt"],
            r"double\.txt, line 3: class 'cat'",
        ),
        ("path,positives,split\na.jpg,cat,train\n", ["--classes", "{}/none.txt"], r"none\.txt cannot be read"),
        (
            "path,positives,negatives,split\na.jpg,,cat,train\nb.jpg,cat,,test\n",
            [],
            "split 'train' has no positive label at all",
        ),
        ("path,positives,split\na.jpg,cat,train\n", ["--observe", "keep=0"], "above 0 and at most 1"),
        ("path,positives,split\na.jpg,cat,train\n", ["--observe", "some"], "choose all, single"),
        (b"path,positives\na.jpg,caf\xe9\n", [], "not UTF-8"),
        (b"path,positives\n\0\n", [], "table.csv"),
    ],
)
def test_csv_bad_input(tmp_path, text, options, message):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "double.txt").write_text("cat\ndog\ncat\n")
    images = make.write_files(tmp_path / "images", {n: make.encoded() for n in ("a.jpg", "b.jpg")})
    (tmp_path / "table.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = [o.format(tmp_path) for o in options]
    with pytest.raises(UserError, match=message):
        prepare("csv", "--table", tmp_path / "table.csv", "--images", images, "--out", tmp_path / "m", *words)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_csv_missing_files_and_targets(tmp_path):
    table, images = make_table(tmp_path, "path,positives,split\na.jpg,cat,train\n")
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        prepare("csv", "--table", tmp_path / "absent.csv", "--images", images, "--out", tmp_path / "m")
    with pytest.raises(UserError, match=r"image folder .*absent does not exist"):
        prepare("csv", "--table", table, "--images", tmp_path / "absent", "--out", tmp_path / "m")
    with pytest.raises(UserError, match="exists and is not a Manifest"):
        prepare("csv", "--table", table, "--images", images, "--out", images)
    with pytest.raises(UserError, match="cannot be"):
        prepare("csv", "--table", table, "--images", images, "--out", table / "below")
    prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "m")
    with pytest.raises(UserError, match="already holds a Manifest"):
        prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "m")
    prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "m", "--overwrite")
    # A failed attempt to replace a Manifest leaves the old one as it was.
    (images / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "m", "--overwrite")
    assert len(Manifest(tmp_path / "m").split("train")) == 1


names = st.sampled_from(["ant", "bee", "café", "tea pot", 'quo"te', "com,ma", "日本"])
image_names = (
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6).map(str.strip).filter(bool)
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        image_names, st.dictionaries(names, st.sampled_from([1, 0, -1]), max_size=4), min_size=1, max_size=6
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_csv_parser_reads_what_was_written(tmp_path_factory, rows, newline, mark, random):
    import csv

    path = tmp_path_factory.mktemp("csv") / "t.csv"
    # Each image's labels are spread over one or two lines, in any order of lines.
    lines = []
    for name, codes in rows.items():
        items = list(codes.items())
        cut = random.randint(0, len(items))
        for part in (items[:cut], items[cut:]) if cut else (items,):
            cells = [";".join(c for c, code in part if code == wanted) for wanted in (1, 0, -1)]
            lines.append([name, *cells])
    random.shuffle(lines)
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=newline)
        writer.writerow(["path", "positives", "negatives", "unknowns"])
        writer.writerows(lines)
    table = csv_table.read_table(path, "error")
    assert {name: row.codes for name, row in table.rows.items()} == rows
    assert table.merged == len(lines) - len(rows)
    assert list(table.rows) == list(Counter(line[0] for line in lines))


# --- the command ----------------------------------------------------------------------------------------------------


def test_every_data_set_has_a_subcommand_and_help(capsys):
    assert {"coco", "csv", "digits", "voc"} <= set(load_all())
    for name in load_all():
        with pytest.raises(SystemExit) as stop:
            prepare_command.main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(
            option in text for option in ("--out", "--observe", "--seed", "--verify", "--orientation", "--overwrite")
        )


@pytest.mark.parametrize("words", [[], ["imagenet"], ["digits"], ["digits", "--ou", "x"], ["csv", "--out", "x"]])
def test_command_line_mistakes(words, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_command.main(words)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_new_data_set_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "DATASETS", base.DATASETS.copy())
    make.write_files(tmp_path, {f"images/{i:x}.jpg": make.encoded() for i in range(10)})

    @base.register("numbered")
    class Numbered(base.Dataset):
        """Ids and a template, and nothing else."""

        def read(self, options):
            known = SparseLabels.from_positives([[i % 2] for i in range(10)], 2, -1)
            split = raw.RawSplit("train", known, ids=np.arange(10), template="images/{id:x}.jpg")
            return raw.RawDataset("numbered", ["even", "odd"], tmp_path, [split], carve=("train", "val"))

    import argparse

    parser = argparse.ArgumentParser()
    base.add_common_options(parser, Numbered)
    manifest = Numbered().prepare(parser.parse_args(["--out", str(tmp_path / "m")]))
    train, val = manifest.split("train"), manifest.split("val")
    assert (len(train), len(val)) == (8, 2)
    assert [train.relative_path(i) for i in range(8)] == [f"images/{i:x}.jpg" for i in published_split(10)[0]]
    with pytest.raises(ValueError, match="registered twice"):
        base.register("numbered")(Numbered)


def test_commands_as_a_user_runs_them(tmp_path, run_script):
    voc = make.make_voc(tmp_path / "VOC 2012")
    (voc / "JPEGImages" / "2009_000001.jpg").write_bytes(b"")
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    table, folder = make_table(tmp_path, "path,positives,split\na.jpg,cat,train\nb.jpg,dog,train\n")
    commands = {
        "digits": ["digits", "--train", "30", "--val", "5", "--test", "5"],
        "voc": ["voc", "--root", voc],
        "coco": ["coco", "--annotations", train, "--images", images, "--observe", "keep=0.5"],
        "csv": ["csv", "--table", table, "--images", folder],
    }
    for name, words in commands.items():
        out = tmp_path / f"out {name}"
        done = run_script("prepare.py", *words, "--out", out)
        assert done.returncode == 0, done.stderr
        manifest = Manifest(out)
        assert f"Manifest: {out}" in done.stdout and f"--data.dir '{out}'" in done.stdout
        assert all(len(split) for split in manifest.splits.values())
        if name == "voc":
            assert "left out: 1 images" in done.stdout and "1  empty file" in done.stdout
    assert not list(tmp_path.glob("*.partial"))
    failed = run_script("prepare.py", "csv", "--table", table, "--images", images, "--out", images)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
