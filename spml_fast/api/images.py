"""Images as people have them in Python (paths, PIL images, arrays) for the loader, which reads files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.image_check import check_images, choose_level
from spml_fast.data.image_files import ImageFiles, find_images

Images = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Iterable[Any]


@dataclass(frozen=True)
class OpenedImages:
    """Images that the loader can read.

    Attributes:
        files: the images.
        names: what each is called in a table: its path as it was found, the file name of a PIL image, or its number.
    """

    files: ImageFiles
    names: Sequence[str]


@contextlib.contextmanager
def open_images(images: Images, skip_invalid: bool = False) -> Iterator[OpenedImages]:
    """Yield the images as files; those in memory are written losslessly to a temporary folder for as long.

    Args:
        images: one image or several: paths of files, directories to search with all below them, PIL images (turned as
            their EXIF data say, as files are), or uint8 RGB arrays [H, W, 3] or [N, H, W, 3].
        skip_invalid: leave out images that cannot be read, with a warning; else the first one is an error.

    Raises:
        UserError: nothing given, an image that cannot be read, or something that is no image.
    """
    with contextlib.ExitStack() as stack:
        paths: list[str] = []
        names: list[str] = []
        folder: Path | None = None
        for place, item in enumerate(_listed(images)):
            if isinstance(item, str | os.PathLike):
                found = find_images([os.fspath(item)], lambda text: warnings.warn(text, stacklevel=2))
                paths += found
                names += found
                continue
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spml_images")))
            path = folder / f"{place}.ppm"
            _write_ppm(path, _pixels(item, place))
            paths.append(str(path))
            names.append(str(getattr(item, "filename", "") or place))
        if not paths:
            raise UserError("no image given; give paths, PIL images or uint8 arrays [H, W, 3]")
        checked = check_images(len(paths), paths.__getitem__, choose_level(None, len(paths)), progress=False)
        for index, (reason, detail) in checked.rejected.items():
            text = f"{printable(names[index])} cannot be used: {reason}" + (f" ({detail})" if detail else "")
            if not skip_invalid:
                raise UserError(f"{text}; leave it out, or give skip_invalid=True to leave out all such images")
            warnings.warn(text, stacklevel=3)
        usable = np.flatnonzero(checked.ok)
        files = ImageFiles([paths[i] for i in usable], checked.orientation[usable])
        yield OpenedImages(files, [names[i] for i in usable])


def _listed(images: Images) -> Iterable[Any]:
    """One item an image, directories aside."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim == 3 else list(images)
    return images


def _pixels(item: Any, place: int) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3] of a PIL image or an array."""
    if isinstance(item, Image.Image):
        return np.asarray(ImageOps.exif_transpose(item).convert("RGB"))
    if not isinstance(item, np.ndarray):
        raise UserError(
            f"image {place} is a {type(item).__name__}; give a path, a PIL image or a uint8 array [H, W, 3]"
        )
    if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
        shape = ", ".join(map(str, item.shape))
        raise UserError(f"image {place} is an array of {item.dtype} [{shape}]; it must be uint8 RGB [H, W, 3]")
    return item


def _write_ppm(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write pixels as they are."""
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes())
