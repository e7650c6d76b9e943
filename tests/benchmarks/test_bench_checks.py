"""The benchmark of the checks: every one of them is measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.runs import Run

PARTS = ["gradient norm", "mark", "reading", "agreement", "heartbeat", "header", "regular"]


def test_every_check_has_its_figure(run_script: Run, tmp_path: Path) -> None:
    words = ["--backbone", "test_resnet", "--image-size", "32", "--count", "4", "--batch-size", "4", "--rounds", "2"]
    out = tmp_path / "out.json"
    done = run_script(ROOT / "benchmarks" / "bench_checks.py", *words, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found["parts_ms"]) == PARTS and found["update_ms"] > 0 and found["with_over_without"] > 0
    assert all(found["parts_ms"][name] > 0 for name in PARTS if name != "header"), found
    assert f"{'all':14s}" in done.stdout
