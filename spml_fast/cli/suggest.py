"""`spml-fast suggest --run RUN [--split train] [--csv OUT]`: which labels are probably missing or wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import SUGGESTION_COLUMNS

if TYPE_CHECKING:
    import torch

    from spml_fast.analysis.folds import Folds
    from spml_fast.analysis.suggest import Suggestions
    from spml_fast.core.config import Config
    from spml_fast.core.outputs import OutputFile
    from spml_fast.data.manifest import Manifest, Split
    from spml_fast.models.classifier import Classifier

    # Lists (None on ranks other than 0), the split that they are about, and its data set.
    Found = tuple[list[Suggestions] | None, Split, Manifest]

DESCRIPTION = """Rank the unknown pairs (image, class) of a split that the model is most sure are positive, and the
observed labels that it contradicts most. Where the data set holds labels that training did not see, the precision of
the suggestions is printed. With --folds K the training images are judged by K runs that have not seen them, which are
trained as the run was; stopped and started again, finished ones are kept. Starts under `deepspeed` and `torchrun` as
well; the lists do not depend on the number of ranks. --page makes a page on which somebody accepts and rejects the
suggestions by keyboard, with images and maps; its decisions.csv is what `relabel` reads."""
EXAMPLES = [
    ("--run RUN", "of the training split"),
    ("--run RUN --csv suggestions.csv", "a table to correct labels from"),
    ("--run RUN --page review.html", "a page to decide on, in one file; a folder for many"),
    ("--run RUN --folds 5 --csv suggestions.csv", "judged by models that have not seen the images"),
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
        "--folds",
        type=int,
        metavar="K",
        help="train K runs as the run was, each without a part of the images, which it then judges; takes K - 1 times "
        "as long as the run did",
    )
    parser.add_argument(
        "--folds-dir", type=Path, metavar="DIR", help="where these runs go and are found again; default RUN/folds-K"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="OUT",
        help=f"write {', '.join(SUGGESTION_COLUMNS)} to this file; with it or --page the screen shows {SHOWN} a list",
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="OUT",
        help="write a page to review the suggestions on: a file named .html, or a folder for many, which "
        "`spml-fast review` serves too",
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
    if args.folds_dir is not None and args.folds is None:
        raise UserError("--folds-dir is for --folds K")
    if args.top is None and args.per_class is None:
        args.top = TOP
    if args.page is not None:
        from spml_fast.analysis.review.make import check_page

        most = args.top
        if most is None:
            from spml_fast.runs.open import load_run_config, run_classes

            most = args.per_class * len(run_classes(args.run, load_run_config(args.run)))
        check_page(args.page, most, args.overwrite)


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
    for path, name, _, probability, label, *_ in suggest.suggestion_rows(found, split, classes)[:limit]:
        print(f"  {probability:.3f}  {printable(name)}: {label}?  {printable(path)}")
    if split.hides_labels:
        print_table("against the labels that training did not see", suggest.truth_rows(found, split))


def alpha_of(args: argparse.Namespace, classifier: Classifier, config: Config) -> float:
    """The BoostLU factor of the probabilities. `UserError` for one that the head does not take."""
    from spml_fast.evaluation.evaluate import check_alphas

    alpha: float = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    return alpha


def judge(
    args: argparse.Namespace, config: Config, classifier: Classifier, split: Split, classes: Sequence[str], word: str
) -> list[Suggestions] | None:
    """The lists of one model about a split (collective); None on ranks other than 0.

    Args:
        args: the command line.
        config: of the model's run.
        classifier: in eval mode.
        split: to judge.
        classes: class names in class-id order.
        word: of the progress line.
    """
    from spml_fast.analysis import suggest
    from spml_fast.core import distributed
    from spml_fast.core.progress import show_progress
    from spml_fast.runs.open import make_eval_loader

    device = next(classifier.parameters()).device
    with contextlib.ExitStack() as stack:
        # Of this rank's images.
        count = len(split) // distributed.world_size()
        advance = stack.enter_context(show_progress(count, word, distributed.is_main()))
        return suggest.find_suggestions(
            classifier,
            make_eval_loader(config, split, classifier, device),
            split.observed,
            alpha=alpha_of(args, classifier, config),
            precision=config.train.precision,
            classes=classes,
            top=args.top,
            per_class=args.per_class,
            min_probability=args.min_probability,
            advance=advance,
        )


def by_run(args: argparse.Namespace, device: torch.device) -> Found:
    """The run judges a split by itself (collective)."""
    from spml_fast.runs.open import load_run

    config, manifest, classifier, _ = load_run(args.run, device)
    config = with_batch_size(config, args.batch_size)
    split = manifest.split(args.split or config.data.train_split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} of {manifest.source} has no images")
    lists = judge(args, config, classifier, split, manifest.classes, f"judging the {split.name} split")
    if lists is not None:
        lists = [dataclasses.replace(found, runs=(str(args.run),)) for found in lists]
    return lists, split, manifest


def by_folds(args: argparse.Namespace, device: torch.device) -> Found:
    """Runs that have not seen the images judge them (collective); trains those that are not there."""
    from spml_fast.analysis import folds as fold_runs
    from spml_fast.analysis.suggest import merge_lists
    from spml_fast.core import distributed
    from spml_fast.runs.open import load_run_config, open_run_data

    config = load_run_config(args.run)
    if args.split not in (None, config.data.train_split):
        raise UserError(
            f"--folds is about the training split; the run has not seen {args.split}: leave --folds out to judge it"
        )
    manifest = open_run_data(args.run, config)
    make = functools.partial(fold_runs.make_folds, args.run, config, manifest, args.folds, args.folds_dir)
    # Written on rank 0; the others find it there.
    distributed.from_main(lambda: make() is None)
    folds = make()
    if distributed.is_main():
        for line in fold_runs.cost(folds, args.run):
            print(printable(line), flush=True)
    parts, runs = [], [str(folds.layout.run(k).folder) for k in range(folds.number)]
    for k in range(folds.number):
        if not distributed.from_main(functools.partial(fold_runs.prepare_fold, folds, k)):
            if distributed.is_main():
                print(f"fold {k + 1} of {folds.number}", flush=True)
            train(folds.config_of(k), device)
        parts.append(_judge_fold(args, folds, k, device))
    if any(part is None for part in parts):
        return None, folds.split, manifest
    rows = [folds.rows(k) for k in range(folds.number)]
    found = merge_lists([part for part in parts if part is not None], rows, runs, args.top, args.per_class)
    return found, folds.split, manifest


def train(config: Config, device: torch.device) -> None:
    """One run, in this process. `Interrupted` after a signal, when it has saved."""
    from spml_fast.training.trainer import Trainer

    Trainer(config, device, program=True).run()


def _judge_fold(args: argparse.Namespace, folds: Folds, k: int, device: torch.device) -> list[Suggestions] | None:
    from spml_fast.analysis.folds import HELD
    from spml_fast.runs.open import load_run

    config, manifest, classifier, _ = load_run(folds.layout.run(k).folder, device)
    config = with_batch_size(config, args.batch_size)
    return judge(
        args, config, classifier, manifest.split(HELD), manifest.classes, f"judging fold {k + 1} of {folds.number}"
    )


def with_batch_size(config: Config, batch_size: int | None) -> Config:
    """The run's options with `--batch-size`."""
    if batch_size is None:
        return config
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch_size))


def main(argv: list[str] | None = None) -> int:
    """Rank and print."""
    args = parse(argv)
    check(args)
    # Told before the pass over the split, which may take hours.
    table = common.output_file(args, "csv", "csv", ",".join(SUGGESTION_COLUMNS))
    with common.ranks() as device:
        status, found = find(args, table, device)
    # Pictures are one process's work, which the others need not wait for.
    if found is not None and args.page is not None:
        _draw(args, found, device)
    return status


def _draw(args: argparse.Namespace, found: Found, device: torch.device) -> None:
    from spml_fast.analysis.review.make import make_page

    lists, split, manifest = found
    if lists is not None:
        for line in make_page(args.page, args.run, lists, split, manifest, device, args.batch_size, args.overwrite):
            print(line)


def find(args: argparse.Namespace, table: OutputFile | None, device: torch.device) -> tuple[int, Found | None]:
    """The same on this rank; returns the exit status, and what was found (None after a signal).

    Args:
        args: the command line, checked.
        table: where the lists go.
        device: this rank's.
    """
    from spml_fast.core import distributed
    from spml_fast.training.signals import Interrupted

    common.print_any_text()
    try:
        found = by_run(args, device) if args.folds is None else by_folds(args, device)
    except Interrupted as stop:
        if distributed.is_main():
            common.say(f"{stop} (exit status {stop.status}). Or start this command again: finished folds are kept.")
        return stop.status, None
    lists, split, manifest = found
    if lists is not None:
        report(args, table, lists, split, manifest.classes)
    return 0, found


def report(
    args: argparse.Namespace,
    table: OutputFile | None,
    lists: Sequence[Suggestions],
    split: Split,
    classes: Sequence[str],
) -> None:
    """Print the lists and write them.

    Args:
        args: the command line.
        table: where they go; None for the screen alone.
        lists: one for each observed label.
        split: that they are about.
        classes: class names in class-id order.
    """
    from spml_fast.analysis import suggest
    from spml_fast.runs.open import load_run_config

    for found in lists:
        show(found, split, classes, None if table is None and args.page is None else SHOWN)
    if not any(len(found) for found in lists):
        print(f"no suggestion of probability {args.min_probability:g} or more; lower --min-probability to see more")
    if table is not None:
        table.check()
        count = suggest.write_suggestions(args.csv, lists, split, classes)
        print(f"{printable(str(args.csv))}: {count} suggestions")
    if args.folds is None and split.name == load_run_config(args.run).data.train_split:
        print(
            "the run was trained on these images, and hardly contradicts what it has learned; --folds 5 has them "
            "judged by models that have not seen them"
        )
