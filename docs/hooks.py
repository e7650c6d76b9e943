"""For mkdocs: what the benchmarks leave in benchmarks/results is shown by pages of this folder, from where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
LINK, TARGET = "../benchmarks/results/", "results/"


def on_files(files: Any, config: Any) -> Any:
    """Add the images of benchmarks/results to the site."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, TARGET + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Point links to them at their place in the site."""
    return markdown.replace(LINK, TARGET)
