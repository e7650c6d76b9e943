"""The whole way of an OpenImages run at a small size: official files, shards, two ranks, killed, resumed, evaluated."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT
from tests.support.runs import free_port


def load_benchmark() -> ModuleType:
    """benchmarks/openimages_run.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("openimages_run", ROOT / "benchmarks" / "openimages_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.multirank
def test_made_prepared_sharded_killed_resumed_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    benchmark = load_benchmark()
    arguments = ["--out", tmp_path, "--images", 160, 30, 40, "--classes", 40, "--pictures", 1, "--batch-size", 16]
    arguments += ["--save-updates", 2, "--log-every", 4, "--port", free_port()]
    stages = {s.name: s for s in benchmark.simulate(benchmark.parse([str(w) for w in arguments]))}
    assert list(stages) == [
        "make the release",
        "prepare",
        "pack into shards",
        "train until killed",
        "resume to the end",
        "evaluate",
    ]
    assert all(s.seconds > 0 and s.disk_bytes > 0 for s in stages.values())
    assert stages["train until killed"].peak_gib > 0.3
    run = tmp_path / "run"
    epochs = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert {line["epoch"] for line in epochs if line["kind"] == "epoch"} == {1, 2}
    results = json.loads((tmp_path / "test.json").read_text())["alpha"]["1"]
    assert len(results["groups"]) == 5 and sum(g["num_classes"] for g in results["groups"]) == 40
    assert 0 <= results["map"] <= 100
