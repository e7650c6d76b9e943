"""Hugging Face data sets: files that `datasets` wrote, and image folders with metadata."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.huggingface import HuggingFace
from tests.support import data as make
from tests.support.paths import ROOT
from tests.support.prepare import notes_of, prepare

FILES = ROOT / "tests" / "fixtures" / "huggingface"
TRAIN = [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


def codes(manifest, split="train"):
    """Known labels of a split."""
    part = manifest.split(split)
    return part.known.rows(range(len(part))).tolist()


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_files_of_the_library(tmp_path, form):
    """Class names of the schema, null as unlabelled, images byte for byte, in what `datasets` 5.2 wrote."""
    manifest = prepare("huggingface", "--data", FILES / form, "--out", tmp_path / "m")
    assert manifest.name == form and manifest.classes == ["ant", "bee", "cow"]
    assert codes(manifest) == TRAIN
    assert codes(manifest, "test") == [[0, 1, 1], [1, 0, 0], [-1, -1, -1]]
    train, test = manifest.split("train"), manifest.split("test")
    assert [train.relative_path(i) for i in range(3)] == ["train/0.jpg", "train/1.png", "train/2.jpg"]
    # Two are stored under one name, so all of the split get numbers.
    assert [test.relative_path(i) for i in range(3)] == [
        f"test/0000000{i}.{'png' if i == 1 else 'jpg'}" for i in range(3)
    ]
    assert train.width.tolist() == [12] * 6 and train.height.tolist() == [8] * 6
    table = pa.parquet.read_table(FILES / "parquet" / "data" / "train-00000-of-00001.parquet")
    for i, image in enumerate(table["image"].to_pylist()):
        assert Path(train.path(i)).read_bytes() == image["bytes"]
    assert "1 images have no labels" in notes_of(manifest) and "absent (negative)" in notes_of(manifest)
    # The images are the Manifest's own, and move with it.
    assert (tmp_path / "m").rename(tmp_path / "moved") and Path(train.folder).parent.name == "m"
    assert Path(Manifest(tmp_path / "moved").split("train").path(0)).is_file()


def test_parts_of_columns_and_other_kinds(tmp_path):
    """`objects.category` of a detection set, truth values as multi-hot, one file, unknown for what is not listed."""
    file = FILES / "parquet" / "data" / "train-00000-of-00001.parquet"
    objects = prepare("huggingface", "--data", FILES / "saved", "--labels", "objects.category", "--out", tmp_path / "o")
    assert objects.classes == ["ant", "bee", "cow"] and codes(objects) == TRAIN
    hot = prepare("huggingface", "--data", FILES / "parquet", "--labels", "hot", "--out", tmp_path / "h")
    assert codes(hot) == TRAIN and hot.classes == ["class 0", "class 1", "class 2"] and "multi-hot" in notes_of(hot)
    one = prepare("huggingface", "--data", file, "--unlisted", "unknown", "--out", tmp_path / "u")
    rows = codes(one, "train") + codes(one, "val")
    assert sorted(map(tuple, rows)) == sorted(tuple(-1 if v == 0 else v for v in row) for row in TRAIN)


def test_paths_in_a_table_are_linked(tmp_path):
    """Rows that name an image's file instead of holding it."""
    make.write_files(tmp_path, {f"d/{i}.jpg": make.encoded() for i in range(6)})
    images = [{"bytes": None, "path": f"{i}.jpg"} for i in range(6)] + [{"bytes": None, "path": "gone.jpg"}]
    table = pa.table({"image": images, "label": ["cat", "dog"] * 3 + ["cat"]})
    pa.parquet.write_table(table, tmp_path / "d" / "all.parquet")
    manifest = prepare("huggingface", "--data", tmp_path / "d" / "all.parquet", "--out", tmp_path / "m")
    assert sum(len(split) for split in manifest.splits.values()) == 6 and manifest.classes == ["cat", "dog"]
    assert Path(manifest.split("train").path(0)).resolve().parent == tmp_path / "d"


def folder(tmp_path: Path, name: str, text: str) -> Path:
    """An image folder with a metadata file, and images for five rows."""
    root = tmp_path / "photos"
    make.write_files(root, {f"{s}/{i}.jpg": make.encoded() for s in ("train", "validation", "test") for i in range(5)})
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def lines(*labels: object, split: str = "train/") -> str:
    """Rows of metadata.jsonl."""
    return "".join(json.dumps({"file_name": f"{split}{i}.jpg", "labels": v}) + "\n" for i, v in enumerate(labels))


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        # Names; folders name the splits.
        ("metadata.jsonl", lines(["b", "a"], ["a"]) + lines(["b"], split="validation/"), (), [[1, 1], [1, 0]]),
        ("train/metadata.csv", "file_name,labels,note\n0.jpg,b;a,x\n1.jpg,,y\n", (), [[1, 1], [0, 0]]),
        ("train/metadata.csv", "file_name,labels\n0.jpg,\"['b', 'a']\"\n1.jpg,[]\n", (), [[1, 1], [0, 0]]),
        # Class numbers of lists of different lengths, and multi-hot ones of equal.
        ("metadata.jsonl", lines([0, 2], [1]), (), [[1, 0, 1], [0, 1, 0]]),
        ("metadata.jsonl", lines([1, 0, 1], [0, 1, -1]), (), [[1, 0, 1], [0, 1, -1]]),
        ("metadata.jsonl", lines([1, 0], [0, 1]), ("--label-kind", "multihot"), [[1, 0], [0, 1]]),
        ("metadata.jsonl", lines([1, 0], [0, 1]), ("--label-kind", "numbers"), [[1, 1], [1, 1]]),
        (
            "metadata.csv",
            "file_name,labels\ntrain/0.jpg,2\ntrain/1.jpg,0\n",
            ("--label-kind", "numbers"),
            [[0, 0, 1], [1, 0, 0]],
        ),
        # A column for each class.
        ("train/metadata.csv", "file_name,x,y\n0.jpg,1,0\n1.jpg,,1\n", ("--labels", "x", "y"), [[1, 0], [-1, 1]]),
        # Negatives make the rest unknown.
        (
            "metadata.jsonl",
            '{"file_name": "train/0.jpg", "tags": ["a"], "no": ["b"]}\n'
            '{"file_name": "train/1.jpg", "tags": null, "no": ["c"]}\n',
            ("--negatives", "no"),
            [[1, 0, -1], [-1, -1, 0]],
        ),
    ],
)
def test_image_folders(tmp_path, name, text, options, expected):
    root = folder(tmp_path, name, text)
    parser = argparse.ArgumentParser()
    HuggingFace.add_options(parser)
    raw = HuggingFace().read(parser.parse_args(["--data", str(root), *options]))
    train = raw.splits[0]
    assert train.name == "train" and train.known.rows(range(len(train))).tolist() == expected
    assert [train.relative_path(i) for i in range(2)] == ["train/0.jpg", "train/1.jpg"] and raw.image_root == root
    assert [split.name for split in raw.splits[1:]] == (["val"] if "validation" in text else [])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", (), r"metadata\.jsonl, line 1: not an object of JSON"),
        ('{"labels": ["a"]}\n', (), r"metadata\.jsonl: there is no column 'file_name'"),
        ('{"file_name": 3, "labels": ["a"]}\n', (), r"line 1: 'file_name' is no file name"),
        ('{"file_name": "a.jpg", "text": "a"}\n', (), r"name those of the labels with --labels; there are"),
        (lines(["a"], {"x": 1}), (), r"line 2: 'labels' must be a list of names or numbers"),
        (lines(["a"], [1]), (), r"line 1: 'labels' has texts, but .*line 2: 'labels' numbers"),
        (lines([1, 0], [0, 1]), (), "say which with --label-kind"),
        (lines([0.5, 0]), (), r"line 1: 'labels': 0\.5 is not 1, 0 or -1"),
        (lines([1, 0, 0], [1, 1]), ("--label-kind", "multihot"), r"line 2: 'labels': 2 values for 3 classes"),
        (lines([0], [999999999]), (), "no class has a name; name them with --classes"),
        (lines(["a"], [""]), (), "line 2: 'labels': '' is no class name"),
        (lines(["a"]) + lines(["b"]), (), "image train/0.jpg is listed twice"),
        (lines([]), (), "no training image has a positive class"),
        ("", (), "has no rows"),
        (lines(["a"]), ("--labels", "tags"), "there is no column 'tags'"),
    ],
)
def test_image_folders_that_are_wrong(tmp_path, text, options, message):
    root = folder(tmp_path, "metadata.jsonl", text)
    with pytest.raises(UserError, match=message):
        prepare("huggingface", "--data", root, "--verify", "none", *options, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damaged_files(tmp_path):
    for form, name in (("saved", "train/data-00000-of-00001.arrow"), ("parquet", "data/train-00000-of-00001.parquet")):
        shutil.copytree(FILES / form, tmp_path / form)
        path = tmp_path / form / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=r"train-00000|data-00000-of-00001\.arrow"):
            prepare("huggingface", "--data", tmp_path / form, "--out", tmp_path / "m")
    (tmp_path / "saved" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(UserError, match=r"state\.json has no list '_data_files' of file names"):
        prepare("huggingface", "--data", tmp_path / "saved", "--out", tmp_path / "m")
    (tmp_path / "saved" / "dataset_dict.json").unlink()
    with pytest.raises(UserError, match="holds no data set of Hugging Face: no dataset_dict"):
        prepare("huggingface", "--data", tmp_path / "saved", "--out", tmp_path / "m")
