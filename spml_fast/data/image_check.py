"""Checks every image once, so that a bad file is a line in a report and never the end of a training run.

The loader stops for good at the first file that it cannot decode. Which files those are was found by decoding a
hundred kinds of file, whole and damaged, with DALI 2.4 on the CPU and with Pillow 13. The two agree on JPEG
(progressive, grey, CMYK), PNG (grey, palette, RGBA, 16 bit), WebP, BMP, PNM, JPEG 2000 and most TIFF. DALI alone
refuses GIF, AVIF, ICO, TGA, 32-bit TIFF, TIFF without BitsPerSample, two rare kinds of BMP, JPEG 2000 of grey with
transparency, PNG whose checksums are wrong and JPEG with stray bytes between its segments; `check_image` refuses
those by name. Of 2,200 JPEG, PNG, WebP and BMP files damaged at random, it passed none that DALI refuses; of 600
TIFF, JPEG 2000 and PPM files, it passed 9.

This module imports neither torch nor DALI, so that its worker processes start fast and take little memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spml_fast.core.config import MAX_PIXELS
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.core.progress import show_progress
from spml_fast.core.workers import worker_pool

Level = Literal["decode", "header", "none"]

# Up to so many images are decoded by default.
DECODE_LIMIT = 200_000
# Pillow's names of the formats that the loader reads.
LOADER_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"})

# In the reason for which an image of such a format is left out.
NOT_READ = "is not read by the loader"

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
# First bytes of files that are images, whatever follows.
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP")

# Brands of files of the ISO base media format whose images are coded as HEVC.
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

# Restart markers, start and end of image, and markers without a segment; none belongs before the first scan.
_JPEG_NO_SEGMENT = frozenset(bytes([m]) for m in (0x00, 0x01, *range(0xD0, 0xDA)))
# Frames with arithmetic, lossless or hierarchical coding.
_JPEG_UNUSUAL_FRAMES = frozenset(bytes([m]) for m in (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))

# Images that a worker process checks at a time.
_CHUNK = 128
# Below this, starting processes takes longer than checking the images.
_POOL_FROM = 64


class CheckResult(NamedTuple):
    """What one image is like. `reason` None means that the loader can read it.

    Attributes:
        reason: why the image must be left out, in the same words for the same fault, so that faults can be counted.
        detail: the decoder's message about this one.
        width: stored width in pixels, before orientation.
        height: stored height in pixels, before orientation.
        orientation: EXIF orientation, 1 to 8; 1 when absent or invalid.
    """

    reason: str | None
    detail: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1


_EMPTY = CheckResult("empty file")


def limit_text(max_pixels: int) -> str:
    """What the largest allowed image is, and how to allow larger ones."""
    return f"at most {max_pixels:,} are decoded, see prepare --max-pixels and --data.max_pixels"


@dataclass
class CheckResults:
    """What the check of N images gave.

    Attributes:
        ok: bool [N].
        width: int32 [N] stored widths, 0 when the image was not opened.
        height: int32 [N] stored heights.
        orientation: uint8 [N] EXIF orientation, 1 when the image was not opened.
        rejected: index -> (reason, detail) of the images that are not ok.
        seconds: time taken.
    """

    ok: npt.NDArray[np.bool_]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    orientation: npt.NDArray[np.uint8]
    rejected: dict[int, tuple[str, str]]
    seconds: float

    def among(self, rows: npt.NDArray[np.int64], size: int) -> CheckResults:
        """The same over `size` images, of which only `rows` (int64 [N]) were checked; the others are not ok."""
        out = CheckResults(
            np.zeros(size, np.bool_),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.ones(size, np.uint8),
            {int(rows[index]): fault for index, fault in self.rejected.items()},
            self.seconds,
        )
        out.ok[rows], out.width[rows], out.height[rows] = self.ok, self.width, self.height
        out.orientation[rows] = self.orientation
        return out


def choose_level(level: Level | None, num_images: int) -> Level:
    """The level asked for, or the default: decode up to 200,000 images in all, else headers only."""
    if level is not None:
        return level
    return "decode" if num_images <= DECODE_LIMIT else "header"


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Let Pillow open images of any size, whose sizes are then held against a limit before they are decoded."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def check_image(path: str, level: Literal["decode", "header"] = "decode", max_pixels: int = MAX_PIXELS) -> CheckResult:
    """Check one file as the loader will read it. Never raises for a bad image.

    Args:
        path: full path.
        level: "decode" reads every pixel; "header" reads size and format only, and so misses truncated files.
        max_pixels: width x height of the largest image that is accepted; none larger is decoded.
    """
    try:
        with open_regular(path) as file:
            if level == "header":
                return _check_stream(file, level, max_pixels) if os.fstat(file.fileno()).st_size else _EMPTY
            data = file.read()
        return check_bytes(data, level, max_pixels)
    except (FileNotFoundError, NotADirectoryError):
        return CheckResult("missing file")
    except IsADirectoryError:
        return CheckResult("a folder, not a file")
    except OSError as error:
        return CheckResult("unreadable file", error.strerror or str(error))
    except ValueError as error:
        # A null byte in the name.
        return CheckResult("unusable file name", str(error))


def check_bytes(
    data: bytes, level: Literal["decode", "header"] = "decode", max_pixels: int = MAX_PIXELS
) -> CheckResult:
    """Check an encoded image in memory as `check_image` checks a file."""
    return _check_stream(io.BytesIO(data), level, max_pixels) if data else _EMPTY


def _check_stream(stream: io.BytesIO | io.BufferedReader, level: str, max_pixels: int) -> CheckResult:
    """Check an encoded image."""
    other = _container_format(stream)
    if other:
        return CheckResult(f"format {other} {NOT_READ}; convert it to JPEG or PNG")
    with any_size(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(stream) as image:
                checked = _check_header(image, stream)
                if checked.reason is None and checked.width * checked.height > max_pixels:
                    detail = f"{checked.width} x {checked.height}; {limit_text(max_pixels)}"
                    return CheckResult("too many pixels", detail)
                if level == "header" or checked.reason:
                    return checked
                if image.format in ("JPEG", "MPO"):
                    # Every coefficient is still read, so damage shows as in a full decode, in half the time.
                    image.draft(image.mode, (1, 1))
                image.load()
                damage = _png_damage(stream) if image.format == "PNG" else ""
                return CheckResult("damaged or truncated", damage) if damage else checked
        except UnidentifiedImageError:
            stream.seek(0)
            if stream.read(16).startswith(_MAGIC):
                return CheckResult("damaged or truncated", "it starts as an image, but its header is damaged")
            return CheckResult("not an image", "no image format fits the file's first bytes")
        except Exception as error:
            # Decoders of hostile bytes raise anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            return CheckResult("damaged or truncated", f"{type(error).__name__}: {error}")


def _container_format(stream: io.BytesIO | io.BufferedReader) -> str:
    """HEIC or AVIF by the brands of the file's first box, whatever Pillow can read; else empty."""
    head = stream.read(64)
    stream.seek(0)
    if head[4:8] != b"ftyp":
        return ""
    # The main brand, a version, and the compatible brands.
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else ""


def _check_header(image: Image.Image, stream: io.BytesIO | io.BufferedReader) -> CheckResult:
    """Format, pixel kind, stored size and orientation of an opened image."""
    fmt, mode = image.format or "unknown", image.mode
    if fmt not in LOADER_FORMATS:
        return CheckResult(f"format {fmt} {NOT_READ}; convert it to JPEG or PNG")
    kind = _unreadable_kind(fmt, mode, image, stream)
    if kind:
        return CheckResult(f"{kind} {NOT_READ}; convert it to JPEG or 8-bit PNG")
    if fmt in ("JPEG", "MPO"):
        damage = _jpeg_damage(stream)
        if damage:
            return CheckResult("damaged or truncated", damage)
    width, height = image.size
    orientation = _exif_orientation(image)
    if fmt == "TIFF" and orientation >= 5:
        # Pillow turns TIFF when it opens it, and reports the turned size.
        width, height = height, width
    return CheckResult(None, "", width, height, orientation)


def _unreadable_kind(fmt: str, mode: str, image: Image.Image, stream: io.BytesIO | io.BufferedReader) -> str:
    """Name of a kind of file that Pillow reads and the loader does not; empty when the loader reads it, too."""
    # Pillow opens 16-bit PGM in its 32-bit mode.
    if mode == "F" or mode.startswith("I;32") or (mode == "I" and fmt not in ("PPM", "PNG")):
        return f"{fmt} with 32 bits a pixel channel"
    if fmt == "TIFF" and _TIFF_BITS_PER_SAMPLE not in getattr(image, "tag_v2", {}):
        return "TIFF without the BitsPerSample tag"
    if fmt == "JPEG2000" and mode == "LA":
        return "JPEG 2000 of grey with transparency"
    if fmt == "BMP":
        position = stream.tell()
        stream.seek(0)
        header = stream.read(34)
        stream.seek(position)
        bits, compression = int.from_bytes(header[28:30], "little"), int.from_bytes(header[30:34], "little")
        if int.from_bytes(header[14:18], "little") >= 40:
            if bits == 16 and compression == 0:
                return "BMP with 16 bits a pixel and no bit masks"
            if compression == 2:
                return "BMP with 4-bit run-length compression"
    return ""


def _jpeg_damage(stream: io.BytesIO | io.BufferedReader) -> str:
    """What is wrong with the segments before the first scan; empty when nothing is.

    libjpeg and Pillow skip stray bytes between segments; the loader's parser fails on them. The stream's position
    is kept.
    """
    position = stream.tell()
    stream.seek(2)
    try:
        while True:
            offset = stream.tell()
            byte = stream.read(1)
            if byte != b"\xff":
                return f"stray bytes between JPEG segments at byte {offset}"
            while byte == b"\xff":
                byte = stream.read(1)
            if not byte or byte in _JPEG_NO_SEGMENT:
                return f"unexpected JPEG marker at byte {offset}"
            if byte in _JPEG_UNUSUAL_FRAMES:
                return "JPEG with arithmetic, lossless or hierarchical coding, which the loader does not read"
            if byte == b"\xda":
                return ""
            length = int.from_bytes(stream.read(2), "big")
            if length < 2:
                return f"JPEG segment of impossible length at byte {offset}"
            stream.seek(length - 2, os.SEEK_CUR)
    finally:
        stream.seek(position)


def _png_damage(stream: io.BytesIO | io.BufferedReader) -> str:
    """What is wrong with the chunks of a PNG; empty when nothing is.

    Pillow decodes in spite of wrong checksums and a cut-off end; libpng as the loader uses it does not.
    """
    stream.seek(8)
    while True:
        head = stream.read(8)
        if len(head) < 8:
            return "the PNG ends without its last chunk"
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body, checksum = stream.read(length), stream.read(4)
        if len(body) < length or len(checksum) < 4:
            return f"the PNG ends within its chunk {kind!r}"
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            return f"wrong checksum of the PNG's chunk {kind!r}"
        if kind == b"IEND":
            return ""


def _exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an opened image; 1 when absent, damaged or invalid."""
    if image.format == "PNG" and "exif" not in image.info:
        # Pillow would decode the whole image to look for an EXIF chunk behind the pixels.
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, struct.error):
        # A damaged EXIF block; the pixels may be fine.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _check_chunk(paths: list[str], level: Literal["decode", "header"], max_pixels: int) -> list[CheckResult]:
    """Check some files."""
    return [check_image(path, level, max_pixels) for path in paths]


def check_images(
    count: int,
    path_of: Callable[[int], str],
    level: Level,
    workers: int | None = None,
    label: str = "images",
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> CheckResults:
    """Check `count` images on all cores.

    Args:
        count: number of images N.
        path_of: index 0..N-1 -> full path; called in this process, in order, shortly before an image is checked.
        level: "decode", "header" or "none" (nothing is opened).
        workers: processes; None takes one per core that this process may use.
        label: names the images in the progress line.
        progress: show progress on standard error.
        max_pixels: width x height of the largest image that is accepted.

    Raises:
        UserError: a worker process died (out of memory, most likely).
    """
    started = time.perf_counter()
    out = CheckResults(
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
    with show_progress(count, f"checking {label}", progress) as advance:
        check = partial(_check_chunk, level=level, max_pixels=max_pixels)
        for start, results in _checked_chunks(count, path_of, check, workers if count >= _POOL_FROM else 1):
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
    count: int, path_of: Callable[[int], str], check: Callable[[list[str]], list[CheckResult]], workers: int
) -> Iterator[tuple[int, list[CheckResult]]]:
    """(first index, results) of each chunk in order, with a bounded number of chunks in work."""

    def chunk(start: int) -> list[str]:
        return [path_of(i) for i in range(start, min(start + _CHUNK, count))]

    starts = iter(range(0, count, _CHUNK))
    if workers == 1:
        for start in starts:
            yield start, check(chunk(start))
        return
    in_work: deque[tuple[int, Future[list[CheckResult]]]] = deque()
    first = 0
    with worker_pool(workers) as pool:
        try:
            for start in starts:
                in_work.append((start, pool.submit(check, chunk(start))))
                if len(in_work) >= 4 * workers:
                    first, future = in_work.popleft()
                    yield first, future.result()
            while in_work:
                first, future = in_work.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that was checking images died near {path_of(first)} (out of memory?); "
                "prepare with --verify header to see which image it is"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
