"""Looks at every picture once, so that a bad file is a line in a report and never a dead training run.

The loader stops for good at the first file that it cannot decode. Which files those are was found by decoding some
eighty kinds of file, whole and damaged, with DALI 2.4 on the CPU and with Pillow 13: the two agree on JPEG
(progressive, grey, CMYK), PNG (grey, palette, RGBA, 16 bit), WebP, BMP, PNM, JPEG 2000 and most TIFF; DALI alone refuses GIF,
AVIF, ICO, TGA, TIFF with 32-bit integers or without BitsPerSample, and PNG whose checksums are wrong. `check_picture`
refuses those by name.
This module imports neither torch nor DALI, and its workers are light.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spml_fast.errors import UserError

Level = Literal["decode", "header", "none"]

DECODE_LIMIT = 200_000
_LOADER_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"})
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_CHUNK = 128
# Below this, starting processes takes longer than looking at the pictures.
_POOL_FROM = 64


class Checked(NamedTuple):
    """What one picture is like. `reason` None means that the loader can read it.

    Attributes:
        reason: why the picture must be left out, worded alike for like pictures so that it can be counted.
        detail: what the decoder said about this one.
        width: stored width in pixels, before orientation.
        height: stored height in pixels, before orientation.
        orientation: EXIF orientation, 1 to 8; 1 when absent or senseless.
    """

    reason: str | None
    detail: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1


@dataclass
class Verified:
    """What verification found over N pictures.

    Attributes:
        ok: bool [N].
        width: int32 [N] stored widths, 0 when the picture was not opened.
        height: int32 [N] stored heights.
        orientation: uint8 [N] EXIF orientation, 1 when not looked at.
        rejected: index -> (reason, detail) of the pictures that are not ok.
        seconds: time taken.
    """

    ok: npt.NDArray[np.bool_]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    orientation: npt.NDArray[np.uint8]
    rejected: dict[int, tuple[str, str]]
    seconds: float


def choose_level(level: Level | None, num_pictures: int) -> Level:
    """The level asked for, or the default: decode up to 200,000 pictures in all, else headers only."""
    if level is not None:
        return level
    return "decode" if num_pictures <= DECODE_LIMIT else "header"


def check_picture(path: str, level: Literal["decode", "header"] = "decode") -> Checked:
    """Look at one file as the loader will. Never raises for a bad picture.

    Args:
        path: full path.
        level: "decode" reads every pixel; "header" reads size and format only, and so misses truncated files.
    """
    try:
        if level == "header":
            if os.stat(path).st_size == 0:
                return Checked("empty file")
            with open(path, "rb") as file:
                return _check_stream(file, path, level)
        with open(path, "rb") as file:
            data = file.read()
        return _check_stream(io.BytesIO(data), path, level) if data else Checked("empty file")
    except (FileNotFoundError, NotADirectoryError):
        return Checked("missing file")
    except IsADirectoryError:
        return Checked("a folder, not a file")
    except OSError as error:
        return Checked("unreadable file", error.strerror or str(error))
    except ValueError as error:
        # A null byte in the name.
        return Checked("unusable file name", str(error))


def _check_stream(stream: io.BytesIO | io.BufferedReader, path: str, level: str) -> Checked:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(stream) as image:
                checked = _check_header(image)
                if level == "header" or checked.reason:
                    return checked
                if image.format == "PNG":
                    # Pillow decodes in spite of a wrong checksum, libpng as the loader uses it does not.
                    image.verify()
                    stream.seek(0)
                    with Image.open(stream) as again:
                        again.load()
                else:
                    if image.format in ("JPEG", "MPO"):
                        # Every coefficient is still read, so damage shows as in a full decode, in half the time.
                        image.draft(image.mode, (1, 1))
                    image.load()
                return checked
        except UnidentifiedImageError:
            return Checked("not a picture", "no picture format fits the file's first bytes")
        except Image.DecompressionBombError as error:
            return Checked("too many pixels", str(error))
        except Exception as error:
            # Decoders of hostile bytes raise anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            return Checked("damaged or truncated", f"{type(error).__name__}: {error}")


def _check_header(image: Image.Image) -> Checked:
    """Format, pixel kind, stored size and orientation of an opened picture."""
    fmt, mode = image.format or "unknown", image.mode
    if fmt not in _LOADER_FORMATS:
        return Checked(f"format {fmt} is not read by the loader; convert it to JPEG or PNG")
    if mode in ("F", "I") or mode.startswith("I;32"):
        return Checked(f"{fmt} with 32 bits a pixel channel is not read by the loader; convert it to 8 or 16 bits")
    if fmt == "TIFF" and _TIFF_BITS_PER_SAMPLE not in getattr(image, "tag_v2", {}):
        return Checked("TIFF without the BitsPerSample tag is not read by the loader; convert it to PNG")
    width, height = image.size
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, struct.error):
        # A damaged EXIF block; the pixels may be fine.
        orientation = 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    if fmt == "TIFF" and orientation >= 5:
        # Pillow turns TIFF by itself and reports the turned size.
        width, height = height, width
    return Checked(None, "", width, height, orientation)


def _check_chunk(paths: list[str], level: Literal["decode", "header"]) -> list[Checked]:
    return [check_picture(path, level) for path in paths]


def verify_pictures(
    count: int,
    path_of: Callable[[int], str],
    level: Level,
    workers: int | None = None,
    label: str = "pictures",
    progress: bool = True,
) -> Verified:
    """Check `count` pictures on all cores.

    Args:
        count: number of pictures N.
        path_of: index 0..N-1 -> full path; called in this process, in order, shortly before a picture's turn.
        level: "decode", "header" or "none" (nothing is opened).
        workers: processes; None takes one a core that this process may use.
        label: what is being checked, for the progress line.
        progress: show progress on standard error.

    Raises:
        UserError: a worker process died (out of memory, most likely).
    """
    started = time.perf_counter()
    out = Verified(
        np.ones(count, np.bool_),
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
        np.ones(count, np.uint8),
        {},
        0.0,
    )
    if level == "none" or count == 0:
        return out
    workers = workers or len(os.sched_getaffinity(0))
    with _progress(count, f"checking {label}", progress) as advance:
        for start, results in _checked_chunks(count, path_of, level, workers if count >= _POOL_FROM else 1):
            for index, checked in enumerate(results, start):
                if checked.reason is not None:
                    out.ok[index] = False
                    out.rejected[index] = (checked.reason, checked.detail)
                out.width[index], out.height[index] = checked.width, checked.height
                out.orientation[index] = checked.orientation
            advance(len(results))
    out.seconds = time.perf_counter() - started
    return out


def _checked_chunks(
    count: int, path_of: Callable[[int], str], level: Literal["decode", "header"], workers: int
) -> Iterator[tuple[int, list[Checked]]]:
    """Results in order, a chunk at a time, with a bounded number of chunks under way."""

    def chunk(start: int) -> list[str]:
        return [path_of(i) for i in range(start, min(start + _CHUNK, count))]

    starts = iter(range(0, count, _CHUNK))
    if workers == 1:
        for start in starts:
            yield start, _check_chunk(chunk(start), level)
        return
    under_way: deque[tuple[int, Future[list[Checked]]]] = deque()
    # Forked workers start at once and inherit the imports; nothing here has touched a GPU.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            for start in starts:
                under_way.append((start, pool.submit(_check_chunk, chunk(start), level)))
                if len(under_way) >= 4 * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that was checking pictures died near {path_of(first)} (out of memory?); "
                "prepare with --verify header to see which picture it is"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _progress(total: int, description: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a plain line every ten seconds."""
    if not enabled:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.0f}/s" if speed else "")

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield lambda n: bar.advance(task, n)
        return
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = done / (now - started)
            left = (total - done) / rate
            print(f"{description}: {done:,} of {total:,}, {rate:,.0f} a second, {left:,.0f} s left", file=sys.stderr)

    yield advance
