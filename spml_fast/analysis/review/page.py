"""The page of a review: what it holds, and how it is written, as one file or as a folder.

The page brings its style, its program and its data along and loads nothing from a network: its content security policy
allows the program and the style by their checksums, pictures in the page (or in its folder), and nothing else. What
comes from data is text in a JSON block, which only the program reads and only as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from spml_fast.analysis.pages.inline import render_page
from spml_fast.analysis.review.files import PAGE, THUMBNAIL_FOLDER, THUMBNAILS, Json, is_file
from spml_fast.analysis.review.pictures import Pictures, encoded_map, map_scale
from spml_fast.analysis.suggest import KINDS, Suggestions
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_text
from spml_fast.core.outputs import OutputFile, writer_name
from spml_fast.core.text import formula_safe_path, printable
from spml_fast.data.labels import UNKNOWN
from spml_fast.data.manifest import Manifest, Split

# In this order.
SCRIPTS = ("state.js", "cards.js", "filters.js", "view.js")
# Pixels of a thumbnail's longer side: in the page itself, and in a folder, whose files are read when they are seen.
SIDE, FOLDER_SIDE = 192, 384
# Suggestions a list of one file: of photographs 180 MB by estimate; browsers hold half a GB as one text.
MOST_IN_FILE = 5_000


@dataclass(frozen=True)
class About:
    """What a page is about.

    Attributes:
        run: the run directory.
        manifest: the data set's.
        split: that the suggestions are about.
    """

    run: str
    manifest: Manifest
    split: Split


def page_data(about: About, lists: Sequence[Suggestions], pictures: Pictures) -> Json:
    """Everything that the page shows, as JSON: a list for each column, and the pictures' place left empty.

    Keys: `run`, `runs`, `split`, `manifest`, `classes` (names of those that occur), `images` (`path` as tables have it,
    `width`, `height`), `rows` (`image`, `class`, `known`: place in unknown, positive, negative, `probability` as text
    with all digits, `run`, `map`: int8 cells in base64 or ""), `grid` ([h, w] of the maps or null), `signed`, `truth`
    (a letter per row: 1 the suggestion is right, 0 it is wrong, ? not known; null where no label is hidden) and `id`, a
    checksum of what is suggested, with which decisions are kept.
    """
    split = about.split
    index, class_id = (np.concatenate([getattr(found, name) for found in lists]) for name in ("index", "class_id"))
    samples, image = np.unique(index, return_inverse=True)
    used, class_place = np.unique(class_id, return_inverse=True)
    runs = list(dict.fromkeys(run for found in lists for run in found.runs))
    maps = [pictures.maps.get((i, c)) for i, c in zip(index.tolist(), class_id.tolist(), strict=True)]
    there = [cells for cells in maps if cells is not None]
    scale = map_scale(there)
    data: Json = {
        "run": about.run,
        "runs": [formula_safe_path(run) for run in runs],
        "manifest": str(about.manifest.folder),
        "split": split.name,
        "classes": [about.manifest.classes[c] for c in used.tolist()],
        "images": [
            {
                "path": formula_safe_path(split.relative_path(i)),
                "width": pictures.thumbnails[i].width,
                "height": pictures.thumbnails[i].height,
            }
            for i in samples.tolist()
        ],
        "rows": {
            "image": image.tolist(),
            "class": class_place.tolist(),
            "known": [KINDS.index(found.code) for found in lists for _ in range(len(found))],
            "probability": [repr(p) for found in lists for p in found.probability.tolist()],
            "run": [runs.index(found.runs[k]) for found in lists for k in found.run_places.tolist()],
            "map": ["" if cells is None else encoded_map(cells, scale) for cells in maps],
        },
        "grid": list(there[0].shape) if there else None,
        "signed": pictures.signed,
        "truth": _truth(lists, split) if split.hides_labels else None,
    }
    rows = [data["rows"][name] for name in ("image", "class", "known")]
    suggested = [data["split"], data["classes"], [image["path"] for image in data["images"]], rows]
    data["id"] = hashlib.sha256(json.dumps(suggested).encode()).hexdigest()[:16]
    return data


def _truth(lists: Sequence[Suggestions], split: Split) -> str:
    letters = []
    for found in lists:
        truth = split.known.codes_at(found.index, found.class_id)
        letters += ["?" if code == UNKNOWN else "01"[code == found.suggestion] for code in truth.tolist()]
    return "".join(letters)


def with_sources(data: Json, sources: Sequence[str]) -> Json:
    """The data with the address of each image's thumbnail; "" where there is none."""
    return data | {"images": [image | {"src": src} for image, src in zip(data["images"], sources, strict=True)]}


def render(data: Json, image_source: str) -> str:
    """The page.

    Args:
        data: as `page_data` gives it, `with_sources`.
        image_source: where the content security policy lets pictures come from.
    """
    run, split, manifest = (printable(data[name]) for name in ("run", "split", "manifest"))
    # The name of the data set tells people enough; where it lies is shown when it is pointed at.
    name = printable(Path(data["manifest"]).name) or manifest
    values = {
        "title": f"Review: {printable(Path(data['run']).name or data['run'])}",
        "about": f"{split} split of {name}, suggested by {run}",
        "manifest": manifest,
        "signed": data["signed"],
        "image_source": Markup(image_source),
        "data": data,
    }
    return render_page("spml_fast.analysis.review", "review.html", ["review.css"], SCRIPTS, values)


def page_output(out: Path, overwrite: bool) -> OutputFile:
    """The page's file, for checks: `out` itself, or that of the folder."""
    return OutputFile(out if is_file(out) else out / PAGE, "html", writer_name("suggest"), "--page", overwrite)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a page that must not be written, before the work begins and before it is written.

    Raises:
        UserError: another program's file, a folder with other files in it, or a folder that does not exist.
    """
    if not is_file(out) and out.exists() and not out.is_dir():
        raise UserError(f"--page {printable(str(out))} must be a file named .html, or a folder")
    page_output(out, overwrite).check(parent=is_file(out))
    if not is_file(out) and out.is_dir() and not (out / PAGE).exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--page {printable(str(out))} is a folder with other files; choose an empty or a new one")


def write_page(out: Path, data: Json, pictures: Pictures, overwrite: bool) -> int:
    """Write the page; of a folder the pictures first, so that a page never lacks any.

    Args:
        out: a file named .html, or a folder, which is made.
        data: as `page_data` gives it.
        pictures: the thumbnails of the images of `data`.
        overwrite: replace what this command did not write.

    Returns:
        Bytes of the page and its pictures.

    Raises:
        UserError: it cannot or must not be written.
    """
    check_target(out, overwrite)
    thumbnails = [pictures.thumbnails[i].jpeg for i in sorted(pictures.thumbnails)]
    try:
        if is_file(out):
            inline = ["data:image/jpeg;base64," + base64.b64encode(t).decode() if t else "" for t in thumbnails]
            return _write(out, render(with_sources(data, inline), "data:"))
        # Named by what they hold: the page that is there keeps its own until it is replaced.
        folder = out / f"{THUMBNAILS}{hashlib.sha256(b''.join(thumbnails)).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, jpeg in enumerate(thumbnails):
            (folder / f"{number:06d}.jpg").write_bytes(jpeg)
        names = [f"{folder.name}/{number:06d}.jpg" if t else "" for number, t in enumerate(thumbnails)]
        size = _write(out / PAGE, render(with_sources(data, names), "'self' file: data:"))
        for other in out.iterdir():
            if THUMBNAIL_FOLDER.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)
    except OSError as error:
        raise UserError(f"--page {printable(str(out))} cannot be written: {error.strerror or error}") from error
    return size + sum(map(len, thumbnails))


def _write(path: Path, text: str) -> int:
    write_text(path, text, errors="backslashreplace")
    return path.stat().st_size
