"""The list of images that a run could not train on, in its directory."""

from __future__ import annotations

import csv
from pathlib import Path

from spml_fast.core import distributed
from spml_fast.core.io import write_csv
from spml_fast.data.bad_images import BadImages
from spml_fast.runs.layout import RunLayout

HEADER = ("image", "reason")


def read_list(path: Path) -> dict[str, str]:
    """Image -> reason from an earlier list; empty when there is none."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row[0]: row[1] for row in list(csv.reader(file))[1:]}


def list_bad_images(bad: BadImages, layout: RunLayout) -> int:
    """Write what all ranks, and the run before it was resumed, have replaced (collective); returns how many images.

    Args:
        bad: this rank's.
        layout: the run's files.

    Raises:
        UserError: there are more of them than `data.bad_image_limit`.
        OSError: the list cannot be written.
    """
    split = bad.split
    own = {split.relative_path(sample): reason for sample, reason in bad.reasons.items()}
    rows = read_list(layout.bad_images)
    for part in distributed.gather_objects(own):
        rows |= part
    # Every rank has read the old list before rank 0 writes the new one, or they would not count alike.
    distributed.barrier()
    if rows and distributed.is_main():
        write_csv(layout.bad_images, HEADER, sorted(rows.items()))
    if rows:
        bad.check_limit(len(rows), next(reversed(rows.values())))
    return len(rows)
