"""`spml-fast evaluate --run RUN [--alpha A ...] [--split test] [--json OUT]`: metrics of a run's best weights."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import writer_name

if TYPE_CHECKING:
    import torch

    from spml_fast.core.config import Config
    from spml_fast.core.outputs import OutputFile
    from spml_fast.evaluation.decisions import Decisions

DESCRIPTION = """Evaluate a run's best weights on a split. Starts under `deepspeed` and `torchrun` as well; the numbers
do not depend on the number of ranks."""
EXAMPLES = [
    ("--run RUN", "the test split"),
    ("--run RUN --alpha 1 5 --json out.json", "BoostLU's alpha is free at inference"),
    ("--run RUN --split val --definition voc", "another split and definition"),
    ("--run RUN --record", "and what the report needs of a run of an earlier version"),
]
Definition = Literal["sklearn", "rank", "voc"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("evaluate", "--run RUN [OPTIONS]", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument("--alpha", type=float, nargs="+", help="BoostLU factors; default 1 and the run's alpha_eval")
    parser.add_argument("--split", help="split to evaluate; default the run's test split")
    parser.add_argument("--definition", choices=("sklearn", "rank", "voc"), help="average precision; default the run's")
    common.add_batch_size(parser)
    parser.add_argument("--per-class", action="store_true", help="also show the average precision of every class")
    parser.add_argument("--json", type=Path, help="write all metrics to this file")
    parser.add_argument(
        "--record",
        action="store_true",
        help="also make the run's record of its test again, of which its report shows curves, confusions and mistakes",
    )
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def with_options(config: Config, definition: Definition | None, batch_size: int | None) -> Config:
    """The run's configuration with what the command line says otherwise."""
    section = config.eval
    if definition is not None:
        section = dataclasses.replace(section, definition=definition)
    if batch_size is not None:
        section = dataclasses.replace(section, batch_size=batch_size)
    return dataclasses.replace(config, eval=section)


def usable_decisions(run: Path, classes: list[str]) -> Decisions | None:
    """The run's thresholds and calibration; None where it has none for its weights, of which a note tells."""
    from spml_fast.runs.decisions import load_decisions

    try:
        saved = load_decisions(run, classes)
    except UserError as error:
        # All other figures are as good without them.
        common.say(f"note: without the run's thresholds: {error}")
        return None
    return None if saved is None else saved.decisions


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print."""
    args = parse(argv)
    common.check_at_least_one(args, "batch_size")
    if args.record and (args.split is not None or args.alpha is not None):
        raise UserError("--record is of the run's test split at its own alpha; leave out --split and --alpha")
    out = common.output_file(args, "json", "json", writer_name("evaluate"))
    with common.ranks() as device:
        evaluate(args, out, device)
    return 0


def evaluate(args: argparse.Namespace, out: OutputFile | None, device: torch.device) -> None:
    """The same on this rank.

    Args:
        args: the command line, checked.
        out: where the metrics go.
        device: this rank's.
    """
    from spml_fast.core import distributed
    from spml_fast.evaluation.evaluate import class_groups, class_rows, evaluate_split, table_rows
    from spml_fast.runs.evaluation_record import Recorder, headline_alpha, write_evaluation
    from spml_fast.runs.layout import RunLayout
    from spml_fast.runs.open import load_run, make_eval_loader
    from spml_fast.training.console import print_columns, print_table

    config, manifest, classifier, _ = load_run(args.run, device)
    config = with_options(config, args.definition, args.batch_size)
    split = manifest.split(args.split or config.data.test_split or config.data.train_split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} of {manifest.source} has no images")
    alphas = args.alpha or sorted({1.0, config.model.alpha_eval})
    loader = make_eval_loader(config, split, classifier, device)
    saved = distributed.from_main(lambda: usable_decisions(args.run, manifest.classes))
    groups = class_groups(manifest, config)
    task = f"evaluating the {split.name} split"
    classes = manifest.classes
    recorder = Recorder(split, headline_alpha(alphas, config), config, classes, saved)
    looks = {"look": recorder.look} if args.record else {}
    found = evaluate_split(classifier, loader, split, alphas, config, classes, groups, saved, task, **looks)
    if distributed.is_main():
        # Shown first: a file that cannot be written takes no figure away.
        for alpha in alphas:
            boost = "plain" if alpha == 1 else f"BoostLU x{alpha:g}"
            print_table(f"{split.name}, {boost} (alpha {alpha:g}), {len(split):,} images", table_rows(found[alpha]))
        if args.per_class:
            names = ["class", "positive", "known", *(f"AP, alpha {alpha:g}" for alpha in alphas)]
            rows = class_rows({a: found[a] for a in alphas}, split.known, manifest.classes)
            print_columns(f"{split.name}, average precision by class", names, rows)
        report = {"split": split.name, "alpha": {f"{a:g}": found[a] for a in alphas}, "classes": manifest.classes}
        if out is not None:
            out.write_json(report)
        if recorder.record is not None:
            write_evaluation(RunLayout(args.run), recorder.record)
