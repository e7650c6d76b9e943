"""The benchmark of whole steps: it checks before it times, and what it writes is complete."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bench_step import PARTS
from tests.support.paths import ROOT
from tests.support.runs import Run


def test_both_ways_train_alike_and_are_timed(run_script: Run, tmp_path: Path) -> None:
    words = "--methods ll_r --backbone test_resnet --image-size 32 --count 8 --batch-size 4 --threads 1 --steps 1"
    out = tmp_path / "out.json"
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *words.split(), "--rounds", 1, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["methods"]["ll_r"]
    assert found["losses_apart"] < 1e-5 and set(found) == {"losses_apart", "spml_fast", "plain"}
    for way in ("spml_fast", "plain"):
        assert found[way]["images_per_second"] > 0 and set(found[way]["seconds"]) == set(PARTS)
    assert found["spml_fast"]["ratio"] == 1
