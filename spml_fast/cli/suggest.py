"""`spml-fast suggest --run RUN [--split train] [--csv OUT]`: which labels are probably missing or wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import SUGGESTION_COLUMNS

if TYPE_CHECKING:
    import torch

    from spml_fast.analysis.suggest import Suggestions
    from spml_fast.core.outputs import OutputFile
    from spml_fast.data.manifest import Split

DESCRIPTION = """Rank the unknown pairs (image, class) of a split that the model is most sure are positive, and the
observed labels that it contradicts most. Where the data set holds labels that training did not see, the precision of
the suggestions is printed. Starts under `deepspeed` and `torchrun` as well; the lists do not depend on the number of
ranks."""
EXAMPLES = [
    ("--run RUN", "of the training split"),
    ("--run RUN --csv suggestions.csv", "a table to correct labels from"),
    ("--run RUN --split val --per-class 20", "the surest 20 of each class"),
]
TOP = 100
# Rows of a list that are shown where a file holds them all.
SHOWN = 10


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("suggest", "--run RUN [OPTIONS]", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument("--split", help="split to look at; default the run's training split")
    parser.add_argument(
        "--top",
        type=int,
        metavar="N",
        help=f"pairs of each of the three lists; default {TOP}, or no limit with --per-class",
    )
    parser.add_argument("--per-class", type=int, metavar="N", help="of these, pairs of each class")
    parser.add_argument(
        "--min-probability",
        type=float,
        default=0.5,
        metavar="P",
        help="suggest labels that the model gives at least this probability (0 to 1; default: %(default)s)",
    )
    common.add_alpha(parser)
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="OUT",
        help=f"write path, class, known, probability, suggestion to this file; the screen then shows {SHOWN} a list",
    )
    common.add_overwrite(parser)
    common.add_batch_size(parser)
    return common.parse(parser, argv)


def check(args: argparse.Namespace) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_at_least_one(args, "top", "per_class", "batch_size")
    if not 0 <= args.min_probability < 1:
        raise UserError(f"--min-probability is {args.min_probability:g}; it must be at least 0 and less than 1")
    common.check_alpha(args.alpha)


def show(found: Suggestions, split: Split, classes: Sequence[str], limit: int | None) -> None:
    """Print a list.

    Args:
        found: the list.
        split: that it is about.
        classes: class names in class-id order.
        limit: pairs to print at most; None for all of them.
    """
    from spml_fast.analysis import suggest
    from spml_fast.training.console import print_table

    if len(found) == 0:
        return
    print(printable(suggest.title(found, split)))
    for path, name, _, probability, label in suggest.suggestion_rows(found, split, classes)[:limit]:
        print(f"  {probability:.3f}  {printable(name)}: {label}?  {printable(path)}")
    if split.hides_labels:
        print_table("against the labels that training did not see", suggest.truth_rows(found, split))


def main(argv: list[str] | None = None) -> int:
    """Rank and print."""
    args = parse(argv)
    check(args)
    # Told before the pass over the split, which may take hours.
    table = common.output_file(args, "csv", "csv", ",".join(SUGGESTION_COLUMNS))
    with common.ranks() as device:
        find(args, table, device)
    return 0


def find(args: argparse.Namespace, table: OutputFile | None, device: torch.device) -> None:
    """The same on this rank.

    Args:
        args: the command line, checked.
        table: where the lists go.
        device: this rank's.
    """
    from spml_fast.analysis import suggest
    from spml_fast.core import distributed
    from spml_fast.core.progress import show_progress
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.open import load_run, make_eval_loader

    common.print_any_text()
    config, manifest, classifier, _ = load_run(args.run, device)
    batch_size = args.batch_size or config.eval.batch_size
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch_size))
    split = manifest.split(args.split or config.data.train_split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} of {manifest.folder} has no images")
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    loader = make_eval_loader(config, split, classifier, device)
    with contextlib.ExitStack() as stack:
        # Of this rank's images.
        advance = stack.enter_context(
            show_progress(len(split) // distributed.world_size(), "looking", distributed.is_main())
        )
        lists = suggest.find_suggestions(
            classifier,
            loader,
            split.observed,
            alpha=alpha,
            precision=config.train.precision,
            classes=manifest.classes,
            top=args.top or (TOP if args.per_class is None else None),
            per_class=args.per_class,
            min_probability=args.min_probability,
            advance=advance,
        )
    if lists is not None:
        for found in lists:
            show(found, split, manifest.classes, None if table is None else SHOWN)
        if not any(len(found) for found in lists):
            print(f"no suggestion of probability {args.min_probability:g} or more; lower --min-probability to see more")
        if table is not None:
            table.check()
            count = suggest.write_suggestions(args.csv, lists, split, manifest.classes)
            print(f"{printable(str(args.csv))}: {count} suggestions")
