"""The notebooks of examples/: they run from the top, and what is stored in them is small and tells of no machine."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import notebooks
from tests.support.docs import shell_commands
from tests.support.paths import ROOT

QUICKSTART = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored(path: Path) -> None:
    notebook = notebooks.read(path)
    assert path.stat().st_size < notebooks.LARGEST
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    text = json.dumps(
        [{**cell, "outputs": [without_images(o) for o in cell.get("outputs", [])]} for cell in notebook.cells]
    )
    assert not notebooks.LOCAL_PATH.search(text)
    assert notebook.metadata == notebooks.without_traces(notebooks.read(path)).metadata
    assert all(cell.metadata == {} for cell in notebook.cells)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert output.output_type != "error"
        if "image/png" in output.get("data", {}):
            assert max(size_of(output.data["image/png"])) <= 1000


def without_images(output: Any) -> Any:
    return {**output, "data": {kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"}}


def size_of(image: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(image))).size


def test_the_rule_about_paths_notices() -> None:
    for text in ("saved to /home/ada/run", '"/tmp/x"', "'/root/.cache'", "(/Users/ada)", "C:\\\\Users\\\\ada"):
        assert notebooks.LOCAL_PATH.search(text), text
    for text in (
        "quickstart/tmp/x",
        "https://example.org/home/x",
        "../docs/tutorial.md",
        "images/usr/a.jpg",
        "1 / home",
    ):
        assert not notebooks.LOCAL_PATH.search(text), text


def test_its_links_and_commands_exist() -> None:
    notebook = notebooks.read(QUICKSTART)
    pages = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", pages)
    assert len(links) >= 4 and all((QUICKSTART.parent / link).exists() for link in links)
    lines = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("!")]
    assert [shell_commands(line)[0][1] for line in lines] == ["prepare", "suggest", "export"]
    (install,) = (cell.source for cell in notebook.cells if cell.id == "install")
    assert "%pip install --quiet .." in install and (QUICKSTART.parent.parent / "setup.py").is_file()


@pytest.mark.slow
def test_the_quickstart_runs_from_the_top(tmp_path: Path) -> None:
    notebook = notebooks.execute(QUICKSTART, tmp_path)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]

    def text(cell: str) -> str:
        return notebooks.text_of(notebook, cell)

    scores = {a: float(m) for a, m in re.findall(r"alpha (\d): test mAP ([\d.]+) %", text("evaluate"))}
    assert scores.keys() == {"1", "5"} and min(scores.values()) > 90
    assert re.search(r"hardest digit: \d \([\d.]+ %\), easiest: \d \([\d.]+ %\)", text("evaluate"))
    predicted = re.findall(r"there: ([\d ]+?) +predicted: (.+)", text("predict"))
    right = sum(set(there.split()) == set(re.findall(r"(\d) \(", found)) for there, found in predicted)
    assert len(predicted) == 4 and right >= 2
    assert [len(notebooks.images_of(notebook, cell)) for cell in ("look", "curve", "maps")] == [1, 1, 1]
    suggested = re.search(r"suggestions.csv: (\d+) suggestions", text("suggest"))
    assert suggested is not None and int(suggested[1]) > 50
    assert "timm's names" in text("export") or "backbone.*" in text("export")
    apart = re.search(r"within (\S+) of the run's", text("reload"))
    assert apart is not None and float(apart[1]) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart", QUICKSTART.name}
