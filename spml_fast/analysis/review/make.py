"""A page from suggestions: looks at them, and writes what it has seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spml_fast.analysis.review.files import is_file
from spml_fast.analysis.review.page import (
    FOLDER_SIDE,
    MOST_IN_FILE,
    SIDE,
    About,
    check_target,
    page_data,
    write_page,
)
from spml_fast.analysis.review.pictures import collect
from spml_fast.analysis.suggest import Suggestions
from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.core.text import printable
from spml_fast.data.manifest import Manifest, Split


def check_page(out: Path, most: int, overwrite: bool) -> None:
    """Refuse a page that must not be written or that one file cannot hold, before anything is computed.

    Args:
        out: a file named .html, or a folder.
        most: suggestions of each list at most.
        overwrite: replace what is there.

    Raises:
        UserError: saying what to do.
    """
    check_target(out, overwrite)
    if is_file(out) and most > MOST_IN_FILE:
        raise UserError(
            f"--page {printable(os.fspath(out))} is one file, which holds {MOST_IN_FILE:,} suggestions a list; for "
            f"{most:,} give a folder, or a smaller --top or --per-class"
        )


def make_page(
    out: Path,
    run: Path,
    lists: Sequence[Suggestions],
    split: Split,
    manifest: Manifest,
    device: torch.device,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Make and write the page, in one process; nothing where nothing is suggested.

    Args:
        out: a file named .html, or a folder.
        run: the run directory.
        lists: one for each observed label.
        split: that they are about.
        manifest: its data set.
        device: where networks run.
        batch_size: images a forward; None for the run's own.
        overwrite: replace what is there.

    Returns:
        What to say of it, a line each.

    Raises:
        UserError: a run's weights cannot be used, or the page cannot be written.
    """
    rows = [len(found) for found in lists]
    if not any(rows):
        return []
    check_page(out, max(rows), overwrite)
    samples = np.unique(np.concatenate([found.index for found in lists])).tolist()
    side = SIDE if is_file(out) else FOLDER_SIDE
    with show_progress(len(samples), "drawing the page") as advance:
        pictures = collect(lists, split, len(manifest.classes), device, side, batch_size, advance)
    data = page_data(About(str(run), manifest, split), lists, pictures)
    size = write_page(out, data, pictures, overwrite)
    name = printable(os.fspath(out))
    lines = [f"{name}: {sum(rows):,} suggestions, {len(samples):,} images, {size / 1e6:.1f} MB"]
    if unread := sum(not thumbnail.jpeg for thumbnail in pictures.thumbnails.values()):
        lines.append(f"{unread} of the images cannot be read, and are not shown")
    served = "" if is_file(out) else f"; `spml-fast review {name}` writes every decision to a file at once"
    return [*lines, f"open it in a browser{served}"]
