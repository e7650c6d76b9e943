"""`spml-fast suggest --page OUT`: pictures and maps of the suggestions, and the page that shows them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.text import printable

if TYPE_CHECKING:
    import torch

    from spml_fast.analysis.suggest import Suggestions
    from spml_fast.data.manifest import Manifest, Split


def check_page(out: Path, top: int | None, overwrite: bool) -> None:
    """Refuse a page that must not be written or that one file cannot hold, before anything is computed.

    Args:
        out: a file named .html, or a folder.
        top: suggestions of each list at most; None for no limit.
        overwrite: replace what is there.

    Raises:
        UserError: saying what to do.
    """
    from spml_fast.analysis.review import page

    page.check_target(out, overwrite)
    if top is not None:
        _check_size(out, top)


def _check_size(out: Path, rows: int) -> None:
    from spml_fast.analysis.review import files, page

    if files.is_file(out) and rows > page.MOST_IN_FILE:
        raise UserError(
            f"--page {printable(os.fspath(out))} is one file, which holds {page.MOST_IN_FILE:,} suggestions a list; "
            f"for {rows:,} give a folder, or a smaller --top or --per-class"
        )


def make_page(
    args: argparse.Namespace, lists: Sequence[Suggestions], split: Split, manifest: Manifest, device: torch.device
) -> None:
    """Make and write the page; nothing where nothing is suggested.

    Args:
        args: the command line.
        lists: one for each observed label.
        split: that they are about.
        manifest: its data set.
        device: where networks run.

    Raises:
        UserError: a run's weights cannot be used, or the page cannot be written.
    """
    from spml_fast.analysis.review import page
    from spml_fast.analysis.review.files import is_file
    from spml_fast.analysis.review.pictures import collect
    from spml_fast.core.progress import show_progress

    rows = [len(found) for found in lists]
    if not any(rows):
        return
    _check_size(args.page, max(rows))
    samples = np.unique(np.concatenate([found.index for found in lists])).tolist()
    side = page.SIDE if is_file(args.page) else page.FOLDER_SIDE
    with show_progress(len(samples), "drawing", True) as advance:
        pictures = collect(lists, split, len(manifest.classes), device, side, args.batch_size, advance)
    about = page.About(str(args.run), manifest, split)
    data = page.page_data(about, lists, pictures)
    size = page.write_page(args.page, data, pictures, samples, args.overwrite)
    unread = sum(not thumbnail.jpeg for thumbnail in pictures.thumbnails.values())
    name = printable(os.fspath(args.page))
    print(f"{name}: {sum(rows):,} suggestions, {len(samples):,} images, {size / 1e6:.1f} MB")
    if unread:
        print(f"{unread} of the images cannot be read, and have no picture")
    served = "" if is_file(args.page) else f"; `spml-fast review {name}` writes every decision to a file at once"
    print(f"open it in a browser{served}")
