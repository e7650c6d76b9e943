"""The record in a folder that holds an exported model: who wrote it, and what its weights file must be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spml_fast import __version__
from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, file_record, read_text, write_json
from spml_fast.core.outputs import WRITTEN_BY
from spml_fast.core.text import parse_json
from spml_fast.runs.layout import ExportLayout

FORMAT = 1


def write_record(layout: ExportLayout, mark: str, card: bool = False) -> None:
    """Write the record, last of the folder's files. Raises `OSError`.

    Args:
        layout: of a folder whose weights are there.
        mark: name of the command that wrote it.
        card: the command wrote the model card as well, which people edit: its checksum tells whether they did.
    """
    values = {WRITTEN_BY: mark, "format": FORMAT, "version": __version__}
    files = {layout.weights.name: dataclasses.asdict(file_record(layout.weights))}
    more = {"card": dataclasses.asdict(file_record(layout.card))} if card else {}
    write_json(layout.record, {**values, "files": files, **more})


def card_edited(layout: ExportLayout) -> bool:
    """Whether a folder's model card is not as a command of this program wrote it; false where there is none."""
    if not layout.card.is_file():
        return False
    try:
        record = FileRecord.read(parse_json(read_text(layout.record, "utf-8"))["card"])
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return True
    return file_record(layout.card) != record


def check_export_folder(layout: ExportLayout) -> Path:
    """Compare the weights of an export folder with its record; reads them once.

    Returns:
        The weights file.

    Raises:
        UserError: the record or the weights are missing, damaged, or of a version that is not known here.
    """
    path, weights = layout.record, layout.weights
    again = "export the run again, or copy or download the folder anew"
    try:
        values = parse_json(read_text(path, "utf-8"))
        number = values["format"]
        if number != FORMAT:
            raise UserError(f"{path} has format {number!r}, which this version does not know")
        record = FileRecord.read(values["files"][weights.name])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {again}") from error
    try:
        same = weights.stat().st_size == record.size and file_record(weights) == record
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror}; {again}") from error
    if not same:
        raise UserError(f"{weights} is damaged (its checksum is not the recorded one); {again}")
    return weights
