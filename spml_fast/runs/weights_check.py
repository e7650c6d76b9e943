"""Whether a run's weights file is one that the run wrote, by the checksums that its checkpoints recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, file_record, read_text
from spml_fast.core.text import parse_json
from spml_fast.runs.layout import RunLayout


def recorded_weights(layout: RunLayout) -> set[FileRecord]:
    """What the weights file of a run may hold; empty for a run before 0.2.0, or a copy without checkpoints.

    Every checkpoint records the best weights of its time, and the file may be a save behind the newest record: while a
    run saves, or after it was killed.
    """
    checkpoints = layout.checkpoints
    best = _record(checkpoints.best, lambda values: values["weights"])
    marks = [_record(path, lambda values: values["best"] and values["best"]["weights"]) for path in checkpoints.marks]
    return {record for record in (best, *marks) if record is not None}


def _record(path: Path, weights: Any) -> FileRecord | None:
    """The record in a JSON file; None where there is none, or no file that can be read."""
    try:
        values = weights(parse_json(read_text(path, "utf-8")))
        return FileRecord.read(values) if values else None
    except (UserError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        # Damaged marks are named where a run is resumed or listed, and a training run may delete one just now.
        return None


def check_weights(layout: RunLayout) -> None:
    """Compare a run's weights file with the checksums that the run recorded; reads it once.

    Raises:
        UserError: it is another one, or it is missing.
    """
    path, known = layout.weights, recorded_weights(layout)
    while known:
        wrong = "it is missing"
        try:
            record = file_record(path)
            if record in known:
                return
            wrong = "its checksum is not the one that was recorded when it was written"
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        before, known = known, recorded_weights(layout)
        # A run that trains may have replaced the file in between.
        if known == before:
            raise UserError(
                f"{path} is damaged ({wrong}); spml-fast checkpoints {layout.folder} --repair writes it again from the "
                "best checkpoint"
            )
