"""CUB from its files to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets import cub
from tests.support import data as make
from tests.support.prepare import check_protocol, notes_of, prepare

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


@pytest.mark.parametrize("certainty", [2, 4])
def test_what_is_not_certain_is_unknown(tmp_path, certainty):
    root = make_cub(tmp_path)
    options = ("--certainty", certainty, "--observe", "all", "--val-fraction", "0")
    manifest = prepare("cub", "--root", root, "--out", tmp_path / "m", *options)
    certain = 1 + np.add.outer(np.arange(BIRDS), np.arange(312)) % 4
    labels = np.where(certain >= certainty, cub_labels(), -1)
    for name, chosen in (("train", True), ("test", False)):
        rows = [i for i in range(BIRDS) if is_training(i) == chosen]
        found = manifest.split(name).known.rows(range(len(rows)))
        assert np.array_equal(found, labels[rows]) and {-1, 0, 1} <= set(found.ravel().tolist())
    assert f"{(certain < certainty).sum():,} attributes of images are less certain than" in notes_of(manifest)


def test_a_certainty_out_of_range(tmp_path):
    root = make_cub(tmp_path)
    edit(root / ATTRIBUTES, "\n1 3 0 3 ", "\n1 3 0 5 ")
    with pytest.raises(UserError, match=r"image_attribute_labels\.txt, line 3: the certainty must be 1 to 4"):
        prepare("cub", "--root", root, "--certainty", 2, "--out", tmp_path / "m")
    # Nobody asked how certain it is.
    assert prepare("cub", "--root", root, "--out", tmp_path / "m").num_classes == 312


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
        (lambda r: edit(r / ATTRIBUTES, "\n1 3 ", "\n1 x "), "line 3: expected whole numbers, not '1 x "),
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
    assert "2 lines of image_attribute_labels.txt repeat others" in notes
    assert "1 attributes of images are not annotated and count as absent" in notes
    test = [i for i in range(BIRDS) if not is_training(i)]
    assert np.array_equal(manifest.split("test").known.rows(range(len(test))), cub_labels()[test])
