"""Preparing labels beside the mere reading of them: what is measured, of processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import label_import
from benchmarks.child_usage import usage_of
from benchmarks.make_openimages import make_release
from spml_fast.data.manifest import Manifest


def test_what_a_command_takes() -> None:
    kept = bytearray(200 << 20)
    code = "import time; x = bytearray(30 << 20)\nwhile time.process_time() < 0.1: pass\nprint('done')"
    taken = usage_of([sys.executable, "-c", code])
    assert taken.output == "done\n" and taken.seconds >= taken.cpu_seconds * 0.5 and 0.1 <= taken.cpu_seconds < 5
    # Its own memory, not that of the process that asked for it.
    assert 30 << 20 < taken.peak_bytes < 100 << 20 < len(kept)
    with pytest.raises(RuntimeError, match=r"(?s)exit\(3\).* failed:.*what went wrong"):
        usage_of([sys.executable, "-c", "print('what went wrong'); exit(3)"])


@pytest.mark.parametrize(("ratio", "peak", "words"), [(2.9, 2e9, ["reached", "reached"]), (3.1, 3e9, ["missed"] * 2)])
def test_goals_are_named(ratio: float, peak: float, words: list[str]) -> None:
    row = {"rows": 10, "file_bytes": 1e9, "rounds": 3, "read_s": 5.0, "read_cpu_s": 8.0, "prepare_s": 5 * ratio}
    lines = label_import.sentences(row | {"prepare_cpu_s": 20.0, "ratio": ratio, "cpu_ratio": 2.5, "peak_bytes": peak})
    assert [line.rsplit(": ", 1)[1] for line in lines[-2:]] == words and f"ratio {ratio:.2f}" in lines[-2]


@pytest.mark.slow
def test_reading_and_preparing_in_turn(tmp_path: Path) -> None:
    made = make_release(tmp_path / "release", "v7", images={"train": 50}, rows={"train": 300})
    release = label_import.find_release(tmp_path / "release")
    assert (release.labels, release.classes) == (made.labels["train"], made.classes)
    row = label_import.measure(release, tmp_path / "manifest", 1)
    assert row["rows"] == 300 and len(Manifest(tmp_path / "manifest").split("train")) > 40
    assert row["ratio"] == row["prepare_s"] / row["read_s"] and row["prepare_s"] > row["read_s"] > 0
    assert 50e6 < row["peak_bytes"] < 500e6
