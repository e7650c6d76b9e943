"""`spml-fast calibrate RUN [--thresholds f1|precision] [--calibration ...]`: when a run says that a class is there."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spml_fast.cli import common
from spml_fast.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from spml_fast.evaluation.decisions import DecisionOptions

DESCRIPTION = """Choose a threshold for every class, and fit how logits become probabilities, on the known labels of a
validation split. They are kept in the run directory, for the weights that it has now, and used by predict, evaluate,
export, report and spml_fast.load. Starts under `deepspeed` and `torchrun` as well.

Training chooses the thresholds of the highest F1 by itself, without a calibration; this command chooses others."""
EXAMPLES = [
    ("RUN", "the highest F1, and a scale and shift per class"),
    ("RUN --thresholds precision --precision 0.9", "nine of ten predictions right, as many as that allows"),
    ("RUN --calibration none", "thresholds alone: probabilities stay as they are"),
]
# Classes that are named in a cell.
LISTED = 10


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("calibrate", "RUN [OPTIONS]", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; its best weights are used")
    parser.add_argument(
        "--thresholds",
        choices=("f1", "precision"),
        default="f1",
        help="f1: the highest F1 of each class; precision: the highest recall with a precision of --precision or more "
        "(default: %(default)s)",
    )
    parser.add_argument("--precision", type=float, metavar="P", help="fraction (0 to 1) of predictions that are right")
    parser.add_argument(
        "--calibration",
        choices=("none", "temperature", "per-class"),
        default="per-class",
        help="none: probabilities are the sigmoid of the logits; temperature: of the logits divided by one number; "
        "per-class: of a scale and a shift for every class, drawn towards those of all classes (default: %(default)s)",
    )
    parser.add_argument(
        "--min-labels",
        type=int,
        default=10,
        metavar="N",
        help="known positives, and negatives, that a class needs for a threshold of its own; others take that of all "
        "classes together (default: %(default)s)",
    )
    parser.add_argument("--split", help="split to choose on; default the run's validation split")
    common.add_alpha(parser)
    common.add_batch_size(parser)
    return common.parse(parser, argv)


def figure_text(value: float | None) -> str:
    """A figure in per cent; a dash where it is not defined."""
    return "-" if value is None else f"{value:.1f}"


def threshold_text(value: float | None) -> str:
    """A threshold as a probability."""
    return "never" if value is None else f"{value:.3f}"


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of classes: threshold, what it reaches, and the labels that it stands on."""
    head = ["class", "threshold", "F1", "precision", "recall", "positive", "negative", ""]
    rows = []
    for row in [{"class": "(all classes)", "from": ""} | record["pooled"], *record["classes"]]:
        cells = [row["class"], threshold_text(row["threshold_probability"])]
        cells += [figure_text(row[name]) for name in ("f1", "precision", "recall")]
        cells += [f"{row['positives']:,}", f"{row['negatives']:,}"]
        rows.append([*cells, "of all classes" if row["from"] == "pooled" else ""])
    return head, rows


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What was fitted, for people."""
    calibration = record["calibration"]
    before, after = calibration["before"], calibration.get("after", calibration["before"])
    rows = [("calibration", calibration["kind"])]
    if calibration["kind"] == "temperature":
        rows.append(("temperature", f"{1 / record['classes'][0]['scale']:.3f}"))
    name = "expected_calibration_error"
    error = f"{before[name]:.2f}" if after is before else f"{before[name]:.2f} before, {after[name]:.2f} after"
    rows.append(("expected calibration error on the same labels, %", error))
    few = [row["class"] for row in record["classes"] if row["from"] == "pooled"]
    never = [row["class"] for row in record["classes"] if row["threshold_probability"] is None]
    notes = {
        "too few known labels; threshold of all classes": few,
        "never predicted; no threshold is that precise": never,
    }
    for note, names in notes.items():
        if names:
            rows.append(
                (note, ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if names[LISTED:] else ""))
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Choose, write and print."""
    args = parse(argv)
    common.check_at_least_one(args, "batch_size", "min_labels")
    common.check_alpha(args.alpha)
    from spml_fast.evaluation.decisions import DecisionOptions

    options = DecisionOptions(args.thresholds, args.precision, args.calibration, args.min_labels)
    with common.ranks() as device:
        calibrate(args, options, device)
    return 0


def calibrate(args: argparse.Namespace, options: DecisionOptions, device: torch.device) -> None:
    """The same on this rank.

    Args:
        args: the command line, checked.
        options: how to choose.
        device: this rank's.
    """
    from spml_fast.core.io import file_record
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.decisions import make_decisions, score_known
    from spml_fast.runs.open import RunContext, make_eval_loader
    from spml_fast.training.console import print_columns, print_table

    run = RunContext(args.run, device)
    name = args.split or run.config.data.val_split
    if name is None or (args.split is None and name not in run.manifest.splits):
        raise UserError(f"{args.run} has no validation split; name a split with --split, one that training did not see")
    split = run.split(name)
    # Before the weights are read: a training may replace them while they are judged.
    weights = file_record(run.layout.weights)
    alpha = run.classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], run.classifier, run.config)
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, alpha_eval=alpha))
    if args.batch_size is not None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=args.batch_size))
    loader = make_eval_loader(config, split, run.classifier, device)
    scores = score_known(run.classifier, loader, split, config, f"scoring the {split.name} split")
    saved = make_decisions(scores, split, run.layout, alpha, options, run.classes, weights)
    title = f"{split.name}, alpha {alpha:g}, {len(split)} images"
    print_columns(title, *table(saved.record))
    print_table(f"{run.layout.decisions}", summary_rows(saved.record))
