"""The record of a run's last evaluation: what the report shows of classes, made for the weights that the run has."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spml_fast import __version__
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record, finite, read_text, write_text
from spml_fast.core.text import parse_json
from spml_fast.data.manifest import Split
from spml_fast.evaluation.class_record import class_record
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.evaluate import Scores
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.read import number

FORMAT = 1
AGAIN = "`spml-fast evaluate --run RUN --record` makes it again"


class Recorder:
    """Makes the record while a split is evaluated.

    Args:
        split: that is evaluated.
        alpha: one of those that it is evaluated at.
        config: the run's.
        classes: class names in class-id order.
        decisions: of the run, or None.

    Attributes:
        record: what was made, with the paths of its images; None before, and on ranks other than 0.
    """

    def __init__(
        self, split: Split, alpha: float, config: Config, classes: Sequence[str], decisions: Decisions | None
    ) -> None:
        self.split, self.alpha, self.classes, self.decisions = split, alpha, classes, decisions
        self.threshold = config.eval.threshold
        self.record: dict[str, Any] | None = None

    def look(self, scores: Scores) -> None:
        """Take the scores of the split (rank 0)."""
        record = class_record(scores, self.split.known, self.alpha, self.threshold, self.classes, self.decisions)
        for name in ("false_positives", "misses"):
            record[name] = [[sample, self.split.relative_path(sample), *rest] for sample, *rest in record[name]]
        self.record = {"split": self.split.name, "images": len(self.split)} | record


def headline_alpha(alphas: Sequence[float], config: Config) -> float:
    """The alpha whose figures stand for a run, as `Run.headline`."""
    return config.model.alpha_eval if config.model.alpha_eval in alphas else alphas[0]


def write_evaluation(layout: RunLayout, record: dict[str, Any]) -> None:
    """Write a record beside the weights that it is of.

    Args:
        layout: the run's.
        record: of a `Recorder`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        about = {
            "format": FORMAT,
            "version": __version__,
            "weights": dataclasses.asdict(file_record(layout.weights)),
        }
        # Paths may be of any bytes: what is no text is escaped.
        write_text(layout.evaluation, json.dumps(finite(about | record), separators=(",", ":")))
    except OSError as error:
        raise UserError(f"{layout.evaluation} cannot be written: {error.strerror}") from error


def load_evaluation(run: Path, classes: Sequence[str]) -> dict[str, Any] | None:
    """A run's record, if it is for the weights that it has; None where it has none.

    Args:
        run: the run directory. One that was copied without its weights is taken at its word.
        classes: class names in class-id order.

    Raises:
        UserError: the file is damaged, of another version, or for other weights or classes.
    """
    layout = RunLayout(run)
    path = layout.evaluation
    if not path.exists():
        return None
    try:
        record = parse_json(read_text(path, "utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{path} has format {record['format']}, which this version does not know; {AGAIN}")
        weights = record["weights"]["size"], record["weights"]["crc32"]
        fits = _fits(record, len(classes))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {AGAIN}") from error
    if not fits:
        raise UserError(f"{path} is for other classes than the run's; {AGAIN}")
    if layout.weights.is_file():
        try:
            now = file_record(layout.weights)
        except OSError as error:
            raise UserError(f"{layout.weights} cannot be read: {error.strerror}") from error
        if weights != (now.size, now.crc32):
            raise UserError(f"{path} was made for other weights than {layout.weights.name} holds now; {AGAIN}")
    return dict(record)


def _fits(record: dict[str, Any], classes: int) -> bool:
    """Whether a record is about so many classes; raises what Python raises where it is no record."""
    columns = [record["positives"], record["negatives"], record["curves"]["points"]]
    for name in ("plain", "decided"):
        if record[name] is not None or name == "plain":
            columns += [record[name]["predicted"], record[name]["hits"]]
    if not all(isinstance(value, int) and value >= 0 for column in columns for value in column):
        raise ValueError("a count is no count")
    points = base64.b64decode(record["curves"]["data"], validate=True)
    if len(points) != 2 * sum(record["curves"]["points"]):
        raise ValueError("the curves have other points than they say")
    ids = [class_id for name in ("false_positives", "misses") for _, _, class_id, _ in record[name]]
    ids += [class_id for pair in record["confusions"]["pairs"] for class_id in pair[:2]]
    if any(row[0] < 0 for name in ("false_positives", "misses") for row in record[name]):
        raise ValueError("a sample has a negative number")
    if not isinstance(record["split"], str) or {len(pair) for pair in record["confusions"]["pairs"]} - {6}:
        raise ValueError("the split has no name, or a pair of confused classes not its six numbers")
    figures = [value for name in ("false_positives", "misses") for row in record[name] for value in (row[0], row[3])]
    figures += [value for pair in record["confusions"]["pairs"] for value in pair[2:6]]
    for end in ("before", "after"):
        if record["calibration"][end] is not None or end == "before":
            cells = record["calibration"][end]["curve"]
            figures += [cell[name] for cell in cells for name in ("entries", "probability", "positive_fraction")]
    if record["confusions"]["matrix"] is not None:
        matrix = record["confusions"]["matrix"]
        ids += matrix["classes"]
        rows = [row for name in ("count", "of") for row in matrix[name]]
        if {len(row) for row in rows} != {len(matrix["classes"])} or len(rows) != 2 * len(matrix["classes"]):
            raise ValueError("the matrix of confusions is no square")
        figures += [value for row in rows for value in row]
    for value in (*figures, record["alpha"], record["threshold_probability"], record["images"]):
        if number(value) is None:
            raise ValueError(f"{value!r} is no number")
    return set(map(len, columns)) == {classes} and all(0 <= int(class_id) < classes for class_id in ids)
