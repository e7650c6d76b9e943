"""OpenImages V6 as CSL packs it."""

from __future__ import annotations

import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.prepare import prepare

HEADER = "filepath,split_name,label,label_neg,extra\n"
ROWS = (
    "train/a.jpg,train,\"['/m/0b', '/m/0a']\",\"['/oi/m_0c']\",x\n"
    "train/b.jpg,train,[],\"['/m/0a']\",\n"
    "test/c.jpg,test,['/m/0a'],,\n"
)


def test_table(tmp_path):
    images = make.write_files(
        tmp_path / "OIV6", {n: make.encoded() for n in ("train/a.jpg", "train/b.jpg", "test/c.jpg")}
    )
    (tmp_path / "data.csv").write_text(HEADER + ROWS)
    (tmp_path / "names.csv").write_text("/m/0a,Ant\n/m/0b,Bee\n")
    options = ("--table", tmp_path / "data.csv", "--images", images)
    manifest = prepare("csl", *options, "--out", tmp_path / "m", "--descriptions", tmp_path / "names.csv")
    assert manifest.name == "OIV6" and manifest.classes == ["Ant", "Bee", "/oi/m_0c"]
    train = manifest.split("train")
    assert train.known.rows([0, 1]).tolist() == [[1, 1, 0], [0, -1, -1]] and not train.hides_labels
    assert manifest.split("test").known.rows([0]).tolist() == [[1, -1, -1]] and "val" not in manifest.splits
    (tmp_path / "classes.txt").write_text("/oi/m_0c\n/m/0b\n/m/0a\n")
    ordered = prepare("csl", *options, "--out", tmp_path / "o", "--classes", tmp_path / "classes.txt")
    assert ordered.classes == ["/oi/m_0c", "/m/0b", "/m/0a"]
    assert ordered.split("train").known.rows([0, 1]).tolist() == [[0, 1, 1], [-1, -1, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath,label\na,b\n", "line 1: there is no column 'split_name'"),
        (HEADER + "a.jpg,train,oops,[],\n", "line 2: label is not a list such as"),
        (HEADER + "a.jpg,train,[1],[],\n", "line 2: label is not a list of texts"),
        (HEADER + "a.jpg,train,__import__('os').getcwd(),[],\n", "line 2: label is not a list"),
        (HEADER + "a.jpg,train," + "[" * 5000 + ",[],\n", "line 2: label is not a list"),
        (HEADER + "a.jpg,train,['x'],['x'],\n", "line 2: class 'x' is both positive and negative"),
        (HEADER + "a.jpg,extra,['x'],[],\n", "line 2: expected a path and train, val or test, not 'a.jpg' and 'extra'"),
        (HEADER + "a.jpg,train,['x'],[],\na.jpg,train,['x'],[],\n", r"line 3: image a\.jpg is listed twice"),
        (HEADER + "a.jpg,test,['x'],[],\n", "has no row of split train"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare("csl", "--table", tmp_path / "data.csv", "--images", tmp_path, "--out", tmp_path / "m")
