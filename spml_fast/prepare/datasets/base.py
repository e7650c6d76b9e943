"""Base class of data sets, their registry, and the options that all of them have.

A data set is one file: in this folder, or anywhere else if it is imported before the command line is read. It reads
annotations into a `RawDataset` and registers itself:

    @register("mine")
    class Mine(Dataset):
        \"\"\"One line for --help.\"\"\"

        @classmethod
        def add_options(cls, parser): parser.add_argument("--root", required=True, type=Path)

        def read(self, options): return RawDataset("mine", classes, image_root, [RawSplit("train", known, paths=paths)])

prepare/build.py does the rest: draws observed labels, cuts off the validation split, checks every image and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from spml_fast.core.config import MAX_PIXELS
from spml_fast.core.errors import UserError
from spml_fast.core.registry import Registry
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.build import build
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.observed_labels import PUBLISHED_SEED, ObservationScheme
from spml_fast.prepare.raw import CommonOptions, Orientation, RawDataset


class Dataset:
    """Base of all data sets. The class docstring's first line is the help text of the subcommand."""

    name: ClassVar[str]
    default_observe: ClassVar[str] = "single"
    default_orientation: ClassVar[Orientation] = "ignore"
    # What the summary's next command has besides --data.dir.
    train_options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the data set's own command line options."""

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Read the raw annotations. Raises `UserError` naming file, line, field or class of what is wrong."""
        raise NotImplementedError

    def prepare(self, options: argparse.Namespace) -> Manifest:
        """Raw files -> Manifest.

        Args:
            options: what `add_options` and `add_common_options` declared.
        """
        observe = ObservationScheme.parse(options.observe)
        if options.convert and options.verify == "none":
            raise UserError("--convert must look at the images; leave out --verify none")
        if (options.observed is None) != (options.observed_format is None):
            raise UserError("--observed FILE.npy and --observed-format go together: the encoding is never guessed")
        # Before the annotations are read, which can take minutes.
        ManifestWriter.check_target(options.out, options.overwrite)
        common = CommonOptions(
            out=options.out,
            observe=observe,
            seed=options.seed,
            verify=options.verify,
            orientation=options.orientation,
            overwrite=options.overwrite,
            max_pixels=options.max_pixels,
            workers=options.workers,
            convert=options.convert,
            observed=None if options.observed is None else (options.observed, options.observed_format),
        )
        raw = self.read(options)
        return build(replace(raw, name=options.name) if options.name else raw, common)


DATASETS: Registry[Dataset] = Registry("data set")


def register(name: str) -> Callable[[type[Dataset]], type[Dataset]]:
    """Make a data set known under `name`, the subcommand of `spml-fast prepare`."""

    def decorate(cls: type[Dataset]) -> type[Dataset]:
        DATASETS.register(name)(cls)
        cls.name = name
        return cls

    return decorate


def _seed(text: str) -> int:
    """A seed from the command line."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError("the seed must be between 0 and 4294967295")
    return value


def _name(text: str) -> str:
    """The name of a data set from the command line; folders of runs are called by it."""
    if not text.strip() or not text.isprintable() or text.startswith(".") or set(text) & set("/\\"):
        raise argparse.ArgumentTypeError("a name may be part of a file name: no slash, no dot at its beginning")
    return text.strip()


def _pixels(text: str) -> int:
    """A number of pixels from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least one pixel is needed")
    return value


def _workers(text: str) -> int:
    """A number of processes from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least one process is needed")
    return value


def require_folder(images: Path) -> Path:
    """The folder of the images. Raises `UserError` where it is none."""
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist")
    return images


def add_val_fraction(parser: argparse.ArgumentParser) -> None:
    """Declare the option of data sets that the papers cut a validation split off."""
    parser.add_argument(
        "--val-fraction",
        choices=["published", "0"],
        default="published",
        help="published: a fifth of the training images, drawn as in the papers, is for validation (default); "
        "0: all official training images are for training",
    )


def add_common_options(parser: argparse.ArgumentParser, dataset: type[Dataset]) -> None:
    """Declare the options that all data sets have."""
    group = parser.add_argument_group("options of all data sets")
    group.add_argument("--out", required=True, type=Path, help="Manifest directory to write")
    group.add_argument("--name", type=_name, help="what the data set is called in folders of runs and on screen")
    group.add_argument("--overwrite", action="store_true", help="replace the Manifest that is already at --out")
    group.add_argument(
        "--observe",
        default=dataset.default_observe,
        metavar="SCHEME",
        help="labels that training sees. all: all known ones; single: the published draw of one positive per image; "
        "single=K: of K; single=K,negatives=L: and L negatives; keep=P: each known label, positive or negative, with "
        "probability P (default: %(default)s)",
    )
    group.add_argument(
        "--observed",
        type=Path,
        metavar="FILE.npy",
        help="observed labels of the official training images from a published array [images, classes] in place of a "
        "draw",
    )
    group.add_argument(
        "--observed-format",
        choices=["spml", "openimages", "nan"],
        help="what the array's values mean: spml 1 positive, 0 unknown, -1 negative (labels_obs.npy of the "
        "single-positive papers); openimages 1, 0 negative, -1 unknown; nan 1, 0 negative, NaN unknown",
    )
    group.add_argument(
        "--seed", type=_seed, default=PUBLISHED_SEED, help="seed of that draw; 1200 is the published one (%(default)s)"
    )
    group.add_argument(
        "--verify",
        choices=["decode", "header", "none"],
        help="check every image: decode all of it, its header, or not at all "
        "(default: decode up to 200,000 images, else header, which misses truncated files)",
    )
    group.add_argument(
        "--orientation",
        choices=["exif", "ignore"],
        default=dataset.default_orientation,
        help="exif: turn images as their EXIF data say; ignore: take the pixels as they are stored, as the papers' "
        "loader does (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=_pixels,
        default=MAX_PIXELS,
        metavar="N",
        help="leave out images of more pixels (width x height) than that, undecoded (default: %(default)s)",
    )
    group.add_argument(
        "--convert",
        action="store_true",
        help="copy images that the loader does not read (HEIC, AVIF, GIF ...) as JPEG or PNG into the Manifest, "
        "instead of leaving them out",
    )
    group.add_argument("--workers", type=_workers, help="processes that check images (default: one per core)")
