"""Images that cannot be used while a run is training: which they are, and what takes their place.

`data.bad_images stop` ends the run with a sentence that names the file. With `replace` another image of the same epoch
is shown in its place, with its own labels: the batch keeps its size, so nothing that ranks do together changes. Which
one is a pure function of (seed, epoch, position, which images are bad), so a resumed run shows the same.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spml_fast.core.config import MAX_PIXELS
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.data.dali_graph import decode_graph
from spml_fast.data.image_check import any_size, limit_text
from spml_fast.data.manifest import Split
from spml_fast.data.pipelines import built
from spml_fast.data.read_retry import read_patiently
from spml_fast.data.remote.store import StoreError
from spml_fast.data.shards import RESTORE_SHARD


@dataclass(frozen=True)
class BatchRequest:
    """One batch to make.

    Attributes:
        key: which batch it is.
        index: int64 [n] sample indices.
        item: what the loader needs when the batch is done.
        group: consecutive requests with the same group are read from shards together, in the order of the disk.
    """

    key: tuple[int, ...]
    index: npt.NDArray[np.int64]
    item: Any
    group: tuple[int, ...]


class NoReplacementError(UserError):
    """An image cannot be used, and neither can any that could stand in for it."""


# (request, position in its index, attempt from 1 on) -> sample to show instead.
Choice = Callable[[BatchRequest, int, int], int]


def print_note(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


class BadImages:
    """The images of a split that could not be used in this run.

    Args:
        split: the images.
        replace: show others in their place; else the first one ends the run.
        limit: so many different ones are replaced, and one more ends the run.
        note: called with a sentence about each.

    Attributes:
        reasons: sample index -> what is wrong with it.
    """

    def __init__(
        self, split: Split, replace: bool = False, limit: int = 0, note: Callable[[str], None] = print_note
    ) -> None:
        self.split, self.replace, self.limit, self._note = split, replace, limit, note
        self.reasons: dict[int, str] = {}

    def add(self, sample: int, error: UserError) -> None:
        """Note a bad image. Raises `error` unless images are replaced, and `UserError` when there are too many."""
        if not self.replace:
            raise error
        self.reasons[sample] = str(error)
        self.check_limit(len(self.reasons), str(error))
        self._note(f"replaced by another image: {error}")

    def check_limit(self, count: int, last: str) -> None:
        """Raise `UserError` when `count` different bad images are more than are allowed."""
        if count > self.limit:
            raise UserError(
                f"{count} images could not be used, more than data.bad_image_limit {self.limit}; the last one: {last}"
            )

    def without_bad(self, request: BatchRequest, choose: Choice) -> BatchRequest:
        """The request with others in the place of images that are known to be bad.

        Raises:
            NoReplacementError: all that could stand in are bad too.
        """
        if not self.reasons:
            return request
        places = [i for i, sample in enumerate(request.index.tolist()) if sample in self.reasons]
        if not places:
            return request
        index = request.index.copy()
        for place in places:
            attempts = range(1, len(self.reasons) + 2)
            candidates = (choose(request, place, attempt) for attempt in attempts)
            chosen = next((sample for sample in candidates if sample not in self.reasons), None)
            if chosen is None:
                raise NoReplacementError(self.reasons[int(index[place])])
            index[place] = chosen
        return dataclasses.replace(request, index=index)


def pixel_limits(split: Split, index: npt.NDArray[np.int64], otherwise: int) -> npt.NDArray[np.int64]:
    """Pixels up to which images are decoded, int64 [n]: those of the Manifest, or `otherwise` where it has none."""
    known = np.asarray(split.width[index], np.int64) * np.asarray(split.height[index], np.int64)
    return np.where(known > 0, known, otherwise)


def advice(split: Split) -> str:
    """What to do about an image that cannot be read."""
    return RESTORE_SHARD if split.shards is not None else "restore it, or prepare the data again to leave it out"


def read_encoded(split: Split, sample: int) -> bytes:
    """The bytes of an image file. `UserError` if it is missing, empty, or cannot be read even when tried again."""
    try:
        encoded = split.read(sample)
    except FileNotFoundError as error:
        raise UserError(f"image {split.place(sample)} is missing; {advice(split)}") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"image {split.place(sample)} cannot be read ({reason}); {advice(split)}") from error
    if not encoded:
        raise UserError(f"image {split.place(sample)} is empty; {advice(split)}")
    return encoded


def _opened_size(split: Split, sample: int, source: str | io.BytesIO, decode: bool) -> tuple[int, int]:
    try:
        with any_size(), Image.open(source) as image:
            width, height = image.size
            if decode:
                image.load()
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's own sentence has an address in memory.
        raise UserError(
            f"image {split.place(sample)} cannot be read (it is no image, or its header is damaged); {advice(split)}"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"image {split.place(sample)} cannot be read ({error}); {advice(split)}") from error
    return (width, height) if split.orientation[sample] < 5 else (height, width)


def read_size(split: Split, sample: int) -> tuple[int, int]:
    """Width and height of an image as shown, from its header. `UserError` if it is missing or has none."""
    if split.shards is not None:
        return _opened_size(split, sample, io.BytesIO(read_encoded(split, sample)), decode=False)

    def header() -> tuple[int, int]:
        # Pillow says of an empty file that it cannot identify it.
        with open_regular(split.path(sample)) as file:
            empty = not file.read(1)
        if empty:
            raise UserError(f"image {split.place(sample)} is empty; {advice(split)}")
        return _opened_size(split, sample, split.path(sample), decode=False)

    try:
        return read_patiently(header)
    except FileNotFoundError as error:
        raise UserError(f"image {split.place(sample)} is missing; {advice(split)}") from error
    except OSError as error:
        raise UserError(f"image {split.place(sample)} cannot be read ({error}); {advice(split)}") from error


def _is_decoded(encoded: bytes) -> bool:
    """Whether DALI decodes an image."""
    # A pipeline that has failed is of no more use.
    pipe = built(decode_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1))
    try:
        pipe.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
        pipe.run()
    except RuntimeError:
        return False
    return True


def _too_large(split: Split, sample: int, encoded: bytes, limit: int) -> UserError | None:
    """The error for an image of more pixels than `limit`; None where it is not known to be one."""
    try:
        width, height = _opened_size(split, sample, io.BytesIO(encoded), decode=False)
    except UserError:
        # Not even a header that Pillow reads; the decoder says what is wrong.
        return None
    if width * height <= limit:
        return None
    known = int(split.width[sample]), int(split.height[sample])
    if all(known):
        return UserError(
            f"image {split.place(sample)} is {width} x {height} pixels now and was {known[0]} x {known[1]} when "
            f"the data were prepared; {advice(split)}"
        )
    return UserError(f"image {split.place(sample)} is {width} x {height} pixels; {limit_text(limit)}")


def _problem(split: Split, sample: int, sized: bool, max_pixels: int) -> UserError | None:
    """What is wrong with an image, as `bad_images` says; None when nothing is."""
    try:
        encoded = read_encoded(split, sample)
        # Before anybody decodes it.
        limit = int(pixel_limits(split, np.array([sample]), max_pixels)[0])
        if (error := _too_large(split, sample, encoded, limit)) is not None:
            return error
        decoded = _is_decoded(encoded)
        known = int(split.width[sample]), int(split.height[sample])
        if decoded and not (sized and all(known)):
            return None
        # Pillow's sentence says more than DALI's.
        size = _opened_size(split, sample, io.BytesIO(encoded), decode=not decoded)
    except StoreError:
        # No image is bad because nothing can be read.
        raise
    except UserError as problem:
        return problem
    if all(known) and size != known:
        return UserError(
            f"image {split.place(sample)} is {size[0]} x {size[1]} pixels now and was {known[0]} x {known[1]} when "
            f"the data were prepared; {advice(split)}"
        )
    if decoded:
        return None
    with Image.open(io.BytesIO(encoded)) as image:
        kind = image.format
    return UserError(
        f"image {split.place(sample)} is a {kind} file that DALI does not decode; convert it to JPEG or PNG, "
        "or prepare the data again to leave it out"
    )


def find_bad(
    split: Split, samples: Sequence[int], sized: bool, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[int, UserError]]:
    """The images among `samples` that the loader cannot use, each with a sentence that names it.

    Args:
        split: the images.
        samples: to look at, in this order.
        sized: the loader relies on the sizes that were found when the data were prepared.
        max_pixels: width x height of the largest image that is decoded where the Manifest does not know its size.
    """
    for sample in dict.fromkeys(samples):
        problem = _problem(split, sample, sized, max_pixels)
        if problem is not None:
            yield sample, problem


def find_unreadable(split: Split, samples: Sequence[int]) -> Iterator[tuple[int, UserError]]:
    """As `find_bad`, of images whose bytes cannot be read."""
    for sample in dict.fromkeys(samples):
        try:
            read_encoded(split, sample)
        except StoreError:
            raise
        except UserError as error:
            yield sample, error
