"""Copies of images that the loader does not read, as JPEG or PNG: `prepare --convert`.

A copy holds the first frame, its pixels as they are stored and the EXIF orientation beside them, so that whatever is
said of the image (boxes, sizes, which way is up) holds of the copy. What was lossy becomes JPEG of quality 95 without
colour subsampling; what is lossless or has transparency becomes PNG. Colours of another profile become sRGB, which is
what the loader takes all images for.

GIF, AVIF (Pillow 11.3 or newer), ICO, TGA and the rest are read by Pillow, HEIC by pillow-heif.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageCms

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.core.progress import show_progress
from spml_fast.core.workers import worker_pool
from spml_fast.data.image_check import NOT_READ, CheckResult, CheckResults, any_size, check_bytes, limit_text
from spml_fast.prepare.raw import CommonOptions, RawSplit

# Folder of the copies within a Manifest.
FOLDER = "converted"
JPEG_QUALITY = 95
_LOSSY = ("AVIF", "HEIF", "JPEG2000", "WEBP")
_ORIENTATION = 0x0112
# Below this, starting processes takes longer than converting.
_POOL_FROM = 16


class Copy(NamedTuple):
    """What became of an image.

    Attributes:
        result: of checking the copy; its `reason` says why there is none.
        name: of the copy, relative to the folder of the copies.
    """

    result: CheckResult
    name: str


def kind_of(reason: str) -> str | None:
    """The kind of image that the loader does not read, by the reason for which it was left out; None for others."""
    return reason.partition(NOT_READ)[0].removeprefix("format ").strip() if NOT_READ in reason else None


def can_convert(reason: str) -> bool:
    """Whether an image that was left out for that reason can be copied; 32-bit pixels have no fixed white."""
    return kind_of(reason) is not None and "32 bits" not in reason


def require_decoders(reasons: Sequence[str]) -> None:
    """Raise `UserError` where a library is missing that these images need."""
    kinds = {kind_of(reason) for reason in reasons}
    if "AVIF" in kinds and ".avif" not in Image.registered_extensions():
        raise UserError("this Pillow reads no AVIF, which --convert needs here: pip install 'pillow>=11.3'")
    if "HEIC" in kinds:
        _register_heic()


def _register_heic() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError("--convert needs pillow-heif for HEIC images: pip install 'spml_fast[heic]'") from error
    pillow_heif.register_heif_opener()


def copy_name(path: str, row: int, split: str) -> str:
    """Where an image's copy goes, without its new ending.

    Args:
        path: of the image, relative to the image root or absolute.
        row: its number in the official split.
        split: name of that.
    """
    parts = Path(path).parts
    inside = bool(parts) and not os.path.isabs(path) and ".." not in parts and len(os.fsencode(parts[-1])) < 200
    return os.path.join(split, path if inside else f"{row:08d}")


def encode(data: bytes, max_pixels: int) -> tuple[bytes, str]:
    """An image as JPEG or PNG, and the ending of its name.

    Args:
        data: the encoded image.
        max_pixels: width x height of the largest one that is decoded.

    Raises:
        TooManyPixels: it is larger.
        Exception: whatever Pillow raises for damaged images.
    """
    with any_size(), warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"{image.width} x {image.height}; {limit_text(max_pixels)}")
        lossy, profile = image.format in _LOSSY, image.info.get("icc_profile")
        image.seek(0)
        image.load()
        # Asked for afterwards: of some formats (TIFF) Pillow turns the pixels when it loads them, and forgets the tag.
        orientation = image.getexif().get(_ORIENTATION, 1)
        pixels = _plain(image, profile)
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    out = io.BytesIO()
    if lossy and pixels.mode in ("L", "RGB"):
        pixels.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=exif)
        return out.getvalue(), ".jpg"
    pixels.save(out, "PNG", exif=exif)
    return out.getvalue(), ".png"


class TooManyPixels(ValueError):
    """An image is larger than what is decoded."""


def _plain(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Pixels of 8 bits, grey or RGB, with transparency where there is some, in sRGB."""
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if grey else "RGBA") if transparent else ("L" if grey else "RGB")
    plain = image if image.mode == mode else image.convert(mode)
    if not profile:
        return plain
    # A profile speaks of the colours alone, of four of them in CMYK.
    alpha = plain.getchannel("A") if transparent else None
    colours = image if image.mode == "CMYK" else plain.convert("L" if grey else "RGB") if transparent else plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        changed = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        # A damaged profile; the loader would not look at it either.
        return plain
    assert changed is not None
    if alpha is not None:
        changed.putalpha(alpha)
    return changed


def _convert_one(job: tuple[str, str], folder: Path, heic: bool, max_pixels: int) -> Copy:
    """Copy one image (full path, name of its copy) and check the copy."""
    source, name = job
    if heic:
        _register_heic()
    try:
        with open_regular(source) as file:
            content = file.read()
    except OSError as error:
        return Copy(CheckResult("unreadable file", error.strerror or str(error)), name)
    try:
        data, ending = encode(content, max_pixels)
    except TooManyPixels as error:
        return Copy(CheckResult("too many pixels", str(error)), name)
    except MemoryError:
        raise
    except Exception as error:
        # Decoders of hostile bytes raise anything.
        return Copy(CheckResult("damaged or truncated", f"{type(error).__name__}: {error}"), name)
    path = folder / (name + ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Copy(check_bytes(data, "header", max_pixels), name + ending)


def convert_images(
    jobs: Sequence[tuple[str, str]],
    folder: Path,
    heic: bool,
    max_pixels: int,
    workers: int | None = None,
    progress: bool = True,
) -> list[Copy]:
    """Copy images on all cores.

    Args:
        jobs: full path of each image, and the name of its copy without the ending.
        folder: of the copies.
        heic: HEIC is among them.
        max_pixels: width x height of the largest image that is decoded.
        workers: processes; None takes one per core that this process may use.
        progress: show progress on standard error.

    Raises:
        UserError: a worker process died (out of memory, most likely).
        OSError: a copy cannot be written.
    """
    work = partial(_convert_one, folder=folder, heic=heic, max_pixels=max_pixels)
    workers = workers or len(os.sched_getaffinity(0))
    copies: list[Copy] = []
    with show_progress(len(jobs), "converting images", progress) as advance:
        if workers == 1 or len(jobs) < _POOL_FROM:
            for job in jobs:
                copies.append(work(job))
                advance(1)
            return copies
        with worker_pool(workers) as pool:
            try:
                for copy in pool.map(work, jobs, chunksize=4):
                    copies.append(copy)
                    advance(1)
            except BrokenProcessPool as error:
                place = jobs[len(copies)][0]
                raise UserError(f"a process that was converting images died near {place} (out of memory?)") from error
    return copies


def convert_rejected(
    official: RawSplit, checked: CheckResults, root: Path, folder: Path, prefix: str, common: CommonOptions
) -> tuple[RawSplit, list[dict[str, str]]]:
    """Copy the images of a split that the loader does not read; `checked` then holds what their copies are like.

    Args:
        official: the split.
        checked: of all of its rows.
        root: folder of the images.
        folder: where copies are written.
        prefix: of the copies' names in the split's paths.
        common: options of every data set.

    Returns:
        The split with the paths of the copies, and an entry for the report of each.

    Raises:
        UserError: a library is missing, or a worker process died.
    """
    rows = [row for row, (reason, _) in checked.rejected.items() if can_convert(reason)]
    if not rows:
        return official, []
    reasons = [checked.rejected[row][0] for row in rows]
    require_decoders(reasons)
    kinds = [kind_of(reason) or "" for reason in reasons]
    named = [official.relative_path(row) for row in rows]
    names = [copy_name(path, row, official.name) for path, row in zip(named, rows, strict=True)]
    jobs = [(os.path.join(root, path), name) for path, name in zip(named, names, strict=True)]
    copies = convert_images(jobs, folder, "HEIC" in kinds, common.max_pixels, common.workers, common.progress)
    made: dict[int, str] = {}
    entries = []
    for row, copy, path, kind in zip(rows, copies, named, kinds, strict=True):
        if copy.result.reason is not None:
            checked.rejected[row] = copy.result.reason, copy.result.detail
            continue
        del checked.rejected[row]
        made[row] = os.path.join(prefix, copy.name)
        checked.ok[row], checked.orientation[row] = True, copy.result.orientation
        checked.width[row], checked.height[row] = copy.result.width, copy.result.height
        entries.append({"split": official.name, "path": path, "copy": made[row], "kind": kind})
    paths = [made.get(row) or official.relative_path(row) for row in range(len(official))]
    return replace(official, paths=paths, ids=None, template=None, template_of=None), entries
