"""A trained run on new images: find them, check them, and give the classes of each with probabilities.

The images go through the same loader as evaluation's, and the logits are the same. A run directory is enough: its
class names, image size and normalisation are in it, and the data set may be gone. Of the C classes of an image only the
requested ones are kept, a batch at a time, so memory does not grow with what is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import csv_writer, move_into_place, partial_path, printable
from spml_fast.core.outputs import CALIBRATED_COLUMNS, PREDICTION_COLUMNS, OutputFile
from spml_fast.core.precision import autocast, inference_dtype
from spml_fast.core.text import formula_safe_path
from spml_fast.data.image_check import check_image
from spml_fast.data.image_files import ImageFiles
from spml_fast.evaluation.decisions import Decisions
from spml_fast.models.classifier import Classifier
from spml_fast.runs.open import make_eval_loader

# Lines are padded to the longest path, up to this many columns.
_PATH_WIDTH = 60


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        path: as it was given.
        classes: int64 [k] class ids, the most probable first.
        probability: float64 [k], sigmoid of the fp32 logits; in fp32 all confident classes would be 1.
        reason: why the loader refused the image, which then has no classes; None when it did not.
        calibrated: float64 [k], what the run's calibration makes of them; None where it has none.
    """

    path: str
    classes: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    reason: str | None = None
    calibrated: npt.NDArray[np.float64] | None = None

    @property
    def shown(self) -> npt.NDArray[np.float64]:
        """The probabilities that people see, float64 [k]: the calibrated ones where there are any."""
        return self.probability if self.calibrated is None else self.calibrated


@torch.no_grad()
def predict(
    classifier: Classifier,
    config: Config,
    files: ImageFiles,
    device: torch.device,
    *,
    alpha: float,
    classes: Sequence[str],
    top: int | None = None,
    threshold: float | None = 0.0,
    decisions: Decisions | None = None,
) -> Iterator[Prediction]:
    """Classes of each image, in order, a batch at a time.

    An image that passed its check but that the loader cannot decode is reported with its reason, and the others are
    predicted all the same.

    Args:
        classifier: on `device`, in eval mode.
        config: the run's; `eval.batch_size` images go through the network at once.
        files: the images.
        device: where the views are made and the network runs.
        alpha: BoostLU's factor, 1 for heads without a map (`evaluate.check_alphas`).
        classes: names for error messages.
        top: number of most probable classes to give, ties by class id; None gives all.
        threshold: of these, give those with at least this probability; None: each class its own of `decisions`.
        decisions: thresholds and calibration for this alpha, or None.

    Raises:
        UserError: a logit is not a number.
        ValueError: no threshold and no decisions.
    """
    if threshold is None and decisions is None:
        raise ValueError("without a threshold there must be decisions")
    dtype = inference_dtype(config.train.precision, device)
    nothing = np.empty(0, np.int64), np.empty(0, np.float64)
    limits = np.full(len(classes), threshold) if decisions is None or threshold is not None else decisions.threshold
    for start, images in load_images(classifier, config, files, device):
        if images is None:
            yield Prediction(files.path(start), *nothing, reason=why_refused(files.path(start)))
            continue
        with autocast(device, dtype):
            output = classifier(images, boost=alpha != 1)
        logits = output.at_alpha(alpha)
        check_numbers(logits, classes, functools.partial(place_of, files, start))
        fitted = logits if decisions is None else calibrated_logits(logits, decisions)
        ordered = torch.sort(fitted, dim=1, descending=True, stable=True)
        shown = torch.sigmoid(ordered.values[:, :top].double()).cpu().numpy()
        plain = torch.sigmoid(logits.gather(1, ordered.indices[:, :top]).double()).cpu().numpy()
        class_id = ordered.indices[:, :top].cpu().numpy()
        for row in range(len(logits)):
            kept = shown[row] >= limits[class_id[row]]
            fits = None if decisions is None or not decisions.calibrated else shown[row][kept]
            yield Prediction(files.path(start + row), class_id[row][kept], plain[row][kept], calibrated=fits)


def calibrated_logits(logits: Tensor, decisions: Decisions) -> Tensor:
    """Logits [B, C] with a run's calibration, on their device: float64, or as they are where it has none."""
    if not decisions.calibrated:
        return logits
    values = decisions.calibration.logits(logits.double().cpu().numpy())
    return torch.from_numpy(values).to(logits.device)


def usable_decisions(decisions: Decisions | None, alpha: float, say: Callable[[str], None]) -> Decisions | None:
    """Decisions where they are for this alpha; else None, and `say` has the reason."""
    if decisions is not None and decisions.alpha != alpha:
        say(f"note: the run's thresholds and calibration are for alpha {decisions.alpha:g}, and not used at {alpha:g}")
        return None
    return decisions


def place_of(files: ImageFiles, start: int, row: int) -> str:
    """Path, for people, of the image in row `row` of a batch that begins with image `start`."""
    return printable(files.path(start + row))


def check_numbers(logits: Tensor, classes: Sequence[str], place: Callable[[int], str]) -> None:
    """Raise `UserError` where a logit [B, C] is not a number; `place` gives the image of a row for people."""
    wrong = torch.nonzero(logits.isnan())
    if len(wrong):
        row, column = wrong[0].tolist()
        raise UserError(
            f"the score of class {classes[column]} is not a number for {place(row)}: "
            "the run has diverged, or its weights are damaged; use another run"
        )


def why_refused(path: str) -> str:
    """Why the loader refused an image that had passed its check."""
    checked = check_image(path)
    return _join(checked.reason or "not decoded by the loader; convert it to JPEG or 8-bit PNG", checked.detail)


def load_images(
    classifier: Classifier, config: Config, files: ImageFiles, device: torch.device
) -> Iterator[tuple[int, Tensor | None]]:
    """Views of the images, a batch at a time.

    Args:
        classifier: whose input normalisation is used.
        config: the run's; a batch has at most `eval.batch_size` images.
        files: the images.
        device: where the views are made.

    Yields:
        (index of the batch's first image, views [b, 3, S, S]), or (index, None) for an image that the loader refuses.
    """
    start = single_until = 0
    while start < len(files):
        single = start < single_until
        try:
            part = files.part(start, start + 1 if single else len(files))
            for batch in make_eval_loader(config, part, classifier, device):
                # Padding keeps ranks in step; here is only one.
                yield start, batch.views["eval"][: batch.real]
                start += batch.real
        except UserError:
            # The loader gives up on all batches in flight with one bad image; the next ones come one by one.
            if single:
                yield start, None
                start += 1
            else:
                single_until = start + config.eval.batch_size


def _join(reason: str, detail: str) -> str:
    return f"{reason} ({detail})" if detail else reason


def left_out(path: str, reason: str, detail: str = "") -> str:
    """The line about an image that cannot be used."""
    return f"left out: {printable(path)}: {_join(reason, detail)}"


def path_width(paths: Sequence[str]) -> int:
    """Columns that `prediction_line` gives to the path, so that the classes of most lines stand below each other."""
    return min(max(len(printable(path)) for path in paths), _PATH_WIDTH)


def prediction_line(prediction: Prediction, classes: Sequence[str], threshold: float | None, width: int) -> str:
    """One image on one line: path, then class and probability, the most probable first.

    Args:
        prediction: of the image.
        classes: class names in class-id order.
        threshold: that was applied, for the text of an image without classes; None: each class's own.
        width: columns of the path (`path_width`).
    """
    pairs = zip(prediction.classes.tolist(), prediction.shown.tolist(), strict=True)
    nothing = "no class above its threshold"
    if threshold is not None:
        nothing = f"no class of probability {threshold:g} or more"
    text = ", ".join(f"{printable(classes[c])} {p:.3f}" for c, p in pairs) or nothing
    return f"{printable(prediction.path):<{width}}  {text}"


class PredictionTable:
    """Writes predictions as CSV beside the final place, and moves the file there when all went well.

    UTF-8 with a header; columns: path (as given, byte for byte; `./` before what looks like a formula), class,
    probability (all digits of a float64), rank (1 for the most probable) and, of a calibrated run, by which the ranks
    then are, calibrated_probability. If the block is left by an exception, the rows so far stay in OUT.partial.

    Args:
        out: the CSV file; an older one that `predict` wrote is replaced.
        classes: class names in class-id order.
        calibrated: write the calibrated probability too.

    Raises:
        UserError: the file cannot be written, or there is another one.
    """

    def __init__(self, out: OutputFile, classes: Sequence[str], calibrated: bool = False) -> None:
        self.out, self.classes, self.calibrated, self.rows = out, classes, calibrated, 0
        self._partial = partial_path(out.path)
        out.check()
        try:
            self._file = self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise UserError(f"{out.path} cannot be written: {error.strerror}") from error
        self._write = csv_writer(self._file)
        self._write(CALIBRATED_COLUMNS if calibrated else PREDICTION_COLUMNS)

    def add(self, prediction: Prediction) -> None:
        """Write the classes of one image, one row per class."""
        columns = (prediction.classes.tolist(), prediction.probability.tolist(), prediction.shown.tolist())
        try:
            for rank, (class_id, probability, calibrated) in enumerate(zip(*columns, strict=True), 1):
                row = (formula_safe_path(prediction.path), self.classes[class_id], probability, rank)
                self._write((*row, calibrated) if self.calibrated else row)
                self.rows += 1
        except OSError as error:
            raise UserError(f"{self._partial} cannot be written: {error.strerror}") from error

    def __enter__(self) -> PredictionTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                # The file may have been made while images were predicted.
                self.out.check()
                move_into_place(self._partial, self.out.path)
            elif not self.rows:
                self._partial.unlink()
        except OSError as problem:
            # The first error says more than one of closing.
            if kind is None:
                raise UserError(f"{self.out.path} cannot be written: {problem.strerror}") from problem
