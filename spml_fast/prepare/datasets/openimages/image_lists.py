"""Image lists of OpenImages, of which the column Rotation is used: how each image is to be turned.

Source: docs/sources.md#openimages; rotation: OpenImages' own page of 2018-05-17, "Rotated images in Open Images".
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets.openimages.csv_blocks import BLOCK, DICTIONARY, check_header, explain_line, open_file
from spml_fast.prepare.datasets.openimages.ids import IMAGE_ID, ids_from_hex
from spml_fast.prepare.raw import RawSplit

# EXIF orientation that turns an image by so many degrees counterclockwise.
ROTATIONS = {"0": 1, "90": 8, "180": 3, "270": 6}


def _orientation(rotation: str) -> int | None:
    """EXIF orientation of a field; 0 where it is unknown, None where the field is invalid."""
    if rotation.strip().lower() in ("", "nan"):
        return 0
    return ROTATIONS.get(rotation.strip().removesuffix(".0"))


def _find_fault(fields: dict[str, str]) -> str:
    """What is wrong with a row; empty when nothing is."""
    if not IMAGE_ID.fullmatch(fields["ImageID"]):
        return f"the ImageID {fields['ImageID']!r} is not 16 hexadecimal digits"
    if _orientation(fields["Rotation"]) is None:
        return f"the Rotation {fields['Rotation']!r} is not 0, 90, 180, 270, nan or empty"
    return ""


def read_rotations(path: Path) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
    """Ids, uint64 [n], and EXIF orientations, uint8 [n] with 0 for unknown, of an image list, some at a time.

    `Rotation` is how many degrees an image must be turned counterclockwise to be upright; empty and nan mean unknown.

    Raises:
        UserError: there is no column Rotation; or naming file and line.
    """
    columns = check_header(path, ("ImageID", "Rotation"), exact=False)

    def failed(otherwise: str) -> UserError:
        # Titles may hold line ends, so only reading from the beginning tells the line.
        with io.TextIOWrapper(open_file(path), "utf-8", "backslashreplace", newline="") as text:
            text.readline()
            return explain_line(path, columns, 2, text, _find_fault, otherwise)

    with open_file(path) as stream:
        try:
            batches = pa.csv.open_csv(
                stream,
                pa.csv.ReadOptions(block_size=BLOCK),
                pa.csv.ParseOptions(newlines_in_values=True),
                pa.csv.ConvertOptions(
                    column_types={"ImageID": pa.binary(16), "Rotation": DICTIONARY},
                    include_columns=["ImageID", "Rotation"],
                    null_values=[],
                    check_utf8=False,
                ),
            )
            for batch in batches:
                image, rotation = batch.column(0), batch.column(1)
                if not len(image):
                    continue
                codes = [_orientation(v.decode("utf-8", "replace")) for v in rotation.dictionary.to_pylist()]
                digits = np.frombuffer(image.buffers()[1], np.uint8)[
                    16 * image.offset : 16 * (image.offset + len(image))
                ]
                ids, valid = ids_from_hex(digits.reshape(-1, 16))
                if None in codes or not valid.all():
                    raise failed("a row cannot be parsed")
                yield ids, np.array(codes, np.uint8)[rotation.indices.to_numpy()]
        except pa.ArrowInvalid as error:
            raise failed(str(error)) from error


def add_rotations(path: Path, splits: Sequence[RawSplit]) -> None:
    """Set the orientation of the images that an image list names. Raises `UserError` as `read_rotations`."""
    for ids, orientation in read_rotations(path):
        for split in splits:
            assert isinstance(split.ids, np.ndarray)
            if split.orientation is None:
                split.orientation = np.zeros(len(split), np.uint8)
            row = np.minimum(np.searchsorted(split.ids, ids), len(split) - 1)
            hit = split.ids[row] == ids
            split.orientation[row[hit]] = orientation[hit]
