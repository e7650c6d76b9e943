"""What became of the rows and images of OpenImages: the report's entries, and sentences for the summary."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets.openimages.grouping import Grouped
from spml_fast.prepare.datasets.openimages.image_folder import Images
from spml_fast.prepare.datasets.openimages.label_files import LabelRows
from spml_fast.prepare.datasets.openimages.split_names import SPLITS
from spml_fast.prepare.raw import RawDataset, RawSplit

# At most so many ids without an image are named in report.json.
_MAX_NAMED = 1000


class Coverage:
    """Counts rows and images, and finds the images of each split.

    Args:
        images: the images below the image folder; None where the labels are prepared alone.
        raw: the data set, whose `coverage` and `notes` are written.
    """

    def __init__(self, images: Images | None, raw: RawDataset) -> None:
        self._images, self._raw = images, raw
        self._used = np.zeros(0 if images is None else len(images.ids), np.bool_)

    def count_rows(
        self, name: str, rows: LabelRows, machine: LabelRows | None, grouped: Grouped, options: argparse.Namespace
    ) -> None:
        """Say what became of the rows of a split.

        Args:
            name: of the split.
            rows: its verified rows.
            machine: its machine rows, if there are any.
            grouped: what was made of them.
            options: of the command line.
        """
        notes = self._raw.notes
        entry: dict[str, Any] = self._raw.coverage.setdefault(name, {})
        entry |= {
            "rows": rows.rows,
            "rows_by_source": dict(rows.sources),
            "rows_of_other_classes": rows.other_classes,
            "repeated_rows": grouped.repeated,
            "conflicts": grouped.conflicts,
            "images_named": grouped.named,
            "images_labelled": len(grouped.ids),
        }
        notes.append(
            f"{name}: {rows.rows:,} verified rows, {grouped.named:,} images named; "
            f"{rows.other_classes:,} rows of classes that {options.classes.name} does not list are left out"
        )
        if grouped.named > len(grouped.ids):
            notes.append(f"{name}: {grouped.named - len(grouped.ids):,} images have no label of the listed classes")
        if grouped.repeated:
            meaning = {"positive": "present", "negative": "absent", "last": "the last row says", "drop": "unknown"}
            notes.append(
                f"{name}: {grouped.repeated:,} rows name an image and class again; {grouped.conflicts:,} pairs are "
                f"contradicted and were taken as {meaning[options.conflicts]} (--conflicts {options.conflicts})"
            )
        if machine is not None and grouped.machine is not None:
            entry["machine"] = {
                "rows": machine.rows,
                "rows_of_other_classes": machine.other_classes,
                "below_threshold": machine.below_threshold,
                "overruled": grouped.overruled,
                "used": len(grouped.machine.codes),
            }
            notes.append(
                f"{name}: training also sees {len(grouped.machine.codes):,} machine labels of confidence "
                f"{options.machine_threshold:g} and more as positives; {machine.below_threshold:,} are below that, "
                f"{grouped.overruled:,} are on pairs that people have verified"
            )

    def locate_images(self, name: str, grouped: Grouped) -> RawSplit:
        """One split, with the paths of its images. Raises `UserError` if none of them exists."""
        images, entry = self._images, self._raw.coverage[name]
        split = RawSplit(name, grouped.human, ids=grouped.ids, template="", extra=grouped.machine)
        if images is None:
            # The folders of the official bucket, for whoever has the images elsewhere.
            split.template = SPLITS[name] + "/{id:016x}.jpg"
            return split
        position = np.minimum(np.searchsorted(images.ids, grouped.ids), len(images.ids) - 1)
        present = images.ids[position] == grouped.ids
        count = int(present.sum())
        if not count:
            raise UserError(
                f"none of the {len(present):,} labelled images of split {name} is below "
                f"{self._raw.image_root} (the first is {int(grouped.ids[0]):016x}.jpg); "
                "give the folder that holds them, or leave the split's labels out"
            )
        self._used[position[present]] = True
        numbers = images.template_of[position]
        # Only the folders that this split has, and for an image that is missing any of them.
        of_split = np.unique(numbers[present])
        split.template = [images.templates[i] for i in of_split.tolist()]
        split.template_of = np.minimum(np.searchsorted(of_split, numbers), len(of_split) - 1).astype(np.uint32)
        missing = grouped.ids[~present]
        entry["images_found"] = count
        entry["images_missing"] = len(missing)
        entry["first_missing"] = [f"{i:016x}" for i in missing[:_MAX_NAMED].tolist()]
        if len(missing):
            split.present = present
        note = f"{name}: {count:,} of {len(present):,} labelled images exist ({count / len(present):.1%})"
        if len(missing):
            note += f"; {len(missing):,} are missing and left out, the first is {int(missing[0]):016x}"
        self._raw.notes.append(note)
        return split

    def count_unused(self) -> None:
        """Say what else is in the image folder: images that no label file names, and other files."""
        if self._images is None:
            return
        images, notes = self._images, self._raw.notes
        unused = images.ids[~self._used]
        self._raw.coverage["images"] = {
            "files": len(images.ids),
            "without_label": len(unused),
            "first_without_label": [f"{i:016x}" for i in unused[:_MAX_NAMED].tolist()],
            "in_two_folders": images.doubled,
            "other_files": images.others,
            "archives": images.archives[:_MAX_NAMED],
        }
        if len(unused):
            notes.append(
                f"{len(unused):,} of {len(images.ids):,} images have no label of the listed classes in these files and "
                f"are not used (the first is {int(unused[0]):016x})"
            )
        if images.doubled:
            notes.append(f"{images.doubled:,} images lie in two folders; the first in alphabetical order is used")
        if images.archives:
            notes.append(f"{len(images.archives)} packed files beside the images were not opened")
