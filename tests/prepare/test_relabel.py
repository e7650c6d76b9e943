"""`spml-fast relabel`: decisions about suggestions become a new version of a Manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spml_fast.cli import relabel as command
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.core.outputs import SUGGESTION_COLUMNS
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter

HEADER = (*SUGGESTION_COLUMNS, "decision", "who", "when")
PATHS = ["a.jpg", "b.jpg", "=c.jpg", "sub/d.jpg"]
# Rows are images, columns the classes ant, bee, =cat.
OBSERVED = np.array([[1, -1, -1], [-1, 0, -1], [-1, -1, 1], [-1, -1, -1]], np.int8)


@pytest.fixture
def mine(tmp_path: Path) -> Manifest:
    """A partly labelled data set with boxes and a second split."""
    writer = ManifestWriter(tmp_path / "mine", "mine", ["ant", "bee", "=cat"], tmp_path / "images")
    for name, paths in (("train", PATHS), ("val", ["v.jpg"])):
        known = SparseLabels.from_dense(OBSERVED[: len(paths)])
        boxes = ([0] * (len(paths)) + [1], [[0, 0, 0, 1, 1]])
        side = range(1, len(paths) + 1)
        writer.add_split(name, known=known, width=side, height=side, paths=paths, boxes=boxes)
    return writer.finish({"name": "mine", "splits": {"train": {"samples": 4}}, "notes": ["ü"]})


def table(path: Path, rows: list[str], header: tuple[str, ...] = HEADER) -> Path:
    """A table of decisions from rows as text."""
    path.write_text("\n".join([",".join(header), *rows]) + "\n", encoding="utf-8")
    return path


def call(*words: object) -> None:
    command.main([str(word) for word in words])


def test_a_new_version(mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Accepted, rejected, skipped, empty and confirmed rows; names as `suggest` writes them, with what keeps a
    spreadsheet from taking them for formulas."""
    before = {p.relative_to(mine.folder): p.read_bytes() for p in mine.folder.rglob("*") if p.is_file()}
    decisions = table(
        tmp_path / "decisions.csv",
        [
            "a.jpg,bee,unknown,0.9,positive,train,runs/a,accept,eva,2026-01-03",
            "a.jpg,'=cat,unknown,0.9,positive,train,runs/a,reject,eva,2026-01-01",
            "a.jpg,ant,positive,0.1,negative,train,runs/a,accept,bob,2026-01-02",
            "b.jpg,bee,negative,0.8,positive,train,runs/b,accept,,",
            "./=c.jpg,'=cat,positive,0.2,negative,train,runs/b,reject,,",
            "sub/d.jpg,ant,unknown,0.9,positive,,runs/b,SKIP,,",
            "sub/d.jpg,bee,unknown,0.7,positive,,runs/b,,,",
            "sub/d.jpg,bee,unknown,0.7,positive,,runs/b,accept,,",
            "v.jpg,bee,unknown,0.7,positive,val,runs/b,accept,,",
        ],
    )
    call("--manifest", mine.folder, "--decisions", decisions, "--out", tmp_path / "second")
    made = Manifest(tmp_path / "second")
    expected = np.array([[0, 1, 0], [-1, 1, -1], [-1, -1, 1], [-1, 1, -1]], np.int8)
    train = made.split("train")
    assert np.array_equal(train.known.rows(range(4)), expected) and not (train.folder / "observed").exists()
    assert made.split("val").known.rows([0]).tolist() == [[1, 1, -1]]
    # The rest is as it was, and images are where they were.
    old = mine.split("train")
    assert [train.path(i) for i in range(4)] == [old.path(i) for i in range(4)] and made.classes == mine.classes
    assert train.width.tolist() == old.width.tolist() and train.boxes is not None and len(train.boxes[1]) == 1
    assert before == {p.relative_to(mine.folder): p.read_bytes() for p in mine.folder.rglob("*") if p.is_file()}
    report = json.loads((made.folder / "report.json").read_text(encoding="utf-8"))
    (record,) = report["relabelled"]
    assert record["from"] == str(mine.folder) and record["decisions_crc32"] == file_record(decisions).crc32
    assert record["runs"] == {"runs/a": 3, "runs/b": 6} and record["who"] == {"eva": 2, "bob": 1}
    assert record["when"] == ["2026-01-01", "2026-01-03"] and record["date"].startswith("20")
    assert record["rows_by_decision"] == {"accept": 5, "reject": 2, "skip": 2}
    kinds = {"unknown -> positive": 2, "unknown -> negative": 1, "positive -> negative": 1, "negative -> positive": 1}
    assert record["changed"] == {"train": kinds, "val": {"unknown -> positive": 1}}
    assert record["changed_by_class"]["train"]["ant"] == {"positive -> negative": 1}
    assert report["splits"]["train"]["known"] == {"positive": 4, "negative": 2, "unknown": 6} and report["notes"] == [
        "ü"
    ]
    shown = capsys.readouterr().out
    assert "mine: 9 rows: 5 accept, 2 reject, 2 skip" in shown
    assert "train: 5 labels changed, 1 confirmed as they were" in shown and "  2  unknown -> positive" in shown
    assert "  bee: 1 negative -> positive, 2 unknown -> positive" in shown and "(version 2; " in shown
    # Once more: nothing changes, and the next version knows both.
    call("--manifest", made.folder, "--decisions", decisions, "--out", tmp_path / "third")
    third = Manifest(tmp_path / "third")
    assert np.array_equal(third.split("train").known.rows(range(4)), expected) and third.meta["version"] == "3"
    assert len(json.loads((third.folder / "report.json").read_text(encoding="utf-8"))["relabelled"]) == 2
    assert "no label changed" in capsys.readouterr().out


def test_names_of_files_are_bytes(tmp_path: Path) -> None:
    """A file name that is no UTF-8, as `suggest` writes it; any other text must be."""
    writer = ManifestWriter(tmp_path / "mine", "mine", ["ant"], tmp_path / "images")
    known = SparseLabels.from_dense(np.array([[-1], [-1]], np.int8))
    writer.add_split("train", known=known, width=[1, 1], height=[1, 1], paths=["\udcff.jpg", "\udcfe.jpg"])
    writer.finish({})
    decisions = tmp_path / "decisions.csv"
    row = b"%s,%s,unknown,0.9,positive,train,r,accept,%s,\n"
    header = (",".join(HEADER) + "\n").encode()
    decisions.write_bytes(header + row % (b"\xff.jpg", b"ant", b"eva"))
    call("--manifest", tmp_path / "mine", "--decisions", decisions, "--out", tmp_path / "new")
    assert Manifest(tmp_path / "new").split("train").known.rows([0, 1]).tolist() == [[1], [-1]]
    for cells, column in (((b"\xff.jpg", b"\xe4nt", b""), "class"), ((b"\xff.jpg", b"ant", b"\xfc"), "who")):
        decisions.write_bytes(header + row % cells)
        with pytest.raises(UserError, match=f"line 2: {column} is not UTF-8 text; save the table as UTF-8"):
            call("--manifest", tmp_path / "mine", "--decisions", decisions, "--out", tmp_path / "other")
    decisions.write_bytes(header.replace(b"when", b"wh\xe4n") + row % (b"\xff.jpg", b"ant", b"eva"))
    call("--manifest", tmp_path / "mine", "--decisions", decisions, "--out", tmp_path / "another")


def test_by_probability(mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`--accept-above` takes what nobody has decided; the sureness is that of the suggestion."""
    rows = ["a.jpg,bee,unknown,0.95,positive", "a.jpg,ant,positive,0.1,negative", "b.jpg,ant,unknown,0.85,positive"]
    found = table(tmp_path / "found.csv", rows, SUGGESTION_COLUMNS[:5])
    call("--manifest", mine.folder, "--decisions", found, "--out", tmp_path / "new", "--accept-above", 0.9)
    assert Manifest(tmp_path / "new").split("train").known.rows([0, 1]).tolist() == [[0, 1, -1], [-1, 0, -1]]
    assert "3 rows: 2 accept by probability, 1 skip" in capsys.readouterr().out


def test_the_truth_of_a_simulation_is_kept(small_digits: Path, tmp_path: Path) -> None:
    """Decisions become observed labels; what was hidden stays hidden and known. Images lie inside the old Manifest."""
    old = Manifest(small_digits).split("train")
    row = 3
    wrong = int(np.flatnonzero(old.known.rows([row])[0] == 0)[0])
    decision = {"path": old.relative_path(row), "class": str(wrong), "known": "unknown", "suggestion": "positive"}
    decisions = tmp_path / "decisions.jsonl"
    decisions.write_text(json.dumps(decision | {"decision": "accept"}) + "\n", encoding="utf-8")
    call("--manifest", small_digits, "--decisions", decisions, "--out", tmp_path / "new")
    new = Manifest(tmp_path / "new").split("train")
    assert new.observed.codes_at([row], [wrong]).tolist() == [1] and old.observed.codes_at([row], [wrong]).tolist() == [
        -1
    ]
    assert np.array_equal(new.known.rows(range(len(new))), old.known.rows(range(len(old)))) and new.hides_labels
    assert new.read(row) == old.read(row) and not (tmp_path / "new" / "images").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x.jpg,bee,unknown,0.9,positive,train,r,accept,,", r"line 2: split train of .* has no image 'x\.jpg'$"),
        (
            "v.jpg,bee,unknown,0.9,positive,train,r,accept,,",
            r"has no image 'v\.jpg'; it is in split val",
        ),
        (
            "a.jpg,beee,unknown,0.9,positive,train,r,accept,,",
            "line 2: the data set has no class 'beee'; did",
        ),
        ("a.jpg,bee,unknown,0.9,positive,tain,r,accept,,", r"has no split 'tain'; it has train, val"),
        (
            "a.jpg,bee,unknown,0.9,positive,train,r,yes,,",
            "decision is 'yes'; it must be accept, reject",
        ),
        ("a.jpg,bee,unknown,0.9,maybe,train,r,accept,,", "suggestion is 'maybe'; it must be positive, negative or unk"),
        ("a.jpg,bee,unknown,0.9,unknown,train,r,accept,,", "suggestion is unknown; it must be positive or negative"),
        ("a.jpg,ant,unknown,0.1,negative,train,r,accept,,", "a.jpg, ant is positive in .* and was unknown when it was"),
        (
            "a.jpg,bee,unknown,0.9,positive,train,r,reject,,\na.jpg,bee,unknown,0.9,positive,train,r,accept,,",
            r"line 3: a\.jpg, bee is decided otherwise in line 2; keep one of the two",
        ),
        (
            "./=c.jpg,bee,unknown,0.9,positive,train,r,reject,,\n=c.jpg,bee,unknown,0.9,positive,train,r,accept,,",
            r"line 3: =c\.jpg, bee is decided otherwise in line 2",
        ),
        ("a.jpg,bee,unknown,0.9,positive,train,r,,,", r"decides nothing \(1 rows\); fill in its column decision"),
        ("a.jpg,bee", "line 2: 2 fields, but the header has 10"),
    ],
)
def test_what_users_get_wrong(mine: Manifest, tmp_path: Path, row: str, message: str) -> None:
    decisions = table(tmp_path / "decisions.csv", [row])
    with pytest.raises(UserError, match=message):
        call("--manifest", mine.folder, "--decisions", decisions, "--out", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decisions.csv", "mine"], "nothing is left behind"


def test_tables_and_folders_that_cannot_be_used(mine: Manifest, tmp_path: Path) -> None:
    plain = table(tmp_path / "plain.csv", ["a.jpg,bee,unknown,x,positive,train,r"], SUGGESTION_COLUMNS)
    given = ("--manifest", mine.folder, "--decisions", plain)
    with pytest.raises(UserError, match=r"no column 'decision' \(accept, reject or skip\), or give --accept-above P"):
        call(*given, "--out", tmp_path / "new")
    with pytest.raises(UserError, match="line 2: probability is 'x'; it must be 0 to 1"):
        call(*given, "--out", tmp_path / "new", "--accept-above", 0.9)
    with pytest.raises(UserError, match=r"--accept-above is 0\.1; it must lie between 0\.5 and 1"):
        call(*given, "--out", tmp_path / "new", "--accept-above", 0.1)
    good = table(tmp_path / "good.csv", ["a.jpg,bee,unknown,1,positive,train,r,accept,,"])
    for out in (mine.folder, tmp_path):
        with pytest.raises(UserError, match="choose another --out"):
            call("--manifest", mine.folder, "--decisions", good, "--out", out)
    assert mine.split("train").known.codes_at([0], [1]).tolist() == [-1]
    # A data set of labels alone has no image folder, and gets none.
    bare = ManifestWriter(tmp_path / "bare", "bare", ["ant"])
    bare.add_split("train", known=SparseLabels.from_dense(np.array([[1]], np.int8)), width=[0], height=[0], paths=["a"])
    bare.finish({})
    row = table(tmp_path / "row.csv", ["a,ant,positive,0,negative,train,r,accept,,"])
    call("--manifest", tmp_path / "bare", "--decisions", row, "--out", tmp_path / "bare-2")
    assert Manifest(tmp_path / "bare-2").meta["image_root"] == "."


def test_a_decision_that_agrees_with_a_machine_becomes_known(tmp_path: Path) -> None:
    """Observed labels may be unknown to evaluation; what a person confirms is not."""
    writer = ManifestWriter(tmp_path / "machine", "machine", ["ant", "bee"], tmp_path / "images")
    known, observed = (SparseLabels.from_dense(np.array(rows, np.int8)) for rows in ([[-1, 1]], [[1, 1]]))
    writer.add_split(
        "train", known=known, observed=observed, width=[1], height=[1], paths=["a.jpg"], hides_labels=False
    )
    manifest = writer.finish({"name": "machine", "splits": {"train": {"samples": 1}}})
    assert not manifest.split("train").hides_labels
    decisions = table(tmp_path / "d.csv", ["a.jpg,ant,positive,0.9,positive,train,r,accept,,"])
    call("--manifest", manifest.folder, "--decisions", decisions, "--out", tmp_path / "new")
    new = Manifest(tmp_path / "new").split("train")
    assert new.known.rows([0]).tolist() == new.observed.rows([0]).tolist() == [[1, 1]]
