"""Files appear whole or not at all."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from spml_fast.core import io


def test_atomic_write_makes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    io.write_text(path, "one")
    with io.atomic_write(path) as partial:
        assert partial == tmp_path / "a.txt.partial" and partial != path
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), io.atomic_write(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    """Cleaning up fails too: the folder is gone."""
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(ValueError, match="first"), io.atomic_write(folder / "a"):
        folder.rmdir()
        raise ValueError("first")
    with pytest.raises(FileNotFoundError), io.atomic_write(folder / "a") as partial:
        partial.write_text("no such folder")
    with pytest.raises(FileNotFoundError), io.atomic_write(tmp_path / "nothing written"):
        pass


def test_a_target_that_cannot_be_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        io.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").is_dir() and not (tmp_path / "a.partial").exists()


def test_durable_waits_for_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    with io.atomic_write(tmp_path / "a", durable=True) as partial:
        partial.write_bytes(b"1")
    with io.atomic_write(tmp_path / "a") as partial:
        partial.write_bytes(b"2")
    assert done == ["fsync", "replace", "replace"] and (tmp_path / "a").read_bytes() == b"2"


def test_json_has_null_for_what_is_not_finite(tmp_path):
    io.write_json(tmp_path / "a.json", {"x": [1.5, float("nan")], "y": {"z": float("inf")}, "ß": "ü"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"x": [1.5, None], "y": {"z": None}, "ß": "ü"} and "ß" in text


def test_csv_is_read_back(tmp_path):
    """Bytes of a file name that are no UTF-8, and characters that a plain writer would leave without quotes."""
    rows = [("a\udcff.jpg", "cat"), ("b\r.jpg", "a, b"), ("c\n.jpg", 'say "x"')]
    assert io.write_csv(tmp_path / "t.csv", ("path", "class"), iter(rows)) == 3
    with (tmp_path / "t.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [("path", "class"), *rows]
    assert b"a\xff.jpg,cat\n" in (tmp_path / "t.csv").read_bytes()
    io.write_csv(tmp_path / "t.csv", ("n",), [(1,)], line_end="\r\n")
    assert (tmp_path / "t.csv").read_bytes() == b"n\r\n1\r\n"


def test_csv_rows_that_fail_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        io.write_csv(tmp_path / "t.csv", ("n",), ((1 // n,) for n in (1, 0)))
    assert not list(tmp_path.iterdir())


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        io.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_recorded_file_has_its_checksum_and_has_reached_the_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), real(descriptor)))
    file = io.RecordedFile(tmp_path / "a")
    assert [file.write(part) for part in (b"123", bytearray(b"456"), memoryview(b"789"))] == [3, 3, 3]
    record = file.record()
    # The check value of CRC-32.
    assert record == io.FileRecord(9, "cbf43926") == io.file_record(tmp_path / "a") and synced == [9]
    assert (tmp_path / "a").read_bytes() == b"123456789"
    assert io.copy_file(tmp_path / "a", tmp_path / "b") == record == io.file_record(tmp_path / "b")


def test_a_recorded_file_raises_at_its_end_alone(tmp_path):
    """The writer in C++ that calls `write` aborts the process when that raises."""
    for path, number in ((Path("/dev/full"), errno.ENOSPC), (tmp_path / "none" / "a", errno.ENOENT)):
        file = io.RecordedFile(path)
        assert file.write(bytes(10**6)) == 10**6 and file.write(b"1") == 1
        with pytest.raises(io.FileNotWritten) as error:
            file.record()
        assert error.value.errno == number and error.value.size == 10**6 + 1 and str(path) in str(error.value)


def test_durable_text_syncs_the_folder_after_the_name_is_given(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    io.write_json(tmp_path / "a.json", {"x": 1}, durable=True)
    assert done == ["fsync", "replace", "fsync"]
