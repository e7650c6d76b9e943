"""OpenImages from the official files of every version to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.make_openimages import Release, draw_rows, hex_ids, make_release, zipf_cdf
from spml_fast.cli import prepare as prepare_command
from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.datasets import openimages
from spml_fast.prepare.datasets.openimages import csv as files
from spml_fast.prepare.observed_labels import draw_published
from tests.support import data as make
from tests.support.paths import need_data

Labels = dict[tuple[int, str], int]
NAMES = {"train": "train", "val": "validation", "test": "test"}
SMALL = {"train": 60, "validation": 12, "test": 15}


def prepare(release: Release, out: Path, *words: object, images: object = None, labels: Sequence[object] = ()):
    """Run the command in this process; a user error stays an exception."""
    chosen = labels or release.labels.values()
    arguments = ["openimages", "--labels", *chosen, "--classes", release.classes]
    arguments += ["--descriptions", release.descriptions, "--images", images or release.images or "none"]
    assert prepare_command.main([str(a) for a in (*arguments, "--out", out, *words)]) == 0
    return Manifest(out)


def report_of(manifest: Manifest) -> dict:
    return json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))


def read_plainly(path: Path) -> list[tuple[int, str, float]]:
    """Rows of a label file: id, class id, confidence; by the standard library, a line at a time."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(r["ImageID"], 16), r["LabelName"], float(r["Confidence"])) for r in csv.DictReader(file)]


def labels_of(split: Split, labels: SparseLabels, class_ids: Sequence[str]) -> Labels:
    """(id, class id) -> code of everything that is listed."""
    assert split.ids is not None
    rows = labels.entry_rows()
    entries = zip(split.ids[rows].tolist(), labels.classes.tolist(), labels.codes.tolist(), strict=True)
    found = {(i, class_ids[c]): code for i, c, code in entries}
    assert len(found) == len(labels.codes)
    return found


def expected_labels(path: Path, class_ids: Sequence[str]) -> Labels:
    wanted = set(class_ids)
    return {(i, name): int(value) for i, name, value in read_plainly(path) if name in wanted}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A V7 release with machine labels and image lists, without images."""
    return make_release(
        *(tmp_path_factory.mktemp("oid"), "v7"),
        images=SMALL,
        machine_rows={"train": 200, "validation": 30, "test": 30},
        images_info=True,
    )


# --- every version --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v3", "v4", "v5", "v6", "v7"])
def test_versions(tmp_path, version, capsys):
    made = make_release(tmp_path, version, images=SMALL, decimals=version == "v4", seed=int(version[1]))
    manifest = prepare(made, tmp_path / "m")
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
    assert all(c.split(" (/m/")[0] == names[i] for c, i in zip(manifest.classes, class_ids, strict=True))
    assert "rows of classes that" in capsys.readouterr().out


def test_real_class_descriptions():
    path = need_data("openimages", "oidv6-class-descriptions.csv")
    found = files.read_descriptions(path)
    assert len(found) == 19_994 and found["/m/01c_0l"] == "Ducks, geese and swans"
    names = openimages.class_names(list(found), found)
    # Twelve names belong to two classes each.
    assert len(set(names)) == 19_994 and sum(n.endswith(")") and "(/m/" in n for n in names) == 24


def test_one_split_and_no_descriptions(tmp_path, release):
    train = shutil.copy(release.labels["train"], tmp_path / "mine.csv")
    words = ["openimages", "--labels", train, "--classes", release.classes, "--images", "none", "--out", tmp_path / "m"]
    assert prepare_command.main([str(w) for w in words]) == 0
    manifest = Manifest(tmp_path / "m")
    assert list(manifest.splits) == ["train"] and manifest.classes == release.classes.read_text().split()
    notes = " ".join(report_of(manifest)["notes"])
    assert "40 of 40 classes have no name" in notes and "no val and no test split" in notes


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bucket", "flat", "nested"])
def test_images_in_any_folders(tmp_path, layout, capsys):
    made = make_release(tmp_path, "v6", images=SMALL, pictures=0.5, layout=layout)
    (tmp_path / "images" / "list.txt").write_text("x")
    whole = prepare(made, tmp_path / "whole", images="none")
    assert capsys.readouterr().out.rstrip().endswith("--data.image_root FOLDER_OF_THE_IMAGES")
    manifest = prepare(made, tmp_path / "m")
    assert "image_root" not in capsys.readouterr().out
    report = report_of(manifest)
    for name, official in NAMES.items():
        split, every, there = manifest.split(name), whole.split(name), made.pictures[official]
        assert split.ids.tolist() == [i for i in every.ids.tolist() if i in set(there.tolist())]
        assert all(Path(split.path(i)).is_file() for i in range(len(split)))
        assert (split.width > 30).all() and (split.height >= 32).all()
        rows = np.flatnonzero(np.isin(every.ids, there))
        assert np.array_equal(split.known.rows(range(len(split))), every.known.rows(rows))
        entry = report["coverage"][name]
        assert (entry["images_found"], entry["images_missing"]) == (len(split), len(every) - len(split))
        assert set(entry["first_missing"]).isdisjoint(f"{i:016x}" for i in there.tolist())
        assert any(note.startswith(f"{name}: {len(split)} of {len(every)} labelled") for note in report["notes"])
    assert report["coverage"]["images"]["other_files"] == 1 and report["left_out"]["total"] == 0
    folders = {i >> 56 for i in made.pictures["train"].tolist()} if layout == "nested" else {0}
    assert len(manifest.split("train").templates) == len(folders)


def test_broken_extra_and_doubled_images(tmp_path):
    made = make_release(tmp_path, "v6", images={"train": 20}, pictures=1.0)
    ids = made.pictures["train"].tolist()
    names = [f"{i:016x}" for i in ids]
    folder = tmp_path / "images" / "train"
    (folder / f"{names[3]}.jpg").write_bytes(b"")
    other = {"strange {0}/00000000000000ff.jpg": make.encoded(), f"strange {{0}}/{names[5]}.jpg": make.encoded()}
    (folder / f"{names[7]}.jpg").rename(tmp_path / "images" / f"{names[7]}.JPG")
    (folder / f"{names[8]}.jpg").rename(tmp_path / "images" / "train" / f"{names[8].upper()}x.jpg")
    make.write_files(tmp_path / "images", {**other, f"strange {{0}}/{names[8]}.jpeg": make.encoded()})
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    manifest = prepare(made, tmp_path / "m")
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
    made = make_release(tmp_path, "v6", images={"train": 40}, pictures=0.5)
    whole = prepare(made, tmp_path / "whole", "--observe", "single", images="none").split("train")
    part = prepare(made, tmp_path / "part", "--observe", "single").split("train")
    drawn = draw_published(whole.known)
    assert np.array_equal(whole.observed.rows(range(len(whole))), drawn.rows(range(len(whole))))
    rows = np.flatnonzero(np.isin(whole.ids, part.ids))
    assert 0 < len(part) < len(whole) and part.hides_labels
    assert np.array_equal(part.observed.rows(range(len(part))), drawn.rows(rows))


@pytest.mark.parametrize("layout", ["tar", "tar.gz"])
def test_tar_files_of_the_bucket(tmp_path, layout):
    made = make_release(tmp_path, "v6", images={"train": 30, "test": 6}, pictures=0.8, layout=layout)
    prepare(made, tmp_path / "labels", images="none")
    words = ["shard", "--manifest", tmp_path / "labels", "--tars", made.images, "--leave-out", "--out", tmp_path / "m"]
    assert prepare_command.main([str(w) for w in (*words, "--workers", "1")]) == 0
    manifest = Manifest(tmp_path / "m")
    class_ids = made.classes.read_text().split()
    for name in ("train", "test"):
        split, there = manifest.split(name), set(made.pictures[name].tolist())
        expected = expected_labels(made.labels[name], class_ids)
        assert labels_of(split, split.known, class_ids) == {k: code for k, code in expected.items() if k[0] in there}
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
        prepare(release, tmp_path / "m", images=tmp_path / "images")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


# --- what rows say --------------------------------------------------------------------------------------------------

A, B, C = "/m/0a", "/m/0b", "/m/0c"


def label_file(path: Path, rows: Sequence[tuple[int, str, object]], source: str = "verification", end: str = "\n"):
    """Write a label file of (image, class id, confidence)."""
    lines = [f"{i:016x},{source},{name},{value}" for i, name, value in rows]
    path.write_text("ImageID,Source,LabelName,Confidence" + end + "".join(line + end for line in lines), newline="")
    return path


def grouped(paths, conflicts="positive", machine=None, classes=(A, B), threshold=0.5):
    machine_rows = None if machine is None else files.read_labels([machine], classes, threshold)
    return openimages.group_rows(files.read_labels(paths, classes), machine_rows, len(classes), conflicts)


CONFLICTING = [(1, A, 1), (1, A, 0), (2, A, 0), (2, A, 1), (2, B, 1), (3, A, 1), (3, A, 1), (4, B, 0), (5, C, 1)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("positive", {1: [1, -1], 2: [1, 1], 3: [1, -1], 4: [-1, 0]}),
        ("negative", {1: [0, -1], 2: [0, 1], 3: [1, -1], 4: [-1, 0]}),
        ("last", {1: [0, -1], 2: [1, 1], 3: [1, -1], 4: [-1, 0]}),
        ("drop", {2: [-1, 1], 3: [1, -1], 4: [-1, 0]}),
    ],
)
def test_contradictions(tmp_path, policy, expected):
    # The rows of an image lie apart, in two files.
    first = label_file(tmp_path / "a.csv", CONFLICTING[4:] + CONFLICTING[:1])
    second = label_file(tmp_path / "b.csv", CONFLICTING[1:4], "crowdsource-verification")
    found = grouped([first, second], policy)
    assert found.ids.tolist() == list(expected)
    assert found.human.rows(range(len(expected))).tolist() == list(expected.values())
    assert (found.named, found.repeated, found.conflicts, found.machine) == (5, 3, 2, None)


def test_machine_labels(tmp_path):
    human = label_file(tmp_path / "human.csv", [(1, A, 0), (1, A, 1), (2, A, 0), (3, C, 1), (4, B, 1)])
    rows = [(1, A, 0.9), (1, B, 0.7), (2, A, 1.0), (2, A, 0.9), (2, B, 0.6), (3, C, 1.0), (5, B, 0.8), (5, B, 0.7)]
    machine = label_file(tmp_path / "machine.csv", rows, "machine")
    found = grouped([human], "drop", machine, threshold=0.7)
    assert found.ids.tolist() == [1, 2, 4, 5]
    assert found.human.rows(range(4)).tolist() == [[-1, -1], [0, -1], [-1, 1], [-1, -1]]
    # A contradicted pair has been verified, so the machine has no say in it.
    assert found.machine is not None
    assert found.machine.rows(range(4)).tolist() == [[-1, 1], [-1, -1], [-1, -1], [-1, 1]]
    assert (found.repeated, found.conflicts, found.overruled) == (1, 1, 3)
    assert grouped([human], "positive", machine, threshold=0.7).human.rows([0]).tolist() == [[1, -1]]


def test_machine_labels_are_seen_and_are_no_truth(tmp_path, release):
    words = ["--machine-labels", *release.machine.values(), "--machine-threshold", "0.8"]
    manifest = prepare(release, tmp_path / "m", *words)
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
    hidden = prepare(release, tmp_path / "hidden", *words, "--observe", "keep=0.5").split("train")
    assert hidden.hides_labels
    for threshold in ("0", "1.5", "nan"):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            prepare(release, tmp_path / "x", *words[:-1], threshold)
    with pytest.raises(UserError, match="go together"):
        prepare(release, tmp_path / "x", "--machine-threshold", "0.5")
    with pytest.raises(UserError, match="has split val, --labels does not"):
        prepare(release, tmp_path / "x", *words, labels=[release.labels["train"]])


# --- image lists ----------------------------------------------------------------------------------------------------


def test_rotation(tmp_path, capsys):
    made = make_release(tmp_path, "v6", images={"train": 6}, pictures=1.0)
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
    split = prepare(made, tmp_path / "m", "--images-info", listed, "--orientation", "exif").split("train")
    # Counterclockwise by 90 degrees is EXIF's 8; where the list says nothing, the image's own data count.
    assert split.orientation.tolist() == [1, 8, 3, 6, 3, 1]
    assert split.width.tolist() == [48, 32, 48, 32, 48, 48] and split.height.tolist() == [32, 48, 32, 48, 32, 32]
    report = report_of(Manifest(tmp_path / "m"))["splits"]["train"]
    assert (report["turned_by_list"], report["turned_by_exif"]) == (3, 1)
    assert "the image lists know the rotation of 5 of 6 images" in capsys.readouterr().out
    plain = prepare(made, tmp_path / "plain", "--images-info", listed).split("train")
    assert plain.orientation.tolist() == [1, 8, 3, 6, 1, 1]


def test_official_image_lists(tmp_path, release):
    manifest = prepare(release, tmp_path / "m", "--images-info", *release.images_info.values())
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
        prepare(release, tmp_path / "m", "--images-info", listed)


# --- label files as they come ---------------------------------------------------------------------------------------


def test_forms_of_a_file(tmp_path):
    rows = [(1, A, 1), (1, B, 0), (2, C, 1), (0xFEDCBA9876543210, A, 0)]
    text = label_file(tmp_path / "plain.csv", rows).read_text()
    quoted = "\n".join(",".join(f'"{word}"' for word in line.split(",")) for line in text.splitlines())
    columns = [line.split(",") for line in text.splitlines()]
    forms = {
        "mark.csv": ("\ufeff" + text).encode(),
        "crlf.csv": text.replace("\n", "\r\n").encode(),
        "quoted.csv": quoted.encode(),
        "open end.csv": text.rstrip("\n").encode(),
        "empty lines.csv": text.replace("\n", "\n\n").encode(),
        "packed.csv.gz": gzip.compress(text.encode()),
        "order.csv": "".join(",".join((d, c, a, b)) + "\n" for a, b, c, d in columns).encode(),
        "decimals.csv": text.replace(",1\n", ",1.0\n").replace(",0\n", ",0.0\n").encode(),
        "capitals.csv": text.replace("fedcba", "FEDCBA").encode(),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        found = grouped([tmp_path / name])
        assert found.ids.tolist() == [1, 0xFEDCBA9876543210], name
        assert found.human.rows([0, 1]).tolist() == [[1, 0], [0, -1]], name


GOOD = f"00000000000000ff,verification,{A},1\n"
HEADER = "ImageID,Source,LabelName,Confidence\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be"),
        (GOOD, "line 1: the header must be ImageID,Source,LabelName,Confidence, not '00000000000000ff"),
        (HEADER[:-1] + ",XMin\n" + GOOD, "line 1: the header must be"),
        ("\xff\xfe", "line 1: not the header of a CSV in UTF-8"),
        (HEADER + GOOD + "00000000000000ff,verification,/m/0\n", "line 3: 3 fields instead of 4"),
        (HEADER + GOOD * 3 + "00000000000000f", "line 5: 1 fields instead of 4"),
        (HEADER + GOOD + "00000000000000ff,verification,/m/0b,", "line 3: the Confidence ''"),
        (
            HEADER + "\n\n" + GOOD + f"00000000000000ff,verification,{A},0.7\n",
            "line 5: the Confidence '0.7' is not 0 or 1",
        ),
        (HEADER + GOOD + f"00000000000000ff,verification,{C},yes\n", "line 3: the Confidence 'yes'"),
        (HEADER + GOOD + f"0ff,verification,{A},1\n", "line 3: the ImageID '0ff' is not 16 hexadecimal digits"),
        (HEADER + GOOD + f"0x000000000000ff,verification,{A},1\n", "line 3: the ImageID '0x000000000000ff'"),
        (HEADER + GOOD + f"00000000000000é,verification,{A},1\n", "line 3: the ImageID '00000000000000é'"),
        (HEADER + GOOD + f"00000000000000ff,machine,{A},1\n", "line 3: the Source is machine; .*--machine-labels"),
        (HEADER + GOOD + f"00000000000000ff,guess,{A},1\n", "line 3: the Source 'guess' is not crowdsource-ver"),
        (HEADER + GOOD + "00000000000000ff,verification,cat,1\n", "line 3: the LabelName 'cat' is not a class id"),
        (HEADER + GOOD + f'00000000000000ff,verification,"{A},1\n', "line 3: unexpected end of data"),
        (HEADER + '"a\nb",verification,/m/0a,1\n', r"line 2: the ImageID 'a\\nb'"),
    ],
)
def test_bad_label_files(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1") if text.startswith("\xff") else text.encode())
    with pytest.raises(UserError, match=rf"labels\.csv, {message}"):
        files.read_labels([path], [A, B])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        files.read_labels([tmp_path / "absent.csv"], [A])
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress((HEADER + GOOD * 50_000).encode())[:-200])
    with pytest.raises(UserError, match=r"broken\.csv\.gz"):
        files.read_labels([tmp_path / "broken.csv.gz"], [A])
    human = label_file(tmp_path / "human.csv", [(1, A, 1)])
    with pytest.raises(UserError, match=r"line 2: the Source is verification; .*--labels"):
        files.read_labels([human], [A], threshold=0.5)
    machine = label_file(tmp_path / "machine.csv", [(1, A, 1), (1, B, 1.5)], "machine")
    with pytest.raises(UserError, match=r"line 3: the Confidence '1.5' is not between 0 and 1"):
        files.read_labels([machine], [A], threshold=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("/m/0a\n\n/m/0a\n", "line 3: class /m/0a is already in line 1"),
        ("/m/0a\ncat\n", "line 2: 'cat' is not a class id"),
        ("/m/0a,Cat\n", "line 1: '/m/0a,Cat' is not a class id"),
    ],
)
def test_bad_class_lists(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"classes\.txt.* ?{message}"):
        files.read_classes(tmp_path / "classes.txt")


def test_class_lists_and_names(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfLabelName\r\n/m/0a\r\n\r\n/g/11b-c_\r\n")
    assert files.read_classes(tmp_path / "classes.txt") == ["/m/0a", "/g/11b-c_"]
    path = tmp_path / "names.csv"
    for text, message in (
        ("/m/0a,A\n/m/0b\n", "line 2: expected a class id and its name"),
        ("/m/0a,A\n/m/0a,B\n", "line 2: class /m/0a has the name 'A' above"),
        ('/m/0a,"A\n', "line 1: unexpected end"),
        ("cat,A\n", "line 1: expected a class id"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"names\.csv, {message}"):
            files.read_descriptions(path)


def test_which_split(tmp_path):
    def found(*words: str, splits: Sequence[str] | None = None) -> dict[str, list[str]]:
        out = openimages.split_files(words, splits, "--labels")
        return {name: [str(p) for p in paths] for name, paths in out.items()}

    assert found("oidv6-train-annotations-human-imagelabels.csv") == {
        "train": ["oidv6-train-annotations-human-imagelabels.csv"]
    }
    assert list(found("x/test/annotations-human.csv", "train/annotations-human.csv")) == ["train", "test"]
    assert found("oidv7-val-a.csv", "validation-b.csv") == {"val": ["oidv7-val-a.csv", "validation-b.csv"]}
    assert found("mine.csv") == {"train": ["mine.csv"]}
    assert found("validation=a=b.csv", "c.csv", splits=["train"]) == {"train": ["c.csv"], "val": ["a=b.csv"]}
    assert found("a", "b", "c", splits=["test", "val", "test"]) == {"val": ["b"], "test": ["a", "c"]}
    assert found("train.csv", "b.csv", splits=["validation"]) == {"val": ["train.csv", "b.csv"]}
    with pytest.raises(UserError, match=r"the name b\.csv does not tell the split; write train=b\.csv"):
        found("train.csv", "b.csv")
    with pytest.raises(UserError, match="--split names 2 splits for 3 files"):
        found("a", "b", "c", splits=["train", "val"])


def test_nothing_in_common(tmp_path, release):
    labels = label_file(tmp_path / "train.csv", [(1, "/m/0zzzzzz", 1)])
    with pytest.raises(UserError, match=r"no row of .* has a class of .*same release"):
        prepare(release, tmp_path / "m", labels=[labels])
    with pytest.raises(UserError, match="--verify header needs images"):
        prepare(release, tmp_path / "m", "--verify", "header")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_a_image_is_in_one_split(tmp_path, release):
    train = label_file(tmp_path / "train.csv", [(1, A, 1), (5, A, 1), (9, A, 0)])
    test = label_file(tmp_path / "test.csv", [(5, A, 0), (10, A, 1)])
    message = r"1 images have labels in split train and in split test \(the first is 0000000000000005\)"
    (tmp_path / "classes.txt").write_text(f"{A}\n")
    words = ["openimages", "--classes", tmp_path / "classes.txt", "--images", "none", "--out", tmp_path / "m"]
    with pytest.raises(UserError, match=message):
        prepare_command.main([str(w) for w in (*words, "--labels", train, test)])
    assert not (tmp_path / "m").exists()


# --- the parser against a plain one ---------------------------------------------------------------------------------

rows_of_a_file = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
        st.sampled_from([A, B, C]),
        st.sampled_from(["0", "1", "0.0", "1.0", "1e0"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(rows_of_a_file, st.integers(1, 400), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["negative", "last"]))
def test_parser_reads_what_was_written(tmp_path_factory, rows, block, end, policy):
    path = tmp_path_factory.mktemp("rows") / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(HEADER.strip().split(","))
        for image, name, value, crowd in rows:
            writer.writerow([f"{image:016x}", "crowdsource-verification" if crowd else "verification", name, value])
    with pytest.MonkeyPatch.context() as patch:
        # So small that lines are cut anywhere.
        patch.setattr(files, "_BLOCK", block)
        read = files.read_labels([path], [A, B])
    expected: dict[tuple[int, str], list[int]] = {}
    for image, name, value, _ in rows:
        if name != C:
            expected.setdefault((image, name), []).append(int(float(value)))
    assert (read.rows, read.other_classes) == (len(rows), sum(name == C for _, name, *_ in rows))
    found = openimages.group_rows(read, None, 2, policy)
    entries = zip(found.human.entry_rows(), found.human.classes, found.human.codes, strict=True)
    choose = min if policy == "negative" else (lambda codes: codes[-1])
    assert {(int(found.ids[r]), (A, B)[c]): code for r, c, code in entries} == {
        pair: choose(codes) for pair, codes in expected.items()
    }
    assert found.conflicts == sum(len(set(codes)) == 2 for codes in expected.values())
    assert found.repeated == sum(len(codes) - 1 for codes in expected.values())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 60), st.sampled_from(list(',x"\n9')), st.integers(50, 300))
def test_a_spoiled_line_is_named_or_harmless(tmp_path_factory, line, place, what, block):
    """A character changed anywhere: either the line is named, or no other line's labels change."""
    rows = [(i, A, i % 2) for i in range(31)]
    path = label_file(tmp_path_factory.mktemp("spoiled") / "labels.csv", rows)
    lines = path.read_text().splitlines(keepends=True)
    text = lines[line + 1]
    place %= len(text) - 1
    lines[line + 1] = text[:place] + what + text[place + 1 :]
    path.write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block)
        try:
            found = openimages.group_rows(files.read_labels([path], [A]), None, 1, "positive")
        except UserError as error:
            named = int(str(error).partition(", line ")[2].partition(":")[0])
            # A line cut in two is wrong in the second part where the first can stand; a quote runs on.
            assert named in (line + 2, line + 3) or (what == '"' and named >= line + 2)
            return
    codes = dict(zip(found.ids.tolist(), found.human.codes.tolist(), strict=True))
    assert sum(codes.get(i) == i % 2 for i in range(31)) >= 30


# --- scale ----------------------------------------------------------------------------------------------------------


def test_order_of_the_file_does_not_matter(tmp_path):
    sizes = {"images": {"train": 3000}, "rows": {"train": 20_000}, "classes": 200, "other_classes": 20}
    made = make_release(tmp_path / "a", "v7", order="shuffled", **sizes)
    lines = made.labels["train"].read_text().splitlines(keepends=True)
    ordered = tmp_path / "sorted.csv"
    ordered.write_text(lines[0] + "".join(sorted(lines[1:])))
    assert lines[1:] != sorted(lines[1:])
    class_ids = made.classes.read_text().split()
    results = []
    for path in (made.labels["train"], ordered):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_BLOCK", 100_000)
            patch.setattr(openimages, "_CHUNK", 1000)
            results.append(grouped([path], "last", classes=class_ids))
    first, second = results
    assert np.array_equal(first.ids, second.ids) and np.array_equal(first.human.indptr, second.human.indptr)
    assert np.array_equal(first.human.classes, second.human.classes)
    assert np.array_equal(first.human.codes, second.human.codes)
    expected = expected_labels(ordered, class_ids)
    assert len(first.human.codes) == len(expected) > 18_000


def test_many_classes_need_wider_numbers(tmp_path):
    classes = [f"/m/0{i:05d}" for i in range(40_000)]
    path = label_file(tmp_path / "labels.csv", [(1, classes[39_999], 1), (1, classes[16_384], 0)])
    found = grouped([path], classes=classes)
    assert found.human.classes.tolist() == [16_384, 39_999] and found.human.codes.tolist() == [0, 1]
    assert found.human.classes.dtype == np.int32


# --- the generator --------------------------------------------------------------------------------------------------


def test_generator():
    rng = np.random.default_rng(0)
    image, classes = draw_rows(rng, 50, 400, zipf_cdf(30))
    assert len(image) == 400 and len(set(zip(image.tolist(), classes.tolist(), strict=True))) == 400
    assert set(image.tolist()) == set(range(50)) and (np.diff(image) >= 0).all()
    counts = np.bincount(classes, minlength=30)
    assert counts[:5].min() > counts[-5:].max()
    ids = np.array([0, 7, 2**64 - 1], np.uint64)
    assert hex_ids(ids).to_pylist() == ["0" * 16, "0" * 15 + "7", "f" * 16]
    digits = np.frombuffer("".join(hex_ids(ids).to_pylist()).encode(), np.uint8).reshape(-1, 16)
    assert files.ids_from_hex(digits)[0].tolist() == ids.tolist()
    for rows in (49, 1501):
        with pytest.raises(ValueError, match="rows are too"):
            draw_rows(rng, 50, rows, zipf_cdf(30))


def test_generator_is_a_function_of_its_seed(tmp_path):
    texts = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = make_release(tmp_path / folder, "v7", images={"train": 20}, seed=seed)
        texts.append(made.labels["train"].read_text())
    assert texts[0] == texts[1] != texts[2]
