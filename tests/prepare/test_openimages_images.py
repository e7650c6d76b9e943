"""The images of OpenImages: in any folders, in tar files, turned as image lists say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_openimages import Release, make_release
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.observed_labels import draw_published
from tests.support import data as make
from tests.support.openimages import (
    SMALL_RELEASE,
    expected_labels,
    labels_of,
    prepare_release,
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


@pytest.mark.parametrize("layout", ["bucket", "flat", "nested"])
def test_images_in_any_folders(tmp_path, layout, capsys):
    made = make_release(tmp_path, "v6", images=SMALL_RELEASE, image_fraction=0.5, layout=layout)
    (tmp_path / "images" / "list.txt").write_text("x")
    whole = prepare_release(made, tmp_path / "whole", images="none")
    assert capsys.readouterr().out.rstrip().endswith("--data.image_root FOLDER_OF_THE_IMAGES")
    manifest = prepare_release(made, tmp_path / "m")
    assert "image_root" not in capsys.readouterr().out
    report = report_of(manifest)
    for name, official in NAMES.items():
        split, every, written = manifest.split(name), whole.split(name), made.written[official]
        assert split.ids.tolist() == [i for i in every.ids.tolist() if i in set(written.tolist())]
        assert all(Path(split.path(i)).is_file() for i in range(len(split)))
        assert (split.width > 30).all() and (split.height >= 32).all()
        rows = np.flatnonzero(np.isin(every.ids, written))
        assert np.array_equal(split.known.rows(range(len(split))), every.known.rows(rows))
        entry = report["coverage"][name]
        assert (entry["images_found"], entry["images_missing"]) == (len(split), len(every) - len(split))
        assert set(entry["first_missing"]).isdisjoint(f"{i:016x}" for i in written.tolist())
        assert any(note.startswith(f"{name}: {len(split)} of {len(every)} labelled") for note in report["notes"])
    assert report["coverage"]["images"]["other_files"] == 1 and report["left_out"]["total"] == 0
    folders = {i >> 56 for i in made.written["train"].tolist()} if layout == "nested" else {0}
    assert len(manifest.split("train").templates) == len(folders)


def test_broken_extra_and_doubled_images(tmp_path):
    made = make_release(tmp_path, "v6", images={"train": 20}, image_fraction=1.0)
    ids = made.written["train"].tolist()
    names = [f"{i:016x}" for i in ids]
    folder = tmp_path / "images" / "train"
    (folder / f"{names[3]}.jpg").write_bytes(b"")
    other = {"strange {0}/00000000000000ff.jpg": make.encoded(), f"strange {{0}}/{names[5]}.jpg": make.encoded()}
    (folder / f"{names[7]}.jpg").rename(tmp_path / "images" / f"{names[7]}.JPG")
    (folder / f"{names[8]}.jpg").rename(tmp_path / "images" / "train" / f"{names[8].upper()}x.jpg")
    make.write_files(tmp_path / "images", {**other, f"strange {{0}}/{names[8]}.jpeg": make.encoded()})
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    manifest = prepare_release(made, tmp_path / "m")
    split, report = manifest.split("train"), report_of(manifest)
    assert split.ids.tolist() == [i for i in ids if i != ids[3]]
    paths = {split.ids[i]: split.relative_path(i) for i in range(len(split))}
    assert paths[ids[7]] == f"{names[7]}.JPG" and paths[ids[8]] == f"strange {{0}}/{names[8]}.jpeg"
    # Of two, the first folder in alphabetical order.
    assert paths[ids[5]] == f"strange {{0}}/{names[5]}.jpg" and len(split.templates) == 4
    assert report["left_out"]["reasons"] == {"empty file": 1}
    images = report["coverage"]["images"]
    assert images["in_two_folders"] == 1 and images["first_without_label"] == ["00000000000000ff"]
    assert images["without_label"] == 1 and images["other_files"] == 1


def test_which_images_are_there_changes_no_draw(tmp_path):
    made = make_release(tmp_path, "v6", images={"train": 40}, image_fraction=0.5)
    whole = prepare_release(made, tmp_path / "whole", "--observe", "single", images="none").split("train")
    part = prepare_release(made, tmp_path / "part", "--observe", "single").split("train")
    drawn = draw_published(whole.known)
    assert np.array_equal(whole.observed.rows(range(len(whole))), drawn.rows(range(len(whole))))
    rows = np.flatnonzero(np.isin(whole.ids, part.ids))
    assert 0 < len(part) < len(whole) and part.hides_labels
    assert np.array_equal(part.observed.rows(range(len(part))), drawn.rows(rows))


@pytest.mark.parametrize("layout", ["tar", "tar.gz"])
def test_tar_files_of_the_bucket(tmp_path, layout):
    made = make_release(tmp_path, "v6", images={"train": 30, "test": 6}, image_fraction=0.8, layout=layout)
    prepare_release(made, tmp_path / "labels", images="none")
    arguments = [
        "shard",
        "--manifest",
        tmp_path / "labels",
        "--tars",
        made.images,
        "--leave-out",
        "--out",
        tmp_path / "m",
    ]
    run_prepare(*arguments, "--workers", "1")
    manifest = Manifest(tmp_path / "m")
    class_ids = made.classes.read_text().split()
    for name in ("train", "test"):
        split, written = manifest.split(name), set(made.written[name].tolist())
        expected = expected_labels(made.labels[name], class_ids)
        assert labels_of(split, split.known, class_ids) == {k: code for k, code in expected.items() if k[0] in written}
        assert all(split.read(i).startswith(b"\xff\xd8") for i in range(len(split)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rmdir(), "does not exist; write --images none"),
        (lambda f: None, "no image below .* that is named by .*16 hexadecimal digits"),
        (lambda f: (f / "train_0.tar.gz").write_bytes(b"x"), r"holds 1 packed files \(train_0.tar.gz.*shard --man"),
        (lambda f: (f / "00000000000000ff.jpg").write_bytes(b"x"), "none of the .* labelled images of split train"),
    ],
)
def test_no_images(tmp_path, release, change, message):
    (tmp_path / "images").mkdir()
    change(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        prepare_release(release, tmp_path / "m", images=tmp_path / "images")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_rotation(tmp_path, capsys):
    made = make_release(tmp_path, "v6", images={"train": 6}, image_fraction=1.0)
    ids = [f"{i:016x}" for i in made.ids["train"].tolist()]
    for i, orientation in enumerate((1, 1, 1, 1, 3, 6)):
        path = tmp_path / "images" / "train" / f"{ids[i]}.jpg"
        path.write_bytes(make.encoded(exif=make.exif(orientation)))
    turns = ["0.0", "90", "180.0", "270.0", "nan", "0"]
    listed = tmp_path / "list.csv"
    with listed.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Title", "Rotation"])
        # A title may hold commas, quotes and line ends.
        writer.writerows([i, f'a "b",\n{turn}', turn] for i, turn in zip([*ids, "f" * 16], [*turns, ""], strict=True))
    split = prepare_release(made, tmp_path / "m", "--images-info", listed, "--orientation", "exif").split("train")
    # Counterclockwise by 90 degrees is EXIF's 8; where the list says nothing, the image's own data count.
    assert split.orientation.tolist() == [1, 8, 3, 6, 3, 1]
    assert split.width.tolist() == [48, 32, 48, 32, 48, 48] and split.height.tolist() == [32, 48, 32, 48, 32, 32]
    report = report_of(Manifest(tmp_path / "m"))["splits"]["train"]
    assert (report["turned_by_list"], report["turned_by_exif"]) == (3, 1)
    assert "the image lists know the rotation of 5 of 6 images" in capsys.readouterr().out
    plain = prepare_release(made, tmp_path / "plain", "--images-info", listed).split("train")
    assert plain.orientation.tolist() == [1, 8, 3, 6, 1, 1]


def test_official_image_lists(tmp_path, release):
    manifest = prepare_release(release, tmp_path / "m", "--images-info", *release.images_info.values())
    for name, official in NAMES.items():
        split = manifest.split(name)
        with release.images_info[official].open(encoding="utf-8", newline="") as file:
            listed = {int(r["ImageID"], 16): r["Rotation"] for r in csv.DictReader(file)}
        wanted = {"90.0": 8, "180.0": 3, "270.0": 6}
        assert split.orientation.tolist() == [wanted.get(listed[i], 1) for i in split.ids.tolist()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageID,Title\n", "line 1: the header must be ImageID,Rotation"),
        ("ImageID,Rotation\n00000000000000ff,0\n00000000000000ff,45\n", "line 3: the Rotation '45'"),
        ("ImageID,Rotation\n00000000000000ff,0\n0ff,0\n", "line 3: the ImageID '0ff'"),
        ("ImageID,Rotation\n00000000000000ff,0\n00000000000000fg,0\n", "line 3: the ImageID '00000000000000fg'"),
        ('ImageID,T,Rotation\n00000000000000ff,"a\nb",0\n00000000000000ff,0\n', "line 4: 2 fields instead of 3"),
    ],
)
def test_bad_image_lists(tmp_path, release, text, message):
    listed = tmp_path / "list.csv"
    listed.write_text(text)
    with pytest.raises(UserError, match=f"list.csv, {message}"):
        prepare_release(release, tmp_path / "m", "--images-info", listed)
