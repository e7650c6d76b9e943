"""The command `prepare` run in the process of the test, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.cli import prepare as prepare_command
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.observed_labels import draw_published, published_split
from tests.support.data import encoded, write_files


def run_prepare(*arguments: object) -> None:
    """Run the command; a user error stays an exception, a mistake in the command line ends in SystemExit."""
    assert prepare_command.main([str(argument) for argument in arguments]) == 0


def prepare(*arguments: object) -> Manifest:
    """Run the command and open the Manifest at its --out."""
    run_prepare(*arguments)
    return Manifest(str(arguments[arguments.index("--out") + 1]))


def report_of(manifest: Manifest) -> dict[str, Any]:
    """report.json of a Manifest."""
    report: dict[str, Any] = json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))
    return report


def notes_of(manifest: Manifest) -> str:
    """The sentences of the report."""
    return " ".join(report_of(manifest)["notes"])


def check_protocol(
    manifest: Manifest, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], paths: list[str]
) -> None:
    """Assert that known and observed labels, the cut, and the order of rows are those of the papers.

    Args:
        manifest: what was prepared.
        train: 0 or 1 [N, C], labels of the official training rows.
        test: the same of the test rows.
        paths: of the training rows.
    """
    kept, cut = published_split(len(train))
    drawn = draw_published(SparseLabels.from_dense(train.astype(np.int8), 0))
    for name, rows in (("train", kept), ("val", cut)):
        split = manifest.split(name)
        assert [split.relative_path(i) for i in range(len(split))] == [paths[i] for i in rows]
        assert split.known.default == 0 and np.array_equal(split.known.rows(range(len(split))), train[rows])
        assert np.array_equal(split.observed.rows(range(len(split))), drawn.rows(rows))
    split = manifest.split("test")
    assert np.array_equal(split.known.rows(range(len(split))), test)
    drawn = draw_published(SparseLabels.from_dense(test.astype(np.int8), 0))
    assert np.array_equal(split.observed.rows(range(len(split))), drawn.rows(range(len(test))))


def make_table(folder: Path, text: str | bytes) -> tuple[Path, Path]:
    """A table and the images that it names (in a first column without quotes). Returns (table, image folder)."""
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "table.csv").write_bytes(data)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for line in data.decode("utf-8-sig").splitlines()[1:]:
        name = line.split(",")[0]
        if name:
            write_files(images, {name: encoded()})
    return folder / "table.csv", images
