"""Use a trained run on new images: `python launch/predict.py --run RUN IMAGE_OR_DIR ... [--top K] [--csv OUT]`.

Prints a line an image: its most probable classes with their probabilities. The run directory is enough; its data set
is not needed. Images that cannot be read are named on standard error and left out, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from spml_fast.core.errors import UserError, run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

TOP = 5
# Fewer images are checked before a progress bar could be read.
PROGRESS_FROM = 256


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="run directory; its best weights are used")
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE_OR_DIR", help="image files, and directories to search with all below"
    )
    parser.add_argument(
        "--top", type=int, metavar="K", help=f"classes an image; default {TOP}, or all of them with --threshold"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="show classes of probability P (0 to 1) or more only"
    )
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="BoostLU factor, 1 for none; default the run's model.alpha_eval"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="write path, class, probability and rank to this file, not the screen"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a forward; default the run's")
    parser.add_argument(
        "--orientation",
        choices=("exif", "ignore"),
        default="exif",
        help="exif: turn images as their EXIF data say; ignore: take the pixels as they are stored "
        "(default: %(default)s)",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    # Options may stand between the images.
    return parser.parse_intermixed_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for what makes no sense."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("predict.py works in one process; start it with python, with its own images for each process")
    if args.top is not None and args.top < 1:
        raise UserError(f"--top is {args.top}; it must be at least 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}; it is a probability and must lie between 0 and 1")
    if args.alpha is not None and not 0 < args.alpha < float("inf"):
        raise UserError(f"--alpha is {args.alpha:g}; it must be greater than 0 and finite (1 turns boosting off)")
    if args.csv is not None and str(args.csv) == "-":
        raise UserError("--csv - is not supported; leave --csv out to see the classes on the screen")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Predict and print, or write; 1 if an image was left out."""
    args = parse(argv)
    check(args)
    import contextlib
    import io

    import numpy as np
    import torch

    from spml_fast.analysis import predict
    from spml_fast.core.progress import show_progress
    from spml_fast.data.image_check import check_images, choose_level
    from spml_fast.data.image_files import ImageFiles, find_images
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.open import load_classifier, load_run_config, run_classes

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A class name that the terminal's encoding lacks ends nothing.
        sys.stdout.reconfigure(errors="backslashreplace")
    config = load_run_config(args.run)
    classes = run_classes(args.run, config)
    paths = find_images(args.images, lambda text: say(f"note: {text}"))
    classifier, _ = load_classifier(args.run, config, len(classes), torch.device("cpu"))
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    top = TOP if args.top is None and args.threshold is None else args.top
    threshold = args.threshold or 0.0
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(predict.PredictionTable(args.csv, classes)) if args.csv is not None else None
        # Processes are forked to check images, so the GPU is touched after that.
        progress = len(paths) >= PROGRESS_FROM
        verified = check_images(len(paths), paths.__getitem__, choose_level(None, len(paths)), progress=progress)
        for index, why in verified.rejected.items():
            say(predict.left_out(paths[index], *why))
        usable = np.flatnonzero(verified.ok)
        orientation = verified.orientation[usable] if args.orientation == "exif" else np.ones(len(usable), np.uint8)
        files = ImageFiles([paths[i] for i in usable], orientation)
        config.eval.batch_size = max(1, min(args.batch_size or config.eval.batch_size, len(files)))
        width = predict.path_width(files.paths) if len(files) else 0
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        predictions = predict.predict(
            classifier.to(device),
            config,
            files,
            device,
            alpha=alpha,
            classes=classes,
            top=top,
            threshold=threshold,
        )
        done = 0
        advance = stack.enter_context(show_progress(len(files), "predicting", table is not None and progress))
        for found in predictions:
            advance(1)
            if found.reason is not None:
                say(predict.left_out(found.path, found.reason))
                continue
            done += 1
            if table is not None:
                table.add(found)
            else:
                print(predict.prediction_line(found, classes, threshold, width), flush=True)
        if done == 0:
            raise UserError(f"none of the {len(paths)} images can be used; the reasons stand above")
    missing = len(paths) - done
    lost = f"{missing} of {len(paths)} images left out; the reasons stand above"
    if table is not None:
        print(f"{table.out}: {table.rows} rows for {done} images" + (f"; {lost}" if missing else ""))
    elif missing:
        say(lost)
    return 1 if missing else 0


if __name__ == "__main__":
    run_command(main)
