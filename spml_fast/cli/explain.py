"""`spml-fast explain --run RUN [IMAGE_OR_DIR ...] [--out FILE.png|DIR]`: see why a run gives a class."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from spml_fast.analysis.explain import Choice, Explained
    from spml_fast.analysis.explain_drawing import Drawing
    from spml_fast.core.config import Config
    from spml_fast.data.image_files import ImageFiles
    from spml_fast.data.manifest import Manifest, Split
    from spml_fast.models.classifier import Classifier

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line
from spml_fast.core.io import printable
from spml_fast.runs.layout import RunLayout

DESCRIPTION = """Draw class activation maps over images: red where a map is evidence for the class, blue where it is
against it; of a head with queries their attention, in green. A run of IGNORE shows its masks, too. Without images some
of the run's test split are shown with their labels and boxes: where the model is most wrong, and a few at random.
Images that cannot be read are named on standard error and left out, and the exit status is then 1."""
EXAMPLES = [
    ("--run RUN", "some of the test split, to RUN/explain.png"),
    ("--run RUN photos/ --out maps/", "a page for each of your images"),
    ("--run RUN a.jpg --classes cat --classes dog", "the maps of two classes"),
    ("--run AN --against FULL LL_R IGNORE", "the maps of several runs side by side"),
]
TOP = 3
IMAGES = 9


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("explain", "--run RUN [OPTIONS] [IMAGE_OR_DIR ...]", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE_OR_DIR", help="image files, and directories to search with all below"
    )
    parser.add_argument("--top", type=int, metavar="K", help=f"most probable classes an image (default: {TOP})")
    # One a time, or the images after it would be taken for classes.
    parser.add_argument(
        "--classes", action="append", metavar="NAME", help="look at this class instead; may be given several times"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png|DIR",
        help="one page for all images, or a folder for a page each; default explain.png in the run directory",
    )
    parser.add_argument("--maps", type=Path, metavar="DIR", help="write every map too: float32 .npy and maps.json")
    common.add_alpha(parser)
    parser.add_argument(
        "--against",
        action="extend",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a row for each class of each image, with the maps of these runs beside --run's. The first one, such as a "
        "run with full labels, comes first, and all are compared with it; then --run, then the others",
    )
    parser.add_argument("--boosted", action="store_true", help="with --against: --run's maps with the boost, too")
    parser.add_argument(
        "--positive-only", action="store_true", help="draw what speaks for a class, and not what speaks against it"
    )
    parser.add_argument("--split", help="without images: the split to show; default the run's test split")
    parser.add_argument(
        "--count", type=int, default=IMAGES, metavar="N", help="without images: how many (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="without images: of those at random (default: %(default)s)")
    common.add_batch_size(parser)
    common.add_orientation(parser)
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def check(args: argparse.Namespace) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_one_process("explain")
    common.check_at_least_one(args, "top", "count", "batch_size")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative")
    if args.top is not None and args.classes is not None:
        raise UserError("give --top or --classes, not both")
    common.check_alpha(args.alpha)
    if args.against is None and args.boosted:
        raise UserError("--boosted is a column of a comparison; give --against RUN too")
    if args.against is not None and args.maps is not None:
        raise UserError("--maps writes the maps of one run; leave it out, or --against")
    for run in args.against or ():
        if not RunLayout(run).config.is_file():
            raise UserError(
                f"--against {run} is not a run directory; it takes run directories alone, so give images and their "
                "folders before it"
            )
    if args.images and args.split is not None:
        raise UserError("--split chooses among the run's own images; leave it out, or the images")
    if args.out is not None and args.out.suffix and args.out.suffix.lower() != ".png" and not args.out.is_dir():
        raise UserError(f"--out {args.out} must be a file named .png, or a folder")


def class_ids(names: list[str], classes: list[str]) -> list[int]:
    """Ids of class names, each once; `UserError` names one that does not exist, and what is like it."""
    import difflib

    place = {name: i for i, name in enumerate(classes)}
    for name in names:
        if name not in place:
            close = difflib.get_close_matches(name, classes, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "the run directory lists its classes"
            raise UserError(f"--classes: the run has no class {name!r}; {hint}")
    return list(dict.fromkeys(place[name] for name in names))


def given_images(args: argparse.Namespace, max_pixels: int) -> tuple[ImageFiles, list[float], int]:
    """The images of the command line that can be read, width / height of each, and how many were left out."""
    import numpy as np

    from spml_fast.analysis import predict
    from spml_fast.data.image_check import check_images, choose_level
    from spml_fast.data.image_files import ImageFiles, find_images

    paths = find_images(args.images, lambda text: common.say(f"note: {text}"))
    verified = check_images(len(paths), paths.__getitem__, choose_level(None, len(paths)), max_pixels=max_pixels)
    for index, why in verified.rejected.items():
        common.say(predict.left_out(paths[index], *why))
    usable = np.flatnonzero(verified.ok)
    if not len(usable):
        raise UserError(f"none of the {len(paths)} images can be used; the reasons stand above")
    orientation = verified.orientation[usable] if args.orientation == "exif" else np.ones(len(usable), np.uint8)
    aspects = verified.width[usable] / np.maximum(verified.height[usable], 1)
    # Orientations from 5 on swap the sides.
    aspects = np.where(orientation >= 5, 1 / aspects, aspects)
    return ImageFiles([paths[i] for i in usable], orientation), aspects.tolist(), len(paths) - len(usable)


def own_data(run: Path, config: Config) -> Manifest:
    """The run's data set. `UserError` where it cannot be opened, with what can be done without it."""
    from spml_fast.runs.open import open_run_data

    try:
        return open_run_data(run, config)
    except UserError as error:
        shown = command_line("explain", "--run", run, "IMAGE")
        raise UserError(f"{error}; images that are named need no data set: {shown}") from error


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The configuration with another batch size in evaluation."""
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch_size))


def first_classes(named: list[int] | None, choices: list[Choice] | None, images: int) -> list[list[int]] | None:
    """Class ids whose maps come first, for each image: those named, or the one that an image was chosen for."""
    if named is not None:
        return [named] * images
    return [[] if c.class_id is None else [c.class_id] for c in choices or ()] or None


def page_title(args: argparse.Namespace, split: Split | None, image_size: int, alpha: float) -> str:
    """What stands over a page.

    Args:
        args: the command line.
        split: that the images are of; None for images of the command line.
        image_size: side of the model's input in pixels.
        alpha: BoostLU's factor.
    """
    where = "" if split is None else f", {split.name} split"
    if args.against is not None:
        return f"{1 + len(args.against)} runs{where}, {image_size} px"
    return f"{args.run}{where}, {image_size} px, alpha {alpha:g}"


def make_drawing(
    args: argparse.Namespace,
    out: Path,
    one_page: bool,
    config: Config,
    classes: list[str],
    classifier: Classifier,
    alpha: float,
    split: Split | None,
    files: ImageFiles,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> Drawing:
    """What draws the pages; of a comparison the other runs are loaded.

    Args:
        args: the command line.
        out: a PNG file for one page, or a folder.
        one_page: which of the two.
        config: of the run.
        classes: class names in class-id order.
        classifier: of the run.
        alpha: BoostLU's factor.
        split: that the images are of; None for images of the command line.
        files: the images.
        device: where classifiers run.
        stack: closes the folder of maps.
    """
    from spml_fast.analysis import compare
    from spml_fast.analysis.explain_drawing import Drawing, Style
    from spml_fast.analysis.explain_files import MapFolder
    from spml_fast.runs.open import run_classes

    against = args.against or []
    own, *titles = compare.run_titles([args.run, *against])
    title = page_title(args, split, config.data.image_size, alpha)
    about = compare.run_about(config, classifier)
    mask = compare.mask_of(config)
    style = Style(title, own, about, alpha, args.positive_only, args.boosted, mask, classifier.alpha_train)
    maps = None
    if args.maps is not None:
        metadata = {"run": str(args.run), "alpha": alpha, "image_size": config.data.image_size}
        maps = stack.enter_context(MapFolder(args.maps, metadata))
    others = None
    if against:
        runs = compare.load_compared(against, titles, run_classes(args.run, config), device)
        others = compare.compare_with(runs, files, device, classes, config.eval.batch_size)
    return Drawing(out, one_page, args.overwrite, classes, style, maps, others)


def check_count(number: int, one_page: bool, what: str) -> None:
    """Raise `UserError` for more images than fit on one page; `what` begins the sentence."""
    from spml_fast.analysis.explain import MAX_IMAGES

    if one_page and number > MAX_IMAGES:
        raise UserError(f"{what} {MAX_IMAGES} at most, and --out DIR makes a page each")


# A picture is at most 65,536 pixels high in the oldest matplotlib that is supported; a row of a portrait has 525.
MOST_ROWS = 120


def check_rows(args: argparse.Namespace, named: list[int] | None, images: int) -> None:
    """Raise `UserError` for more rows than a page can have, where each class of each image is one."""
    rows = images * (len(named) if named is not None else args.top or TOP)
    if rows > MOST_ROWS:
        raise UserError(
            f"{images} images have {rows} rows, one for each class; a page holds {MOST_ROWS}: give fewer images or "
            "classes, or --out DIR for a page each"
        )


def draw_images(
    images: Iterable[Explained], total: int, drawing: Drawing, split: Split | None, choices: Sequence[Choice] | None
) -> int:
    """Draw images, with their labels where they are samples of a split; returns how many were left out, and says why.

    Args:
        images: what `explain` gives.
        total: how many.
        drawing: the pages.
        split: of the samples; None for images from files.
        choices: the samples, in the order of the images.
    """
    from spml_fast.analysis import explain
    from spml_fast.analysis.predict import left_out
    from spml_fast.core.progress import watched

    missing = 0
    with watched(images, "explaining", total=total) as found:
        for place, image in enumerate(found):
            if image.refused is not None:
                common.say(left_out(image.path, image.refused))
                missing += 1
            elif split is not None and choices is not None:
                drawing.add(place, explain.with_labels(image, split, choices[place], drawing.classes))
            else:
                drawing.add(place, image)
    drawing.finish()
    if drawing.unprintable:
        common.say(
            f"note: no font of this machine has the characters of {drawing.unprintable} class names, which stand as "
            "their ids; install one that has, such as Noto Sans CJK"
        )
    return missing


def main(argv: list[str] | None = None) -> int:
    """Look and draw; 1 if an image was left out."""
    args = parse(argv)
    check(args)
    from spml_fast.analysis import explain
    from spml_fast.analysis.compare import mask_of
    from spml_fast.analysis.explain_drawing import check_pages
    from spml_fast.analysis.explain_samples import chosen_samples, sample_files
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.open import load_classifier, load_run_config, run_classes

    out: Path = args.out if args.out is not None else args.run / "explain.png"
    one_page = out.suffix.lower() == ".png" and not out.is_dir()
    check_pages(out, one_page, args.overwrite)
    config = load_run_config(args.run)
    manifest = None if args.images else own_data(args.run, config)
    classes = run_classes(args.run, config) if manifest is None else manifest.classes
    named = None if args.classes is None else class_ids(args.classes, classes)
    # Processes are forked to check images, so the GPU is touched after that.
    files, aspects, missing = None, list[float](), 0
    if manifest is not None:
        check_count(args.count, one_page, f"--count is {args.count}; a page holds")
    else:
        files, aspects, missing = given_images(args, config.data.max_pixels)
        check_count(len(files), one_page, f"{len(files)} images are too many for one page, which holds")
    if one_page and (args.against is not None or mask_of(config) is not None):
        check_rows(args, named, args.count if files is None else len(files))
    device = common.default_device()
    classifier, _ = load_classifier(args.run, config, len(classes), device)
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    config = with_batch_size(config, args.batch_size or config.eval.batch_size)
    with contextlib.ExitStack() as stack:
        split, choices = None, None
        if manifest is not None:
            split, choices = chosen_samples(
                args.split, args.count, args.seed, config, manifest, classifier, device, alpha
            )
            files, aspects = sample_files(split, choices, stack)
        assert files is not None
        drawing = make_drawing(args, out, one_page, config, classes, classifier, alpha, split, files, device, stack)
        images = explain.explain(
            classifier,
            with_batch_size(config, min(config.eval.batch_size, len(files))),
            files,
            device,
            alpha=alpha,
            classes=classes,
            top=args.top or TOP if named is None else len(named),
            first=first_classes(named, choices, len(files)),
            aspects=aspects,
            mask=mask_of(config),
        )
        missing += draw_images(images, len(files), drawing, split, choices)
    print(
        f"{printable(str(out))}: {drawing.shown} images"
        + (f"; {missing} left out, the reasons stand above" if missing else "")
    )
    return 1 if missing else 0
