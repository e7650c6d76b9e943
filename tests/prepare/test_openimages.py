"""OpenImages from the official files of every version to a Manifest."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_openimages import Release, make_release
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.openimages.split_names import split_files
from tests.support.openimages import (
    SMALL_RELEASE,
    expected_labels,
    labels_of,
    prepare_release,
    read_plainly,
    write_labels,
)
from tests.support.prepare import report_of, run_prepare

NAMES = {"train": "train", "val": "validation", "test": "test"}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A V7 release with machine labels and image lists, without images."""
    return make_release(
        *(tmp_path_factory.mktemp("oid"), "v7"),
        images=SMALL_RELEASE,
        machine_rows={"train": 200, "validation": 30, "test": 30},
        images_info=True,
    )


@pytest.mark.parametrize("version", ["v3", "v4", "v5", "v6", "v7"])
def test_versions(tmp_path, version, capsys):
    made = make_release(tmp_path, version, images=SMALL_RELEASE, decimals=version == "v4", seed=int(version[1]))
    manifest = prepare_release(made, tmp_path / "m")
    class_ids = made.classes.read_text().split()
    assert list(manifest.splits) == ["train", "val", "test"] and manifest.num_classes == 40
    report = report_of(manifest)
    assert report["settings"]["class_ids"] == class_ids
    for name, official in NAMES.items():
        split, known = manifest.split(name), expected_labels(made.labels[official], class_ids)
        assert labels_of(split, split.known, class_ids) == known
        assert split.known.default == -1 and split.known.classes.dtype == np.int16
        assert all((np.diff(c) > 0).all() for c in np.split(split.known.classes, split.known.indptr[1:-1]))
        assert split.observed is split.known and not split.hides_labels
        assert sorted({i for i, _ in known}) == split.ids.tolist()
        first = f"{official}/{int(split.ids[0]):016x}.jpg"
        assert split.relative_path(0) == first and len(Path(first).stem) == 16
        assert not split.width.any() and (split.orientation == 1).all() and len(split.height) == len(split)
        rows = read_plainly(made.labels[official])
        entry = report["coverage"][name]
        assert entry["rows"] == len(rows) == sum(entry["rows_by_source"].values())
        assert entry["rows_of_other_classes"] == len(rows) - len(known)
    # Names in the order of the trainable list; two classes are called Twin.
    with made.descriptions.open(encoding="utf-8", newline="") as file:
        names = dict(csv.reader(file))
    assert sum(c.startswith("Twin (/m/0") for c in manifest.classes) == 2
    assert {'Quoted "name"', "Ducks, geese and swans", "Café au lait", "茶"} <= set(manifest.classes)
    assert all(re.split(r" \(/\w+/", c)[0] == names[i] for c, i in zip(manifest.classes, class_ids, strict=True))
    forms = {i.split("/")[1] for i in class_ids}
    assert forms == ({"m", "g", "oi"} if version == "v7" else {"m"})
    assert (b"\r\n" in made.descriptions.read_bytes()) == (version == "v7")
    assert "rows of classes that" in capsys.readouterr().out


def test_one_split_and_no_descriptions(tmp_path, release):
    train = shutil.copy(release.labels["train"], tmp_path / "mine.csv")
    arguments = [
        "openimages",
        "--labels",
        train,
        "--classes",
        release.classes,
        "--images",
        "none",
        "--out",
        tmp_path / "m",
    ]
    run_prepare(*arguments)
    manifest = Manifest(tmp_path / "m")
    assert list(manifest.splits) == ["train"] and manifest.classes == release.classes.read_text().split()
    notes = " ".join(report_of(manifest)["notes"])
    assert "40 of 40 classes have no name" in notes and "no val and no test split" in notes


A, B, C = "/m/0a", "/m/0b", "/m/0c"


def test_machine_labels_are_seen_and_are_no_truth(tmp_path, release):
    arguments = ["--machine-labels", *release.machine.values(), "--machine-threshold", "0.8"]
    manifest = prepare_release(release, tmp_path / "m", *arguments)
    class_ids = release.classes.read_text().split()
    for name, official in NAMES.items():
        split = manifest.split(name)
        known = expected_labels(release.labels[official], class_ids)
        assert labels_of(split, split.known, class_ids) == known
        added = {
            (i, c): 1 for i, c, value in read_plainly(release.machine[official]) if value >= 0.8 and c in class_ids
        }
        assert set(added) - set(known)
        assert labels_of(split, split.observed, class_ids) == {**added, **known}
        assert not split.hides_labels
    entry = report_of(manifest)["coverage"]["train"]["machine"]
    rows = read_plainly(release.machine["train"])
    assert entry["rows"] == 200 == len(rows)
    assert entry["below_threshold"] == sum(value < 0.8 and c in class_ids for _, c, value in rows)
    hidden = prepare_release(release, tmp_path / "hidden", *arguments, "--observe", "keep=0.5").split("train")
    assert hidden.hides_labels
    for threshold in ("0", "1.5", "nan"):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            prepare_release(release, tmp_path / "x", *arguments[:-1], threshold)
    with pytest.raises(UserError, match="go together"):
        prepare_release(release, tmp_path / "x", "--machine-threshold", "0.5")
    with pytest.raises(UserError, match="has split val, --labels does not"):
        prepare_release(release, tmp_path / "x", *arguments, labels=[release.labels["train"]])


def test_which_split(tmp_path):
    def paths_by_split(*arguments: str, splits: Sequence[str] | None = None) -> dict[str, list[str]]:
        out = split_files(arguments, splits, "--labels")
        return {name: [str(p) for p in paths] for name, paths in out.items()}

    assert paths_by_split("oidv6-train-annotations-human-imagelabels.csv") == {
        "train": ["oidv6-train-annotations-human-imagelabels.csv"]
    }
    assert list(paths_by_split("x/test/annotations-human.csv", "train/annotations-human.csv")) == ["train", "test"]
    assert paths_by_split("oidv7-val-a.csv", "validation-b.csv") == {"val": ["oidv7-val-a.csv", "validation-b.csv"]}
    assert paths_by_split("mine.csv") == {"train": ["mine.csv"]}
    assert paths_by_split("validation=a=b.csv", "c.csv", splits=["train"]) == {"train": ["c.csv"], "val": ["a=b.csv"]}
    assert paths_by_split("a", "b", "c", splits=["test", "val", "test"]) == {"val": ["b"], "test": ["a", "c"]}
    assert paths_by_split("train.csv", "b.csv", splits=["validation"]) == {"val": ["train.csv", "b.csv"]}
    with pytest.raises(UserError, match=r"the name b\.csv does not tell the split; write train=b\.csv"):
        paths_by_split("train.csv", "b.csv")
    with pytest.raises(UserError, match="--split names 2 splits for 3 files"):
        paths_by_split("a", "b", "c", splits=["train", "val"])


def test_nothing_in_common(tmp_path, release):
    labels = write_labels(tmp_path / "train.csv", [(1, "/m/0zzzzzz", 1)])
    with pytest.raises(UserError, match=r"no row of .* has a class of .*same release"):
        prepare_release(release, tmp_path / "m", labels=[labels])
    with pytest.raises(UserError, match="--verify header needs images"):
        prepare_release(release, tmp_path / "m", "--verify", "header")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_a_image_is_in_one_split(tmp_path, release):
    train = write_labels(tmp_path / "train.csv", [(1, A, 1), (5, A, 1), (9, A, 0)])
    test = write_labels(tmp_path / "test.csv", [(5, A, 0), (10, A, 1)])
    message = r"1 images have labels in split train and in split test \(the first is 0000000000000005\)"
    (tmp_path / "classes.txt").write_text(f"{A}\n")
    arguments = ["openimages", "--classes", tmp_path / "classes.txt", "--images", "none", "--out", tmp_path / "m"]
    with pytest.raises(UserError, match=message):
        run_prepare(*arguments, "--labels", train, test)
    assert not (tmp_path / "m").exists()
