"""NUS-WIDE from its files to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.prepare.datasets import nuswide
from spml_fast.prepare.observed_labels import draw_published
from tests.support import data as make
from tests.support.paths import need_data
from tests.support.prepare import check_protocol, notes_of, prepare, report_of

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
    # Photo 77 and others stand in both lists.
    assert "6 photos are listed more than once, under several concepts, 6 of them in train and in test" in notes
    assert "5 official images have no label at all and are kept" in notes
    assert ("20 images, not the published 150,000" in notes) == (kind == "arrays")
    assert ("20 images, not the official 161,789" in notes) == (kind == "lists")


@pytest.mark.parametrize(
    "moves",
    [
        {"Groundtruth": "GroundTruth", "Flickr": "images"},
        {"Groundtruth/TrainTestLabels": "TrainTestLabels", "ImageList/TrainImagelist.txt": "TrainImagelist.txt"}
        | {"ImageList/TestImagelist.txt": "TestImagelist.txt", "ConceptsList/Concepts81.txt": "Concepts81.txt"},
    ],
)
def test_layouts_of_copies(tmp_path, moves):
    root = make_nus(tmp_path / "NUS", "lists")
    make.write_files(root, {"ConceptsList/Concepts81.txt": "\r\n".join(nuswide.CONCEPTS).encode()})
    expected = prepare("nuswide", "--root", root, "--out", tmp_path / "expected", "--observe", "all")
    for old, new in moves.items():
        (root / old).rename(root / new)
    found = prepare("nuswide", "--root", root, "--out", tmp_path / "m", "--observe", "all")
    for name, split in expected.splits.items():
        rows = range(len(split))
        assert found.split(name).known.rows(rows).tolist() == split.known.rows(rows).tolist()
        assert [found.split(name).relative_path(i) for i in rows] == [split.relative_path(i) for i in rows]


def test_all_images_in_one_folder(tmp_path):
    root = make_nus(tmp_path / "NUS", "lists")
    (root / "images").mkdir()
    # The first image of the list is gone, as many of the original links are.
    for folder in ("actor", "zoo"):
        (root / "Flickr" / folder / "0000_0.jpg").unlink()
    for path in sorted((root / "Flickr").rglob("*.jpg")):
        # The number is of the concept, so files of one name may come from two of them.
        path.rename(root / "images" / path.name)
    (root / "Flickr" / "actor").rmdir()
    (root / "Flickr" / "zoo").rmdir()
    (root / "Flickr").rmdir()
    manifest = prepare("nuswide", "--root", root, "--out", tmp_path / "m", "--val-fraction", "0", "--observe", "all")
    assert manifest.split("train").relative_path(2) == "0003_231.jpg"
    assert manifest.split("train").known.rows(range(TRAIN - 1)).tolist() == nus_labels(TRAIN, 0)[1:].tolist()


def test_the_official_concepts():
    path = need_data("nuswide", "Concepts81.txt")
    assert nuswide.read_lines(path) == nuswide.CONCEPTS and b"\r\n" in path.read_bytes()


def test_nuswide_images_elsewhere_and_no_cut(tmp_path):
    root = make_nus(tmp_path / "NUS", "arrays")
    (root / "Flickr").rename(tmp_path / "photos")
    # Names as bytes, from an older NumPy.
    names = root / "formatted_train_images.npy"
    np.save(names, np.load(names).astype("S"))
    with pytest.raises(UserError, match="Flickr does not exist; name it with --images"):
        prepare("nuswide", "--root", root, "--out", tmp_path / "m")
    options = ("--images", tmp_path / "photos", "--val-fraction", "0", "--observe", "all")
    manifest = prepare("nuswide", "--root", root, "--out", tmp_path / "m", *options)
    assert set(manifest.splits) == {"train", "test"} and len(manifest.split("train")) == TRAIN


def test_the_papers_observed_labels(tmp_path):
    root = make_nus(tmp_path / "NUS", "arrays")
    known = SparseLabels.from_dense(nus_labels(TRAIN, 0).astype(np.int8), 0)
    drawn = draw_published(known, seed=77, negatives=1).rows(range(TRAIN))
    path = root / "formatted_train_labels_obs.npy"
    np.save(path, np.select([drawn == 1, drawn == 0], [1.0, -1.0], 0.0))
    options = ("--root", root, "--observed", path)
    with pytest.raises(UserError, match=r"--observed FILE\.npy and --observed-format go together"):
        prepare("nuswide", *options, "--out", tmp_path / "m")
    read = prepare("nuswide", *options, "--observed-format", "spml", "--out", tmp_path / "read")
    made = prepare(
        "nuswide", "--root", root, "--observe", "single=1,negatives=1", "--seed", 77, "--out", tmp_path / "made"
    )
    for name in ("train", "val"):
        rows = range(len(read.split(name)))
        assert read.split(name).hides_labels
        assert read.split(name).observed.rows(rows).tolist() == made.split(name).observed.rows(rows).tolist()
        assert (read.split(name).observed.rows(rows) == 0).sum(1).tolist() == [1] * len(rows)
    assert f"train: observed labels were read from {path}, not drawn" in notes_of(read)
    assert report_of(read)["observe"]["first_split_read_from"] == str(path)
    assert "first_split_read_from" not in report_of(made)["observe"] and report_of(made)["observe"]["negatives"] == 1


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
