"""Pages of reviews for tests and benchmarks: real Manifests with hostile names, and suggestions without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.analysis.review.files import is_file
from spml_fast.analysis.review.page import FOLDER_SIDE, SIDE, About, page_data, write_page
from spml_fast.analysis.review.pictures import Pictures, Thumbnail, make_thumbnail
from spml_fast.analysis.suggest import KINDS, Suggestions
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter

# Each of them would run, end or turn about something if it were taken for more than text.
HOSTILE_CLASSES = [
    '<img src=x onerror="window.broken = 1">',
    "</script><script>window.broken = 1</script>",
    "a[/b]c",
    "\u202eevil\u2066",
    "'; window.broken = 1; //",
    "=cmd|' /C calc'!A0",
    "x" * 300,
    "{{ 7 * 7 }}{% raw %}",
    'co,mma "and" quotes',
    "été ☃ 漢字",
]
HOSTILE_PATHS = [
    "<img src=x onerror=window.broken=1>.jpg",
    "=sum(a1).jpg",
    "-rf.jpg",
    'a "quoted", name.jpg',
    "line\nbreak\rreturn.jpg",
    "\u202egnp.exe",
    "\udcff not utf-8 \udc80.jpg",
    "../../../etc/passwd",
    "a[/b]c/" + "y" * 300 + ".jpg",
]
GRID = (5, 7)


@dataclass
class MadePage:
    """A page and what it was made of.

    Attributes:
        path: of the page: a file, or a folder.
        data: what it shows.
        lists: the suggestions.
        manifest: their data set.
    """

    path: Path
    data: dict[str, Any]
    lists: list[Suggestions]
    manifest: Manifest


def make_manifest(folder: Path, images: int, hides: bool = True) -> Manifest:
    """A data set of hostile names and plain ones, whose images do not exist."""
    rng = np.random.default_rng(1)
    known = rng.choice([NEGATIVE, POSITIVE], (images, len(HOSTILE_CLASSES)), p=[0.6, 0.4]).astype(np.int8)
    observed = np.where(rng.random(known.shape) < 0.2, known, np.int8(UNKNOWN))
    paths = [*HOSTILE_PATHS, *(f"photos/{i:05d}.jpg" for i in range(len(HOSTILE_PATHS), images))]
    writer = ManifestWriter(folder, "hostile", HOSTILE_CLASSES, folder.parent / "images")
    writer.add_split(
        "train",
        known=SparseLabels.from_dense(known if hides else observed),
        observed=SparseLabels.from_dense(observed) if hides else None,
        width=np.full(images, 4),
        height=np.full(images, 3),
        paths=paths[:images],
    )
    return writer.finish({"name": "hostile", "splits": {"train": {"samples": images}}})


def make_lists(manifest: Manifest, rows: int, run: str) -> list[Suggestions]:
    """So many suggestions of all kinds, seven of ten of them for unknown labels, in the order of a model."""
    split = manifest.split("train")
    observed = split.observed.rows(range(len(split)))
    rng = np.random.default_rng(2)
    lists = []
    for code, part in zip(KINDS, (0.7, 0.2, 0.1), strict=True):
        pairs = rng.permutation(np.argwhere(observed == code))[: round(part * rows)]
        sure = np.sort(rng.uniform(0.5, 1, len(pairs)))[::-1]
        probability = 1 - sure if code == POSITIVE else sure
        lists.append(Suggestions(code, pairs[:, 0], pairs[:, 1], probability, len(pairs), (run,)))
    return lists


def make_pictures(lists: list[Suggestions], side: int, number: int = 40) -> Pictures:
    """Thumbnails of coloured noise, 4 : 3, and maps of a peak somewhere; a sample in 20 cannot be read."""
    rng = np.random.default_rng(3)
    images = [make_thumbnail(rng.integers(0, 255, (side, side, 3), np.uint8), 4 / 3, side) for _ in range(number)]
    pictures = Pictures(signed=True)
    row, column = np.mgrid[: GRID[0], : GRID[1]]
    for found in lists:
        for index, class_id in zip(found.index.tolist(), found.class_id.tolist(), strict=True):
            pictures.thumbnails[index] = images[index % number] if index % 20 != 19 else Thumbnail(b"", 1, 1)
            far = (row - index % GRID[0]) ** 2 + (column - class_id % GRID[1]) ** 2
            pictures.maps[index, class_id] = (4 * np.exp(-far / 3) - 1).astype(np.float16)
    return pictures


def make_review_page(
    path: Path, rows: int = 60, hides: bool = True, run: str = "runs/<b>first", maps: bool = True
) -> MadePage:
    """A page of hostile names, and its data set beside it.

    Args:
        path: a file named .html, or a folder.
        rows: about how many suggestions.
        hides: whether the data set knows labels that training does not see.
        run: the run directory's name.
        maps: whether the run's head has any.
    """
    manifest = make_manifest(path.with_name(f"{path.name}-data"), max(20, rows // 3), hides)
    lists = make_lists(manifest, rows, run)
    pictures = make_pictures(lists, SIDE if is_file(path) else FOLDER_SIDE)
    if not maps:
        pictures.maps.clear()
    data = page_data(About(run, manifest, manifest.split("train")), lists, pictures)
    write_page(path, data, pictures, overwrite=False)
    return MadePage(path, data, lists, manifest)
