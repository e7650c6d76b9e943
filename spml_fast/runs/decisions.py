"""The decisions of a run: thresholds of its classes and calibration, made for the weights that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spml_fast import __version__
from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, file_record, read_text, write_json
from spml_fast.core.precision import inference_dtype
from spml_fast.core.text import parse_json
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Split
from spml_fast.evaluation.decisions import DecisionOptions, Decisions, choose_decisions, decisions_of
from spml_fast.evaluation.evaluate import Scores, known_entries, score_split
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout

FORMAT = 1
AGAIN = "make them again with `spml-fast calibrate {run}`, or delete the file"


@dataclass(frozen=True)
class SavedDecisions:
    """What a run's file holds.

    Attributes:
        decisions: thresholds and calibration.
        options: how they were chosen.
        split: on which split.
        record: the whole file.
    """

    decisions: Decisions
    options: DecisionOptions
    split: str
    record: dict[str, Any]


def score_known(
    classifier: Classifier, loader: EvalLoader, split: Split, config: Config, task: str | None = None
) -> Scores | None:
    """Logits of a split at `model.alpha_eval`, on rank 0; None on others (collective).

    Args:
        classifier: with the run's weights; its mode is kept.
        loader: this rank's batches of the split.
        split: whose known labels are the truth.
        config: the run's.
        task: what its progress is called; None shows none.
    """
    was_training = classifier.training
    classifier.eval()
    dtype = inference_dtype(config.train.precision, loader.device)
    scores = score_split(classifier, loader, split.known, [config.model.alpha_eval], dtype, task)
    classifier.train(was_training)
    return scores


def make_decisions(
    scores: Scores | None,
    split: Split,
    layout: RunLayout,
    alpha: float,
    options: DecisionOptions,
    classes: Sequence[str],
    weights: FileRecord | None = None,
) -> SavedDecisions:
    """Choose a run's decisions and write them, on every rank (collective).

    Args:
        scores: from `score_known`.
        split: that they are of.
        layout: the run's.
        alpha: the factor of the logits.
        options: how to choose.
        classes: class names in class-id order.
        weights: the weights file before it was loaded, where another process may have replaced it since.

    Raises:
        UserError: the known labels do not tell, a score is not a number, the weights are others now, or the file cannot
            be written. All ranks raise it.
    """

    def choose() -> SavedDecisions:
        assert scores is not None
        entries = known_entries(scores, split.known, alpha, classes)
        decisions, figures = choose_decisions(entries, alpha, options, classes)
        record = {
            "format": FORMAT,
            "version": __version__,
            "split": split.name,
            "images": len(split),
            "alpha": alpha,
            "options": dataclasses.asdict(options),
        }
        try:
            now = file_record(layout.weights)
            if weights not in (None, now):
                raise UserError(f"{layout.weights} was replaced in the meantime; run the command again")
            record["weights"] = dataclasses.asdict(now)
            write_json(layout.decisions, record | figures)
        except OSError as error:
            raise UserError(f"{layout.decisions} cannot be written: {error.strerror}") from error
        return SavedDecisions(decisions, options, split.name, record | figures)

    return distributed.from_main(choose)


def load_decisions(run: Path, classes: Sequence[str]) -> SavedDecisions | None:
    """A run's decisions, if they are for the weights that it has; None where it has none.

    Args:
        run: the run directory.
        classes: class names in class-id order.

    Raises:
        UserError: the file is damaged, of another version, or for other weights or classes.
    """
    layout = RunLayout(run)
    path = layout.decisions
    if not path.exists():
        return None
    again = AGAIN.format(run=run)
    try:
        record = parse_json(read_text(path, "utf-8"))
        number = record["format"]
        if number != FORMAT:
            raise UserError(f"{path} has format {number}, which this version does not know; {again}")
        options = DecisionOptions(**record["options"])
        rows, alpha = record["classes"], float(record["alpha"])
        decisions = decisions_of(alpha, record["calibration"]["kind"], rows)
        names, split, weights = [row["class"] for row in rows], str(record["split"]), record["weights"]
        size, crc32 = weights["size"], weights["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {again}") from error
    if names != list(classes):
        raise UserError(f"{path} is for other classes than the run's; {again}")
    try:
        same = layout.weights.stat().st_size == size and file_record(layout.weights).crc32 == crc32
    except OSError as error:
        raise UserError(f"{layout.weights} cannot be read: {error.strerror}") from error
    if not same:
        raise UserError(f"{path} was made for other weights than {layout.weights.name} holds now; {again}")
    return SavedDecisions(decisions, options, split, record)
