"""The benchmark of whole steps: it checks before it times, and what it writes is complete."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bench_step import PARTS
from tests.support.paths import ROOT
from tests.support.runs import Run


def test_both_ways_train_alike_and_are_timed(run_script: Run, tmp_path: Path) -> None:
    arguments = "--methods ll_r --backbone test_resnet --image-size 32 --count 8 --batch-size 4 --threads 1 --steps 1"
    out = tmp_path / "out.json"
    done = run_script(ROOT / "benchmarks" / "bench_step.py", *arguments.split(), "--rounds", 1, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["methods"]["ll_r"]
    assert figures["losses_apart"] < 1e-5 and set(figures) == {"losses_apart", "spml_fast", "plain"}
    for variant in ("spml_fast", "plain"):
        assert figures[variant]["images_per_second"] > 0 and set(figures[variant]["seconds"]) == set(PARTS)
    assert figures["spml_fast"]["ratio"] == 1
