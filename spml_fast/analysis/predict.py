"""A trained run on new pictures: find them, check them, and give the classes of each with probabilities.

The pictures go through the same loader as evaluation's, and the logits are the same. A run directory is enough: its
class names, picture size and normalisation are in it, and the data set may be gone. Of C classes a picture those that
are asked for are kept, a batch at a time, so memory does not grow with what is written.
"""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.image_check import LOADER_FORMATS, check_picture
from spml_fast.data.manifest import Manifest, Split
from spml_fast.evaluation.evaluate import make_eval_loader
from spml_fast.models.classifier import Classifier
from spml_fast.train.engine import autocast_dtype

COLUMNS = ("path", "class", "probability", "rank")
# Longer paths are not padded to.
_PATH_WIDTH = 60


# --- Pictures ------------------------------------------------------------------------------------------------------


def picture_suffixes() -> frozenset[str]:
    """Suffixes (lower case, with the dot) of the formats that the loader reads, as Pillow knows them."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in LOADER_FORMATS)


def find_pictures(sources: Sequence[str], note: Callable[[str], None]) -> list[str]:
    """Paths of all pictures in `sources`, each once: files as they are, directories searched with all below them.

    Args:
        sources: files, whatever they are called, and directories, of which files with `picture_suffixes` are taken,
            sorted by path. Links are followed; a directory that is reached twice is searched once.
        note: called with a sentence about each directory that adds nothing.

    Raises:
        UserError: nothing given or found, a path that does not exist or is neither file nor directory, or a directory
            that cannot be read.
    """
    if not sources:
        raise UserError("no picture given; name picture files, or directories to search for them")
    suffixes = picture_suffixes()
    found: dict[tuple[str, str], str] = {}
    searched: set[str] = set()
    for source in sources:
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise UserError(f"{printable(source)} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            before = len(searched)
            paths = _search(source, suffixes, searched)
            if not paths and len(searched) > before:
                note(f"no picture in {printable(source)}")
        elif stat.S_ISREG(mode):
            paths = [source]
        else:
            raise UserError(f"{printable(source)} is neither a file nor a directory")
        for path in paths:
            folder, name = os.path.split(path)
            # A link to a picture is a picture of its own name; a link to a directory adds none.
            found.setdefault((os.path.realpath(folder), name), path)
    if not found:
        raise UserError(f"there is no picture to look at; files are taken that end in {' '.join(sorted(suffixes))}")
    return list(found.values())


def _search(top: str, suffixes: frozenset[str], searched: set[str]) -> list[str]:
    """Pictures in a directory and below it, sorted; directories in `searched` are passed over, new ones added to it."""
    found: list[str] = []
    # Linked directories come last, so that pictures keep the path without a link where there is one.
    plain, linked = [top], list[str]()
    while plain or linked:
        folder = plain.pop() if plain else linked.pop()
        real = os.path.realpath(folder)
        if real in searched:
            continue
        searched.add(real)
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"directory {printable(folder)} cannot be read: {error.strerror}") from error
        for entry in entries:
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                (linked if link else plain).append(entry.path)
            # A link to nothing is kept: it is named when it is checked. Pipes and devices are no pictures.
            elif os.path.splitext(entry.name)[1].lower() in suffixes and (link or entry.is_file()):
                found.append(entry.path)
    return sorted(found)


class PictureFiles(Split):
    """Picture files that belong to no Manifest, as the loaders take them: no labels, no sizes, everything in memory.

    Args:
        paths: of the pictures.
        orientation: uint8 [N], EXIF orientation 1..8 that the loader applies.
    """

    def __init__(self, paths: Sequence[str], orientation: npt.NDArray[np.uint8]) -> None:
        super().__init__(Path("pictures"), Path(), {"size": len(paths)})
        self.paths = paths
        self.orientation = orientation
        self.width = self.height = np.broadcast_to(np.int32(0), len(paths))
        self.shards = None

    def relative_path(self, index: int) -> str:
        """The path as it was given."""
        return self.paths[index]

    def path(self, index: int) -> str:
        """The path as it was given."""
        return self.paths[index]

    def part(self, start: int, stop: int) -> PictureFiles:
        """Pictures start..stop - 1."""
        return PictureFiles(self.paths[start:stop], self.orientation[start:stop])


# --- Classes -------------------------------------------------------------------------------------------------------


def run_classes(run: Path, config: Config) -> list[str]:
    """Class names of a run in class-id order: from the run directory or, where it has none, from its data set.

    Raises:
        UserError: neither has them.
    """
    path = run / "classes.txt"
    if not path.is_file():
        if config.data.dir is None or not Path(config.data.dir, "manifest.json").is_file():
            raise UserError(
                f"{run} has no classes.txt, and its data set {config.data.dir} is not there either; "
                f"copy classes.txt of the data set to {run}"
            )
        return Manifest(config.data.dir, config.data.image_root).classes
    try:
        classes = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy classes.txt of the data set there") from error
    if not classes:
        raise UserError(f"{path} is empty; copy classes.txt of the data set there")
    return classes


@dataclass(frozen=True)
class Prediction:
    """What was found for one picture.

    Attributes:
        path: as it was given.
        classes: int64 [k] class ids, the most probable first.
        probability: float64 [k], sigmoid of the fp32 logits; in fp32 all confident classes would be 1.
        reason: why the loader refused the picture, which then has no classes; None when it did not.
    """

    path: str
    classes: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    reason: str | None = None


@torch.no_grad()
def predict(
    classifier: Classifier,
    config: Config,
    files: PictureFiles,
    device: torch.device,
    *,
    alpha: float,
    classes: Sequence[str],
    top: int | None = None,
    threshold: float = 0.0,
) -> Iterator[Prediction]:
    """Classes of each picture, in order, a batch at a time.

    A picture that passed its check and that the loader cannot decode all the same is reported with its reason, and the
    others go on.

    Args:
        classifier: on `device`, in eval mode.
        config: the run's; `eval.batch_size` pictures go through the network at once.
        files: the pictures.
        device: where the views are made and the network runs.
        alpha: BoostLU's factor, 1 for heads without a map (`evaluate.check_alphas`).
        classes: names for error messages.
        top: give so many of the most probable classes, ties by class id; None gives all.
        threshold: of these, give those with at least this probability.

    Raises:
        UserError: a logit is not a number.
    """
    dtype = autocast_dtype(config.train.precision, device)
    nothing = np.empty(0, np.int64), np.empty(0, np.float64)
    for start, pictures in load_pictures(classifier, config, files, device):
        if pictures is None:
            yield Prediction(files.path(start), *nothing, reason=why_refused(files.path(start)))
            continue
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = classifier(pictures, boost=alpha != 1)
        logits = output.at_alpha(alpha)
        check_numbers(logits, classes, lambda row, start=start: printable(files.path(start + row)))
        ordered = torch.sort(logits, dim=1, descending=True, stable=True)
        probability = torch.sigmoid(ordered.values[:, :top].double()).cpu().numpy()
        class_id = ordered.indices[:, :top].cpu().numpy()
        for row in range(len(logits)):
            kept = probability[row] >= threshold
            yield Prediction(files.path(start + row), class_id[row][kept], probability[row][kept])


def check_numbers(logits: Tensor, classes: Sequence[str], place: Callable[[int], str]) -> None:
    """Raise `UserError` where a logit [B, C] is not a number; `place` gives the picture of a row for people."""
    wrong = torch.nonzero(logits.isnan())
    if len(wrong):
        row, column = wrong[0].tolist()
        raise UserError(
            f"the score of class {classes[column]} is not a number for {place(row)}: "
            "the run has diverged, or its weights are damaged; use another run"
        )


def why_refused(path: str) -> str:
    """Why the loader refused a picture that had passed its check."""
    checked = check_picture(path)
    return _join(checked.reason or "not decoded by the loader; convert it to JPEG or 8-bit PNG", checked.detail)


def load_pictures(
    classifier: Classifier, config: Config, files: PictureFiles, device: torch.device
) -> Iterator[tuple[int, Tensor | None]]:
    """Yield (index of the first, views [b, 3, S, S]), or (index, None) for a picture that the loader refuses."""
    start = single_until = 0
    while start < len(files):
        single = start < single_until
        try:
            part = files.part(start, start + 1 if single else len(files))
            for batch in make_eval_loader(config, part, classifier, device):
                # Padding serves ranks that keep in step; there are none.
                yield start, batch.views["eval"][: batch.real]
                start += batch.real
        except UserError:
            # The loader gives up on all batches in flight with one bad picture; the next ones come one by one.
            if single:
                yield start, None
                start += 1
            else:
                single_until = start + config.eval.batch_size


# --- Words and tables ----------------------------------------------------------------------------------------------


def printable(path: str) -> str:
    """A path for people: characters that a terminal cannot show, or would obey, are escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


def _join(reason: str, detail: str) -> str:
    return f"{reason} ({detail})" if detail else reason


def left_out(path: str, reason: str, detail: str = "") -> str:
    """The line about a picture that cannot be used."""
    return f"left out: {printable(path)}: {_join(reason, detail)}"


def path_width(paths: Sequence[str]) -> int:
    """Columns that `prediction_line` gives to the path, so that the classes of most lines stand below each other."""
    return min(max(len(printable(path)) for path in paths), _PATH_WIDTH)


def prediction_line(found: Prediction, classes: Sequence[str], threshold: float, width: int) -> str:
    """One picture on one line: path, then class and probability, the most probable first."""
    pairs = zip(found.classes.tolist(), found.probability.tolist(), strict=True)
    text = ", ".join(f"{classes[c]} {p:.3f}" for c, p in pairs) or f"no class of probability {threshold:g} or more"
    return f"{printable(found.path):<{width}}  {text}"


class PredictionTable:
    """Writes predictions as CSV beside the final place, and moves the file there when all went well.

    UTF-8 with a header; columns: path (as given, byte for byte), class, probability (all digits of a float64), rank (1
    for the most probable). If the block is left by an exception, the rows so far stay in OUT.partial.

    Args:
        out: the CSV file; an older one is replaced.
        classes: class names in class-id order.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        self.out, self.classes, self.rows = out, classes, 0
        self._partial = out.with_name(out.name + ".partial")
        if out.is_dir():
            raise UserError(f"{out} is a directory; give the name of a CSV file")
        try:
            self._file = self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error
        self._plain = csv.writer(self._file, lineterminator="\n")
        # The plain writer leaves a carriage return without the quotes that readers need.
        self._quoting = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        self._plain.writerow(COLUMNS)

    def add(self, found: Prediction) -> None:
        """Write the classes of one picture, a row each."""
        pairs = zip(found.classes.tolist(), found.probability.tolist(), strict=True)
        try:
            for rank, (class_id, probability) in enumerate(pairs, 1):
                name = self.classes[class_id]
                writer = self._quoting if "\r" in found.path or "\r" in name else self._plain
                writer.writerow((found.path, name, probability, rank))
                self.rows += 1
        except OSError as error:
            raise UserError(f"{self._partial} cannot be written: {error.strerror}") from error

    def __enter__(self) -> PredictionTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self.out)
            elif not self.rows:
                self._partial.unlink()
        except OSError as problem:
            # The first error says more than one of closing.
            if kind is None:
                raise UserError(f"{self.out} cannot be written: {problem.strerror}") from problem
