"""The table of goals: rows of measured figures, and what is said where there are none."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary
from benchmarks.page_tables import PAGE, Marks
from benchmarks.summary import GOALS, MARKS, RESULTS, table


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table of a benchmark."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def test_the_page_has_the_table() -> None:
    """`python benchmarks/summary.py --write` brings it up to date."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == MARKS.with_table(page, table(RESULTS))


def test_nothing_is_measured(tmp_path: Path) -> None:
    lines = table(tmp_path).splitlines()
    assert len(lines) == 2 + len(GOALS) and all("not measured" in line for line in lines[2:])
    assert len({line.count("|") for line in lines}) == 1


def test_measured_figures(tmp_path: Path) -> None:
    facts = {"cpu": "A CPU", "cores": 2, "gpu": "", "date": "2026-01-02", "commit": "abc"}
    timm = [
        {"part": "step", "case": "test_resnet 64 px", "figure": "images/s", "spml_fast": 130.0, "timm": 100.0},
        {"part": "metric", "case": "40137 x 80", "figure": "memory bytes", "spml_fast": 9e6, "timm": 1e7},
        {"part": "metric", "case": "12543 x 960, 179988 pairs", "figure": "evaluation s", "spml_fast": 1, "timm": 200},
    ]
    for row, ratio, reached in zip(timm, (1.3, 1.11, 200.0), (True, False, True), strict=True):
        row.update(ratio=ratio, reached=reached, **facts)
    write(tmp_path / "vs_timm.csv", timm)
    times = {"rows": 58_783_034, "read_s": 5.0, "prepare_s": 10.0, "ratio": 2.0, "peak_bytes": 3e9}
    write(tmp_path / "label_import.csv", [times | facts])
    kernel = {"op": "cam_mask", "shape": "a", "mode": "fwd", "provider": "fused", "status": "ok", "p50": 1.0}
    kernel |= {"has_backward": "", "copy": 0.9, "gpu": "A card", "commit": "abc", "cam_mb": "", "graph_p50": ""}
    write(tmp_path / "a_card_kernels.csv", [kernel])
    step = {"op": "step", "shape": "an resnet50 224 px B 8 C 80", "mode": "files deepspeed", "precision": "bf16"}
    ways = [("spml_fast", 10.9, 1.0, {}), ("plain", 4.8, 0.44, {"precision": "fp32"}), ("bf16", 10.3, 0.95, {})]
    # Another processor's rows, and steps without files, are not compared with these.
    ways += [("bf16", 1.0, 0.1, {"cpu": "Another"}), ("plain", 1.0, 0.1, {"mode": "memory torch"})]
    rates = [{"provider": name, "images_per_second": rate, "ratio": ratio} for name, rate, ratio, _ in ways]
    write(tmp_path / "no_gpu_steps.csv", [step | facts | r | more for r, (*_, more) in zip(rates, ways, strict=True)])
    load = {"row": "weak+strong", "images": "640 x 480", "image_size": 448}
    rates = [
        {"loader": name, "images_per_second": rate, "speed_over_pil": rate / 100}
        for name, rate in (("spml_fast", 90.0), ("pil", 100.0), ("shards", 120.0))
    ]
    write(tmp_path / "input.csv", [load | rate | facts for rate in rates])
    lines = [line for line in table(tmp_path).splitlines()[2:] if "not measured" not in line]
    assert len(lines) == 8
    assert (
        lines.pop(1) == "| step of AN | 1.75 times | released code's loop | 10.9 against 4.8 images/s, resnet50 224 px "
        "B 8 C 80, bf16 / fp32 | 2.27 | yes | A CPU, 2 cores | 2026-01-02 |"
    )
    assert "10.9 against 10.3 images/s" in lines[1] and "| 1.05 | **no** |" in lines.pop(1)
    assert "90 against 100 images/s, 640 x 480 to 448 px | 0.90 | **no** |" in lines.pop(1)
    assert (
        lines[0]
        == "| cam_mask | 85% at least | a copy | cam_mask fwd: met: 90% of copy, goal 85% | 90% | yes | A card | abc |"
    )
    assert "130 against 100 (test_resnet 64 px) | 1.30 | yes | A CPU, 2 cores | 2026-01-02" in lines[1]
    assert "9 MB against 10 MB | 1.11 | **no**" in lines[2]
    # A tenth of the data set is not the goal's size.
    assert "10.0 s against 5.0 s, 58,783,034 rows | 2.00 | yes" in lines[3] and "3.00 GB" in lines[4]
    assert "**no**" in lines[4]


def test_the_table_is_replaced() -> None:
    marks = Marks("<!-- a: begin -->", "<!-- a: end -->")
    page = "a\n{0.begin}\n{1}{0.end}\nb\n"
    assert marks.with_table(page.format(marks, "old\n"), "new") == page.format(marks, "\nnew\n\n")
    with pytest.raises(ValueError, match="has no <!-- a: begin"):
        marks.with_table("a\n", "new")
    assert summary.amount("2500000", "memory bytes") == "2 MB" and summary.amount("0.12345", "s") == "0.1235"
