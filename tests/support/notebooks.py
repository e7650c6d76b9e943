"""Notebooks, run as a reader runs them: `python -m tests.support.notebooks` stores what examples/ shows."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from tests.support.paths import ROOT
from tests.support.runs import environment

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Seconds for a cell; on a machine that nothing else uses none takes one.
LIMIT = 1800
# What a stored output must not name: folders of whoever ran it.
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|mnt|var|private)/|[A-Z]:\\\\")
# Of a whole notebook with its images, in bytes.
LARGEST = 600_000


def read(path: Path) -> Any:
    """A notebook; `nbformat` raises where it is none."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(path: Path, folder: Path) -> Any:
    """Run every cell from the top, in a copy beside nothing else; returns the notebook with its outputs.

    Args:
        path: the notebook.
        folder: where the copy is put and runs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient import NotebookClient

    notebook = read(Path(shutil.copy(path, folder)))
    # This interpreter, whatever kernels a machine has registered.
    manager = AsyncKernelManager(kernel_name="python3")
    manager._kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    client = NotebookClient(notebook, km=manager, timeout=LIMIT, resources={"metadata": {"path": str(folder)}})
    client.execute(cleanup_kc=True, env=environment(PYTHONPATH=search), cwd=str(folder))
    return notebook


def text_of(notebook: Any, cell: str) -> str:
    """What a cell printed."""
    (found,) = (c for c in notebook.cells if c.id == cell)
    return "".join(output.text for output in found.outputs if output.output_type == "stream")


def images_of(notebook: Any, cell: str) -> list[str]:
    """The PNG images that a cell shows, in base64."""
    (found,) = (c for c in notebook.cells if c.id == cell)
    shown = (output.data for output in found.outputs if output.output_type == "display_data")
    return [data["image/png"] for data in shown if "image/png" in data]


def without_traces(notebook: Any) -> Any:
    """The notebook without what differs between machines: times, versions of the kernel, warnings of libraries."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run every notebook and store its outputs in it."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = without_traces(execute(path, Path(folder)))
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
