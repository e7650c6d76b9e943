"""NUS-WIDE and CUB from their files to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spml_fast.cli import prepare as prepare_command
from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets import cub, nuswide
from spml_fast.prepare.observed_labels import draw_published, published_split
from tests.support import data as make


def prepare(*arguments: object) -> Manifest:
    """Run the command in this process; a user error stays an exception."""
    words = [str(a) for a in arguments]
    assert prepare_command.main(words) == 0
    return Manifest(words[words.index("--out") + 1])


def notes_of(manifest: Manifest) -> str:
    report = json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))
    return " ".join(report["notes"])


def check_protocol(manifest: Manifest, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], paths: list[str]):
    """Known and observed labels, the cut, and the order of rows are those of the papers."""
    kept, cut = published_split(len(train))
    drawn = draw_published(SparseLabels.from_dense(train.astype(np.int8), 0))
    for name, rows in (("train", kept), ("val", cut)):
        split = manifest.split(name)
        assert [split.relative_path(i) for i in range(len(split))] == [paths[i] for i in rows]
        assert split.known.default == 0 and np.array_equal(split.known.rows(range(len(split))), train[rows])
        assert np.array_equal(split.observed.rows(range(len(split))), drawn.rows(rows))
    split = manifest.split("test")
    assert np.array_equal(split.known.rows(range(len(split))), test)
    drawn = draw_published(SparseLabels.from_dense(test.astype(np.int8), 0))
    assert np.array_equal(split.observed.rows(range(len(split))), drawn.rows(range(len(test))))


# --- NUS-WIDE -------------------------------------------------------------------------------------------------------

TRAIN, TEST = 20, 6


def nus_labels(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """0 or 1 [rows, 81]; every fourth row has no label at all."""
    labels = (np.random.default_rng(seed).random((rows, 81)) < 0.05).astype(np.int64)
    labels[::4] = 0
    return labels


def nus_paths(rows: int, folder: str) -> list[str]:
    return [f"{folder}/{i:04d}_{i * 77}.jpg" for i in range(rows)]


def make_nus(root: Path, kind: str) -> Path:
    """A small NUS-WIDE with arrays ("arrays") or in its original files ("lists")."""
    root.mkdir()
    parts = {"train": (TRAIN, "actor"), "val": (TEST, "zoo")}
    for seed, (part, (rows, folder)) in enumerate(parts.items()):
        labels, paths = nus_labels(rows, seed), nus_paths(rows, folder)
        make.write_files(root / "Flickr", {p: make.encoded() for p in paths})
        if kind == "arrays":
            np.save(root / f"formatted_{part}_images.npy", np.array(paths))
            np.save(root / f"formatted_{part}_labels.npy", labels.astype(np.float64 if part == "train" else np.int64))
            continue
        official = {"train": "Train", "val": "Test"}[part]
        files = {f"ImageList/{official}Imagelist.txt": "".join(p.replace("/", "\\") + "\r\n" for p in paths)}
        for c, concept in enumerate(nuswide.CONCEPTS):
            name = f"Groundtruth/TrainTestLabels/Labels_{concept}_{official}.txt"
            files[name] = "".join(f"{v}\n" for v in labels[:, c])
        make.write_files(root, {name: text.encode() for name, text in files.items()})
    return root


@pytest.mark.parametrize("kind", ["arrays", "lists"])
def test_nuswide(tmp_path, kind):
    root = make_nus(tmp_path / "NUS", kind)
    manifest = prepare("nuswide", "--root", root, "--out", tmp_path / "m")
    assert len(manifest.classes) == 81 and manifest.classes == sorted(manifest.classes)
    assert (manifest.classes[0], manifest.classes[55], manifest.classes[80]) == ("airport", "sky", "zebra")
    check_protocol(manifest, nus_labels(TRAIN, 0), nus_labels(TEST, 1), nus_paths(TRAIN, "actor"))
    # Rows without a label are kept and observe nothing.
    assert sum((np.diff(manifest.split(n).known.indptr) == 0).sum() for n in ("train", "val")) >= TRAIN // 4
    notes = notes_of(manifest)
    assert "5 official images have no label at all and are kept" in notes
    assert ("20 images, not the published 150,000" in notes) == (kind == "arrays")
    assert ("20 images, not the official 161,789" in notes) == (kind == "lists")


def test_nuswide_images_elsewhere_and_no_cut(tmp_path):
    root = make_nus(tmp_path / "NUS", "arrays")
    (root / "Flickr").rename(tmp_path / "photos")
    # Names as bytes, from an older NumPy.
    names = root / "formatted_train_images.npy"
    np.save(names, np.load(names).astype("S"))
    with pytest.raises(UserError, match="Flickr does not exist; name it with --images"):
        prepare("nuswide", "--root", root, "--out", tmp_path / "m")
    words = ("--images", tmp_path / "photos", "--val-fraction", "0", "--observe", "all")
    manifest = prepare("nuswide", "--root", root, "--out", tmp_path / "m", *words)
    assert set(manifest.splits) == {"train", "test"} and len(manifest.split("train")) == TRAIN


def save_labels(root: Path, change) -> None:
    path = root / "formatted_val_labels.npy"
    np.save(path, change(np.load(path)))


def put(values: npt.NDArray, row: int, column: int, value: float) -> npt.NDArray:
    values[row, column] = value
    return values


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("arrays", lambda r: (r / "formatted_train_images.npy").unlink(), "holds neither formatted_train_images"),
        ("arrays", lambda r: (r / "formatted_val_labels.npy").unlink(), r"formatted_val_labels\.npy cannot be read"),
        ("arrays", lambda r: (r / "formatted_val_labels.npy").write_bytes(b"x"), "is not a NumPy array"),
        ("arrays", lambda r: save_labels(r, lambda v: v[:, :80]), r"shape \(6, 80\).*6 x 81 numbers"),
        ("arrays", lambda r: save_labels(r, lambda v: v[1:]), r"shape \(5, 81\)"),
        ("arrays", lambda r: save_labels(r, lambda v: put(v, 4, 7, -1)), "row 4, column 7 holds -1, not 0 or 1"),
        ("arrays", lambda r: np.save(r / "formatted_train_images.npy", np.zeros(20)), "is not a list of paths"),
        (
            "lists",
            lambda r: (r / "Groundtruth/TrainTestLabels/Labels_sky_Test.txt").write_text("0\n1\n"),
            r"Labels_sky_Test\.txt has 2 lines, but .*TestImagelist\.txt lists 6",
        ),
        (
            "lists",
            lambda r: (r / "Groundtruth/TrainTestLabels/Labels_sky_Test.txt").write_text("0\n1\n1\n2\n0\n0\n"),
            r"Labels_sky_Test\.txt, line 4: expected 0 or 1, not '2'",
        ),
        (
            "lists",
            lambda r: make.write_files(r, {"ConceptsList/Concepts81.txt": b"zebra\nairport\n"}),
            r"Concepts81\.txt does not list the 81 concepts",
        ),
    ],
)
def test_nuswide_bad_input(tmp_path, kind, damage, message):
    root = make_nus(tmp_path / "NUS", kind)
    damage(root)
    with pytest.raises(UserError, match=message):
        prepare("nuswide", "--root", root, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


# --- CUB ------------------------------------------------------------------------------------------------------------

BIRDS = 26


def cub_labels() -> npt.NDArray[np.int64]:
    return (np.random.default_rng(3).random((BIRDS, 312)) < 0.1).astype(np.int64)


def is_training(row: int) -> bool:
    return row % 4 != 3


def make_cub(root: Path) -> Path:
    """A small CUB-200-2011; attributes.txt lies in the folder above, as in the official archive."""
    labels = cub_labels()
    paths = [f"{i % 5:03d}.Some_bird/Some_Bird_{i}.jpg" for i in range(BIRDS)]
    lines = [
        f"{i + 1} {c + 1} {labels[i, c]} {1 + (i + c) % 4} {(i * c) % 7}.5\n" for i in range(BIRDS) for c in range(312)
    ]
    # The official file has lines with a field too many.
    lines[500] = lines[500].replace("\n", " 0\n")
    files = {
        "CUB_200_2011/images.txt": "".join(f"{i + 1} {p}\n" for i, p in enumerate(paths)),
        "CUB_200_2011/train_test_split.txt": "".join(f"{i + 1} {int(is_training(i))}\n" for i in range(BIRDS)),
        "CUB_200_2011/attributes/image_attribute_labels.txt": "".join(lines),
        "attributes.txt": "".join(f"{c + 1} has_part_{c // 10}::value {c}\n" for c in range(312)),
    }
    make.write_files(root, {name: text.encode() for name, text in files.items()})
    make.write_files(root / "CUB_200_2011" / "images", {p: make.encoded() for p in paths})
    return root / "CUB_200_2011"


def test_cub(tmp_path):
    root = make_cub(tmp_path)
    manifest = prepare("cub", "--root", root, "--out", tmp_path / "m")
    assert manifest.num_classes == 312 and manifest.classes[311] == "has_part_31::value 311"
    labels = cub_labels()
    train = [i for i in range(BIRDS) if is_training(i)]
    test = [i for i in range(BIRDS) if not is_training(i)]
    paths = [f"{i % 5:03d}.Some_bird/Some_Bird_{i}.jpg" for i in train]
    check_protocol(manifest, labels[train], labels[test], paths)
    assert "20 images, not the official 5,994" in notes_of(manifest)
    # The folder above will do, too; so will attributes.txt where others keep it.
    (tmp_path / "attributes.txt").rename(root / "attributes" / "attributes.txt")
    again = prepare("cub", "--root", tmp_path, "--val-fraction", "0", "--out", tmp_path / "m2")
    assert np.array_equal(again.split("train").known.rows(range(len(train))), labels[train])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ATTRIBUTES = "attributes/image_attribute_labels.txt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "images.txt").unlink(), r"images\.txt cannot be read"),
        (lambda r: edit(r / "images.txt", "\n3 ", "\n4 "), r"images\.txt, line 3: expected 3 and a text"),
        (lambda r: edit(r / "train_test_split.txt", "\n26 1", ""), "must have 0 or 1 for each of 26"),
        (lambda r: edit(r / "train_test_split.txt", "\n26 1", "\n26 2"), "must have 0 or 1 for each of 26"),
        (lambda r: (r.parent / "attributes.txt").unlink(), r"attributes\.txt is neither in"),
        (lambda r: (r / ATTRIBUTES).unlink(), r"image_attribute_labels\.txt cannot be read"),
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 ", "\n1 x "), "line 3: expected three whole numbers, not '1 x "),
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 ", "\n\n27 3 "), "line 4: image 27 is not in images"),
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 ", "\n1 313 "), "line 3: attribute 313 is not in"),
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 0", "\n1 3 2"), "line 3: 'is present' is 2"),
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 0", "\n1 3 1 1 0.5\n1 3 0"), "attribute 3 of image 1 is both"),
    ],
)
def test_cub_bad_input(tmp_path, damage, message):
    root = make_cub(tmp_path)
    damage(root)
    with pytest.raises(UserError, match=message):
        prepare("cub", "--root", root, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_cub_repeated_and_missing_lines(tmp_path):
    root = make_cub(tmp_path)
    path = root / ATTRIBUTES
    lines = path.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.split()[2] == "0")
    path.write_text("".join(lines[:first] + lines[first + 1 :] + lines[-2:]))
    images, attributes = BIRDS, 312
    rows = cub.read_attributes(path, images, attributes)
    assert len(rows) == BIRDS * 312 + 1 and rows[:, 2].tolist().count(1) == cub_labels().sum() + sum(
        line.split()[2] == "1" for line in lines[-2:]
    )
    manifest = prepare("cub", "--root", root, "--out", tmp_path / "m")
    notes = notes_of(manifest)
    assert "2 lines of image_attribute_labels.txt are there twice" in notes
    assert "1 attributes of images are not annotated and count as absent" in notes
    test = [i for i in range(BIRDS) if not is_training(i)]
    assert np.array_equal(manifest.split("test").known.rows(range(len(test))), cub_labels()[test])
