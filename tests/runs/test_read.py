"""Reading metrics.jsonl and lists of classes; whole runs are read in tests/analysis/test_report.py."""

from __future__ import annotations

import json

import pytest

from spml_fast.core.errors import UserError
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.read import parse_metrics, read_classes, read_epochs, read_results


def line(kind: str, **values: object) -> str:
    return json.dumps({"kind": kind, "phase": "finetune", **values})


DAMAGED = (
    '{"kind": "ep',
    "[1]",
    "3",
    "null",
    "{}",
    '{"kind": "epoch"}',
    '{"kind": "update", "epoch": 1}',
    '{"kind": "epoch", "epoch": [1]}',
    '{"kind": "epoch", "epoch": 1, "phase": [1]}',
)


def test_damaged_lines_are_counted_and_the_others_kept(tmp_path):
    good = [line("update", epoch=1, update=5, loss=1.0), line("epoch", epoch=1, loss=0.5), line("final", split="test")]
    for damaged in DAMAGED:
        log = parse_metrics("\n".join([good[0], damaged, *good[1:]]) + "\n")
        assert log.damaged == [2] and [entry["kind"] for entry in log.lines] == ["update", "epoch", "final"], damaged
        RunLayout(tmp_path).metrics.write_text("\n".join([good[0], damaged, *good[1:]]))
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged; delete that line"):
            read_epochs(tmp_path)


def test_an_epoch_that_was_repeated_counts_once(tmp_path):
    lines = [
        line("epoch", epoch=1, loss=3.0),
        line("epoch", epoch=2, loss=2.0),
        line("update", epoch=3, update=10, loss=1.9),
        line("update", epoch=3, update=20, loss=None),
        line("update", epoch=3, update=20, loss=1.7),
        line("epoch", epoch=2, loss=1.0),
        json.dumps({"kind": "epoch", "phase": "linear", "epoch": 1, "loss": 9.0}),
    ]
    log = parse_metrics("\n".join(lines))
    assert [(e["phase"], e["epoch"], e["loss"]) for e in log.epochs] == [
        ("finetune", 1, 3.0),
        ("finetune", 2, 1.0),
        ("linear", 1, 9.0),
    ]
    assert log.losses == [3.0, 2.0, 1.9, None, 1.7, 1.0, 9.0] and log.restarts == 2 and not log.damaged
    RunLayout(tmp_path).metrics.write_text("\n".join(lines))
    assert read_epochs(tmp_path) == log.epochs


def test_classes(tmp_path):
    path = tmp_path / "list"
    path.write_bytes("cat\n\u00e4 b \ndog\n".encode())
    assert read_classes(path) == ["cat", "ä b ", "dog"]
    path.write_bytes(b"c\xff\n")
    assert read_classes(path, "replace") == ["c\ufffd"]
    with pytest.raises(UnicodeDecodeError):
        read_classes(path)


def test_results(tmp_path):
    RunLayout(tmp_path).results.write_text('{"alpha": {"1": {"map": 50.0}}}')
    assert read_results(tmp_path)["alpha"]["1"]["map"] == 50.0
