"""Thresholds of the classes at the end of a run, chosen on its validation split."""

from __future__ import annotations

from collections.abc import Callable

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text
from spml_fast.core.text import parse_json
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Split
from spml_fast.evaluation.decisions import DecisionOptions, Decisions
from spml_fast.models.classifier import Classifier
from spml_fast.runs.decisions import FORMAT, load_decisions, make_decisions, score_known
from spml_fast.runs.layout import RunLayout


def decide(
    classifier: Classifier,
    loader: EvalLoader | None,
    split: Split | None,
    layout: RunLayout,
    config: Config,
    classes: list[str],
    say: Callable[[str], None],
) -> Decisions | None:
    """The run's decisions for its best weights, on every rank (collective).

    Those that are there for these weights are kept. Others are made anew, as they were made before: by default the
    thresholds of the highest F1, and no calibration.

    Args:
        classifier: with the best weights.
        loader: this rank's batches of the validation split, or None.
        split: the validation split, or None.
        layout: the run's.
        config: the run's.
        classes: class names in class-id order.
        say: prints a line.

    Returns:
        None without a validation split, or where its labels do not tell; `say` then has the reason.
    """
    kept, options = distributed.from_main(lambda: _before(layout, classes))
    if options is None:
        say(f"{layout.decisions} is of another version of this program; it is left as it is, and not used")
        return None
    if kept is not None or split is None or loader is None:
        return kept
    # What one rank alone cannot read ends all of them; only what all refuse together leaves 0.5 in place.
    scores = score_known(classifier, loader, split, config, "scoring for thresholds")
    try:
        saved = make_decisions(scores, split, layout, config.model.alpha_eval, options, classes)
    except UserError as error:
        # The run has its weights and gets its test figures; 0.5 stands.
        say(f"no thresholds of classes were chosen on split {split.name}: {error}")
        return None
    pooled = sum(row["from"] == "pooled" for row in saved.record["classes"])
    few = f"; {pooled} of {len(classes)} classes, with few known labels, take the pooled one" if pooled else ""
    say(f"thresholds of classes ({options.thresholds} on split {split.name}): {layout.decisions.name}{few}")
    return saved.decisions


def _before(layout: RunLayout, classes: list[str]) -> tuple[Decisions | None, DecisionOptions | None]:
    """The decisions that are there for the run's weights, and how those that are there were made.

    Without options where the file is of a format that this version does not know: that one is not replaced.
    """
    try:
        saved = load_decisions(layout.folder, classes)
        if saved is not None:
            return saved.decisions, saved.options
    except UserError:
        # Weights have changed since, or the file is damaged: it is replaced.
        try:
            values = parse_json(read_text(layout.decisions))
            if values["format"] != FORMAT:
                return None, None
            return None, DecisionOptions(**values["options"])
        except (UserError, ValueError, KeyError, TypeError):
            return None, DecisionOptions()
    return None, DecisionOptions()
