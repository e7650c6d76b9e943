"""`spml-fast predict --run RUN IMAGE_OR_DIR ... [--top K] [--csv OUT]`: use a trained run on new images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import CALIBRATED_COLUMNS, PREDICTION_COLUMNS

if TYPE_CHECKING:
    from spml_fast.analysis.explain import Explained
    from spml_fast.analysis.fiftyone_folder import FiftyOneFolder
    from spml_fast.analysis.predict import Prediction, PredictionTable
    from spml_fast.core.config import Config
    from spml_fast.data.image_files import ImageFiles
    from spml_fast.data.manifest import Split
    from spml_fast.evaluation.decisions import Decisions
    from spml_fast.models.classifier import Classifier

DESCRIPTION = """Print a line an image: the classes above the run's thresholds (`spml-fast calibrate`) or, where it has
none, the most probable ones, with their probabilities. The run directory is enough; its data set is not needed. Images
that cannot be read are named on standard error and left out, and the exit status is then 1."""
EXAMPLES = [
    ("--run RUN photos/", "the classes that the run says are there"),
    ("--run RUN photos/ --top 3", "the three most probable classes of each image"),
    ("--run RUN a.jpg b.jpg --threshold 0.5", "all classes of probability 0.5 or more"),
    ("--run RUN photos/ --csv classes.csv", "a table for a program"),
    ("--run RUN --split test --fiftyone look --maps 2", "a data set of FiftyOne, with labels and maps"),
]
TOP = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("predict", "--run RUN [OPTIONS] IMAGE_OR_DIR ...", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE_OR_DIR", help="image files, and directories to search with all below"
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help=f"the K most probable classes of an image; default those above the run's thresholds, {TOP} where it has "
        "none, or all of them with --threshold",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="show classes of probability P (0 to 1) or more only, in place of the run's thresholds",
    )
    parser.add_argument("--no-decisions", action="store_true", help="leave the run's thresholds and calibration aside")
    common.add_alpha(parser)
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="write path, class, probability and rank to this file, not the screen"
    )
    parser.add_argument(
        "--fiftyone",
        type=Path,
        metavar="DIR",
        help="write images and predictions as a data set of FiftyOne to this new folder, not to the screen",
    )
    parser.add_argument(
        "--maps", type=int, metavar="K", help="--fiftyone: heat maps of the K most probable classes of each image too"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="--fiftyone: the images of this split of the run's data set, with their labels"
    )
    common.add_overwrite(parser)
    common.add_batch_size(parser)
    common.add_orientation(parser)
    return common.parse(parser, argv)


def check(args: argparse.Namespace) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_one_process("predict", ", with its own images for each process")
    common.check_at_least_one(args, "top", "batch_size", "maps")
    if args.fiftyone is None and (args.maps is not None or args.split is not None):
        raise UserError("--maps and --split are for --fiftyone DIR")
    if args.fiftyone is not None and args.csv is not None:
        raise UserError("--csv and --fiftyone are two ways to write; give one of them")
    if args.split is not None and args.images:
        raise UserError("--split takes the images of the data set; leave the other images out, or --split")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}; it is a probability and must lie between 0 and 1")
    common.check_alpha(args.alpha)


def shown_classes(args: argparse.Namespace, decided: bool) -> tuple[int | None, float | None]:
    """How many classes of an image are shown (None: all), and from which probability (None: each from its own).

    Args:
        args: the command line.
        decided: the run has thresholds that are used.
    """
    if args.top is None and args.threshold is None:
        return (None, None) if decided else (TOP, 0.0)
    return args.top, args.threshold or 0.0


def usable_files(args: argparse.Namespace, paths: list[str], max_pixels: int) -> ImageFiles:
    """The images that can be read; the others are named on standard error.

    Args:
        args: the command line.
        paths: of all images.
        max_pixels: width x height of the largest image that is decoded.
    """
    import numpy as np

    from spml_fast.analysis.predict import left_out
    from spml_fast.data.image_check import check_images, choose_level
    from spml_fast.data.image_files import ImageFiles

    verified = check_images(len(paths), paths.__getitem__, choose_level(None, len(paths)), max_pixels=max_pixels)
    for index, why in verified.rejected.items():
        common.say(left_out(paths[index], *why))
    usable = np.flatnonzero(verified.ok)
    orientation = verified.orientation[usable] if args.orientation == "exif" else np.ones(len(usable), np.uint8)
    return ImageFiles([paths[i] for i in usable], orientation)


def write_out(
    predictions: Iterable[Prediction],
    table: PredictionTable | FiftyOneFolder | None,
    line: Callable[[Prediction], str],
    advance: Callable[[int], None],
) -> int:
    """Write predictions as they come; those that the loader refused are named on standard error.

    Args:
        predictions: of every image, in order.
        table: rows go there; None prints a line each.
        line: an image's line.
        advance: called with 1 after each image.

    Returns:
        How many images were predicted.
    """
    from spml_fast.analysis.predict import left_out

    done = 0
    for prediction in predictions:
        advance(1)
        if prediction.reason is not None:
            common.say(left_out(prediction.path, prediction.reason))
            continue
        done += 1
        if table is not None:
            table.add(prediction)
        else:
            print(line(prediction), flush=True)
    return done


def split_files(args: argparse.Namespace, config: Config, stack: contextlib.ExitStack) -> tuple[ImageFiles, Split]:
    """The images of `--split`, which `prepare` has checked, and the split.

    Args:
        args: the command line.
        config: the run's.
        stack: keeps what lay in tar shards unpacked.
    """
    from spml_fast.analysis.explain import Choice
    from spml_fast.analysis.explain_samples import sample_files
    from spml_fast.runs.open import open_run_data

    split = open_run_data(args.run, config).split(args.split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} has no images; name another with --split")
    files, _ = sample_files(split, [Choice(index, "") for index in range(len(split))], stack)
    return files, split


def write_fiftyone(
    args: argparse.Namespace,
    folder: FiftyOneFolder,
    paths: Sequence[str],
    files: ImageFiles,
    classifier: Classifier,
    config: Config,
    classes: Sequence[str],
    alpha: float,
) -> None:
    """Write the folder, with maps where they are asked for.

    Args:
        args: the command line.
        folder: with a prediction for each image that could be used.
        paths: of `files`.
        files: the images.
        classifier: on its device, in eval mode.
        config: the run's.
        classes: class names in class-id order.
        alpha: BoostLU's factor of the logits by which classes are chosen for maps.
    """
    from spml_fast.analysis.explain import explain

    maps: Iterator[Explained] = iter(())
    if args.maps is not None:
        device = next(classifier.parameters()).device
        maps = explain(classifier, config, files, device, alpha=alpha, classes=classes, top=args.maps)
    folder.write(paths, maps)


def closing_line(args: argparse.Namespace, table: PredictionTable | FiftyOneFolder, done: int) -> str:
    """What was written."""
    if args.fiftyone is not None:
        return f"{printable(str(args.fiftyone))}: {done} samples, for fiftyone.types.LegacyFiftyOneDataset"
    return f"{printable(str(args.csv))}: {cast('PredictionTable', table).rows} rows for {done} images"


def load(args: argparse.Namespace) -> tuple[Config, list[str], Classifier, float, Decisions | None]:
    """The run's configuration, class names, classifier on the CPU, and BoostLU's factor and decisions that are used."""
    import torch

    from spml_fast.analysis.predict import usable_decisions
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.decisions import load_decisions
    from spml_fast.runs.open import load_classifier, load_run_config, run_classes

    config = load_run_config(args.run)
    classes = run_classes(args.run, config)
    classifier, _ = load_classifier(args.run, config, len(classes), torch.device("cpu"))
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    saved = None if args.no_decisions else load_decisions(args.run, classes)
    decisions = None if saved is None else usable_decisions(saved.decisions, alpha, common.say)
    return config, classes, classifier, alpha, decisions


def main(argv: list[str] | None = None) -> int:
    """Predict and print, or write; 1 if an image was left out."""
    args = parse(argv)
    check(args)
    marks = "\n".join(",".join(columns) for columns in (PREDICTION_COLUMNS, CALIBRATED_COLUMNS))
    out = common.output_file(args, "csv", "csv", marks)
    from spml_fast.analysis import predict
    from spml_fast.analysis.fiftyone_folder import FiftyOneFolder
    from spml_fast.core.progress import show_progress
    from spml_fast.data.image_files import find_images

    common.print_any_text()
    config, classes, classifier, alpha, decisions = load(args)
    paths = find_images(args.images, lambda text: common.say(f"note: {text}")) if args.split is None else []
    top, threshold = shown_classes(args, decisions is not None)
    calibrated = decisions is not None and decisions.calibrated
    table: PredictionTable | FiftyOneFolder | None = None
    with contextlib.ExitStack() as stack:
        if out is not None:
            table = stack.enter_context(predict.PredictionTable(out, classes, calibrated))
        split = None
        if args.split is not None:
            files, split = split_files(args, config, stack)
            paths = list(files.paths)
        if args.fiftyone is not None:
            table = FiftyOneFolder(args.fiftyone, classes, split)
        # Processes are forked to check images, so the GPU is touched after that.
        if split is None:
            files = usable_files(args, paths, config.data.max_pixels)
        batch_size = max(1, min(args.batch_size or config.eval.batch_size, len(files)))
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch_size))
        device = common.default_device()
        predictions = predict.predict(
            classifier.to(device),
            config,
            files,
            device,
            alpha=alpha,
            classes=classes,
            top=top,
            threshold=threshold,
            decisions=decisions,
        )
        width = predict.path_width(files.paths) if len(files) else 0
        line = functools.partial(predict.prediction_line, classes=classes, threshold=threshold, width=width)
        # Lines that come to the screen tell how far it is.
        quiet = table is None and sys.stdout.isatty()
        advance = stack.enter_context(show_progress(len(files), "predicting", not quiet))
        done = write_out(predictions, table, line, advance)
        if done == 0:
            raise UserError(f"none of the {len(paths)} images can be used; the reasons stand above")
        if isinstance(table, FiftyOneFolder):
            write_fiftyone(args, table, files.paths, files, classifier, config, classes, alpha)
    missing = len(paths) - done
    lost = f"{missing} of {len(paths)} images left out; the reasons stand above"
    if table is not None:
        print(closing_line(args, table, done) + (f"; {lost}" if missing else ""))
    elif missing:
        common.say(lost)
    return 1 if missing else 0
