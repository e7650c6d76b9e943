"""Tables of images: what they mean, how they may be written, and what can be wrong with them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.build import summary
from spml_fast.prepare.datasets import csv_table
from spml_fast.prepare.observed_labels import published_split
from tests.support import data as make
from tests.support.prepare import make_table, prepare, report_of


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
        UserError, match=r"table\.csv, line 4: class 'dog' of image a\.jpg is positive, and negative in line 2"
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
        ("path,positives,positives\na.jpg,cat,dog\n", [], "line 1: a column is listed twice"),
        ("", [], "table.csv is empty; its first line must name the columns"),
        ("\npath,positives\n", [], "line 1: there is no column 'path', only an empty line"),
        ("path;positives\na.jpg;cat\n", [], "line 1: fields are separated by semicolons; save the table with commas"),
        ("path\tpositives\na.jpg\tcat\n", [], "line 1: fields are separated by tabs; save the table with commas"),
        ("path,positives\n", [], "has no rows"),
        ("path,positives\na.jpg,cat\nb.jpg,cat,dog\n", [], "line 3: 3 fields, but the header has 2; a field with"),
        ("path,positives\n,cat\n", [], "line 2: the path is empty"),
        ('path,positives\na.jpg,"cat\n', [], "line 2: unexpected end of data"),
        ("path,positives\na.jpg,\nb.jpg,\n", [], "no row has a positive class"),
        ("path,positives,split\na.jpg,cat,test\n", [], r"no row has split train \(only test\)"),
        ("path,positives,split\na.jpg,cat,../x\n", [], "line 2: '../x' cannot be the name of a split"),
        ("path,positives,split\na.jpg,cat,train\nb.jpg,cat,\n", [], "line 3: '' cannot be the name of a split"),
        (
            "path,positives,split\na.jpg,cat,train\na.jpg,cat,test\n",
            [],
            "line 3: image a.jpg is in split 'test' and in line 2 in 'train'",
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
    arguments = [o.format(tmp_path) for o in options]
    with pytest.raises(UserError, match=message):
        prepare("csv", "--table", tmp_path / "table.csv", "--images", images, "--out", tmp_path / "m", *arguments)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


JSON_ROWS = [
    {"path": "a.jpg", "positives": ["cat", "dog"], "negatives": ["ant"], "split": "train"},
    {"path": "b.jpg", "positives": "dog", "split": "train"},
    {"path": "c.jpg", "negatives": None, "positives": ["cat"], "split": "test"},
]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """The same rows as JSON lines, Parquet or CSV, by the name's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\r\n" for row in rows) + "\n")
    elif path.suffix == ".parquet":
        listed = [{**row, "positives": as_list(row["positives"])} for row in rows]
        pq.write_table(pa.Table.from_pylist(listed), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "positives", "negatives", "split"])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: ";".join(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def as_list(value: object) -> object:
    return value.split(";") if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "labels.parquet"])
def test_other_kinds_of_tables(tmp_path, name):
    images = make.write_files(tmp_path / "birds", {n: make.encoded() for n in ("a.jpg", "b.jpg", "c.jpg")})
    table = write_rows(tmp_path / name, JSON_ROWS)
    manifest = prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "m")
    # Called by the folder of the images: every table is called labels.
    assert manifest.name == "birds" and manifest.classes == ["ant", "cat", "dog"]
    assert manifest.split("train").known.rows([0, 1]).tolist() == [[0, 1, 1], [-1, -1, 1]]
    assert manifest.split("test").known.rows([0]).tolist() == [[-1, 1, -1]]
    images = images.rename(tmp_path / "Images")
    again = prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "again")
    assert again.name == tmp_path.name
    named = prepare("csv", "--table", table, "--images", images, "--out", tmp_path / "n", "--name", "My birds")
    assert named.name == "My birds"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("t.jsonl", b'{"path": "a.jpg", "positives": ["cat"]}\n{"path": \n', "line 2: not an object of JSON"),
        ("t.jsonl", b'["a.jpg"]\n', "line 1: not an object of JSON such as"),
        ("t.jsonl", b"[" * 100_000, "line 1: not an object of JSON"),
        ("t.jsonl", b'{"path": "a.jpg", "positives": [1]}\n', "line 1: 'positives' must be a text or a list of texts"),
        ("t.jsonl", b'{"path": "a.jpg", "positives": ["a;b"]}\n', "line 1: class 'a;b' has a semicolon"),
        ("t.jsonl", b'{"path": "a.jpg", "labels": ["cat"]}\n', "line 1: column 'labels' is not one of"),
        ("t.jsonl", b'{"path": "a.jpg"}\n', "there is no column 'positives', only path"),
        ("t.jsonl", b'{"positives": ["cat"]}\n', "line 1: the path is empty"),
        ("t.jsonl", b"", "has no rows"),
        ("t.parquet", b"PAR1 or not", "is not a Parquet file"),
        ("t.parquet", [{"path": "a.jpg", "positives": 3}], "row 1: 'positives' must be a text or a list of texts"),
        ("t.parquet", [{"file": "a.jpg", "positives": "cat"}], "there is no column 'path', only file, positives"),
    ],
)
def test_bad_tables_of_other_kinds(tmp_path, name, rows, message):
    path = tmp_path / name
    path.write_bytes(rows) if isinstance(rows, bytes) else pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=message) as raised:
        prepare("csv", "--table", path, "--images", tmp_path, "--out", tmp_path / "m")
    assert str(path) in str(raised.value)


def test_ten_thousand_classes_in_a_field(tmp_path):
    names = [f"class number {i:05d}" for i in range(10_000)]
    manifest = prepare_table(tmp_path, f"path,positives,split\na.jpg,{';'.join(names)},train\nb.jpg,cat,train\n")
    assert manifest.num_classes == 10_001 and manifest.split("train").known.class_counts(1).tolist() == [1] * 10_001


def test_the_summary_names_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ncow\ndog\n")
    rows = "path,positives,split\na.jpg,cat;dog,train\nb.jpg,dog,train\n"
    manifest = prepare_table(tmp_path, rows, "--classes", tmp_path / "classes.txt")
    lines = summary(manifest).splitlines()
    assert "train: no positive image for 1 of 3 classes: cow" in lines
    assert "positive images by class (train): dog 2, cat 1, cow 0" in lines
    (tmp_path / "many").mkdir()
    many = prepare_table(tmp_path / "many", "path,positives,split\na.jpg," + ";".join(map(str, range(50))) + ",train\n")
    assert any(
        "0 1, 1 1, 10 1, 11 1, 12 1 ... 5 1" in line and line.endswith("; median 1")
        for line in summary(many).splitlines()
    )


def test_class_names_with_commas(tmp_path):
    """Commas between classes make one class of them, and the summary says so; a name may have one all the same."""
    text = 'path,positives,split\na.jpg,"cat,dog",train\nb.jpg,cow,train\n'
    lines = summary(prepare_table(tmp_path, text)).splitlines()
    assert "'cat,dog' is one class: classes are separated by semicolons, not by commas" in lines
    assert "positive images by class (train): 'cat,dog' 1, cow 1" in lines
    (tmp_path / "meant").mkdir()
    meant = 'path,positives,split\na.jpg,"dog, large;cow",train\n'
    lines = summary(prepare_table(tmp_path / "meant", meant)).splitlines()
    assert not any("is one class" in line for line in lines) and lines[0] == "meant: 2 classes"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\x1b[31mb"])
def test_bad_names(tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        prepare_table(tmp_path, "path,positives\na.jpg,cat\nb.jpg,cat\n", "--name", name)
    assert "may be part of a file name" in capsys.readouterr().err


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
# Filtered before they are stripped: old releases of hypothesis forget a `filter(bool)` behind that `map`.
image_names = (
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6)
    .filter(lambda name: name.strip() != "")
    .map(str.strip)
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
