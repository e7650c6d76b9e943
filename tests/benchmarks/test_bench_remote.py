"""The benchmark of remote data: every row is measured, and the plan is the arithmetic that it names."""

from __future__ import annotations

import csv
import http.client
import math
from pathlib import Path

import pytest

from benchmarks.bench_remote import COLUMNS, Plan
from benchmarks.range_server import RangeServer
from tests.support.paths import ROOT
from tests.support.remote import need_http
from tests.support.runs import Run


def test_every_row_is_measured(run_script: Run, tmp_path: Path) -> None:
    need_http()
    words = ["--count", "24", "--image-size", "32", "--batch-size", "4", "--block", "4", "--repeats", "1"]
    out = tmp_path / "out.csv"
    done = run_script(ROOT / "benchmarks" / "bench_remote.py", *words, "--latencies", "5", "20", "--csv", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not answer" not in done.stderr, "the servers are ended while batches are read ahead"
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(float(r["latency_ms"]), r["row"]) for r in rows] == [
        *[(0.0, "disk")],
        *[(latency, row) for latency in (5.0, 20.0) for row in ("first", "second", "uncached")],
    ]
    assert all(float(r["images_per_s"]) > 0 and r["cpu"] and r["torch"] for r in rows)
    asked = {(float(r["latency_ms"]), r["row"]): float(r["requests"]) for r in rows}
    for latency in (5.0, 20.0):
        assert asked[latency, "first"] >= 6 and asked[latency, "second"] == 0 and asked[latency, "uncached"] >= 4
    assert set(COLUMNS) < rows[0].keys()


def test_the_plan() -> None:
    figures = Plan(images=6.4e6, ranks=10, rate=100, image_bytes=1e5, per_machine=2, window=6400, threads=4).figures()
    assert figures["request_MB"] == 6.4 and figures["requests_per_epoch"] == 102_500
    # 1,000 images a second are 1/6,400 of an epoch.
    assert figures["requests_per_second"] == pytest.approx(102_500 / 6400)
    assert figures["GB_per_second"] == pytest.approx(0.1)
    assert figures["GB_per_second_and_machine"] == pytest.approx(0.02)
    seconds = 0.05 + 6.4e6 / 60e6
    assert math.isclose(figures["images_per_second_of_a_rank"], 4 * 64 / seconds)
    assert math.isclose(figures["threads_needed"], 100 / 64 * seconds)
    assert figures["GB_of_two_windows_per_rank"] == pytest.approx(2 * 640 * 1e5 / 1e9)


def test_the_server_serves_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "served" / "link").symlink_to(tmp_path / "secret")
    with RangeServer(tmp_path / "served") as server:

        def get(path: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
            # As it is: other clients tidy a path first.
            connection.request("GET", path)
            answer = connection.getresponse()
            found = answer.status, answer.read()
            connection.close()
            return found

        assert get("/a") == (200, b"inside")
        for path in ("/../secret", "/%2e%2e/secret", "/link", "/a/../../secret"):
            assert get(path) == (404, b"")
