"""One image on its way into a shard: read, checked, and shrunk if asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from spml_fast.core.config import MAX_PIXELS
from spml_fast.data.image_check import Level, check_bytes
from spml_fast.data.manifest import Split

# What shows an image with that EXIF orientation upright.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_ENDINGS = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
}


@dataclass(frozen=True)
class PackedImage:
    """An image as it is stored in a shard.

    Attributes:
        data: the encoded bytes.
        ending: file name ending, by content.
        width: width in pixels as shown.
        height: height in pixels as shown.
        orientation: EXIF orientation 1..8 that the loader must apply.
    """

    data: bytes
    ending: str
    width: int
    height: int
    orientation: int


class UnusableImageError(Exception):
    """An image that cannot be packed.

    Attributes:
        reason: in the same words for the same fault, so that faults can be counted.
        detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def file_ending(data: bytes, path: str) -> str:
    """File name ending of an encoded image by content, else by `path`; webdataset chooses a decoder by it."""
    for magic, ending in _ENDINGS.items():
        if data.startswith(magic):
            return ending
    if data[:1] == b"P" and data[1:2] in b"123456" and len(data) > 1:
        return "ppm"
    last = PurePosixPath(path).suffix[1:].lower()
    return last if last.isalnum() and last.isascii() else "bin"


def shrink(data: bytes, orientation: int, short_side: int, quality: int) -> tuple[bytes, int, int] | None:
    """A JPEG of the image as shown with that short side, and its width and height; None when it stays as it is.

    A shrunk image is stored upright and without EXIF data. TIFF with an orientation of its own stays as it is,
    because Pillow turns it where the loader does not.

    Args:
        data: the encoded image.
        orientation: EXIF orientation 1..8 to apply.
        short_side: in pixels.
        quality: JPEG quality, 1 to 95.
    """
    with Image.open(io.BytesIO(data)) as stored:
        width, height = stored.size
        short = min(width, height)
        if short <= short_side or (stored.format == "TIFF" and stored.getexif().get(_ORIENTATION_TAG, 1) != 1):
            return None
        scaled = [max(1, round(side * short_side / short)) for side in (width, height)]
        if stored.format in ("JPEG", "MPO"):
            # Decoded at a lower resolution, but at twice that of the result or more: faster, and as sharp.
            stored.draft(stored.mode, (2 * scaled[0], 2 * scaled[1]))
        if stored.mode.startswith("I"):
            # Sixteen bits; Pillow would clip them where the loader takes the high byte.
            grey = Image.fromarray((np.asarray(stored).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            image: Image.Image = grey.convert("RGB")
        else:
            image = stored.convert("RGB")
    image = image.resize((scaled[0], scaled[1]), Image.Resampling.LANCZOS)
    turn = _TRANSPOSE.get(orientation)
    if turn is not None:
        image = image.transpose(turn)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue(), image.width, image.height


def make_image(data: bytes, split: Split, row: int, level: Level, short_side: int | None, quality: int) -> PackedImage:
    """Check an image, and shrink it if asked to.

    Args:
        data: the encoded image.
        split: the split that it belongs to.
        row: its sample index.
        level: how closely it is checked.
        short_side: as in `PackOptions`.
        quality: as in `PackOptions`.

    Raises:
        UnusableImageError: it is damaged, or has another size than the Manifest says.
    """
    orientation = int(split.orientation[row])
    width, height = int(split.width[row]), int(split.height[row])
    # What the Manifest knows was accepted when it was prepared.
    limit = max(MAX_PIXELS, width * height)
    if level != "none" or short_side is not None:
        checked = check_bytes(data, "header", limit)
        if checked.reason is not None:
            raise UnusableImageError(checked.reason, checked.detail)
        shown = (checked.width, checked.height) if orientation < 5 else (checked.height, checked.width)
        if width and height and shown != (width, height):
            raise UnusableImageError(
                "another size than when the data were prepared",
                f"{shown[0]} x {shown[1]} pixels now, {width} x {height} then",
            )
        width, height = shown
    if short_side is not None:
        try:
            shrunk = shrink(data, orientation, short_side, quality)
        except Exception as error:
            # Decoders of damaged bytes raise anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            raise UnusableImageError("damaged or truncated", f"{type(error).__name__}: {error}") from error
        if shrunk is not None:
            return PackedImage(shrunk[0], "jpg", shrunk[1], shrunk[2], 1)
    if level == "decode":
        checked = check_bytes(data, "decode", limit)
        if checked.reason is not None:
            raise UnusableImageError(checked.reason, checked.detail)
    return PackedImage(data, file_ending(data, split.relative_path(row)), width, height, orientation)


def read_image(split: Split, row: int) -> bytes:
    """The stored bytes of an image.

    Raises:
        UnusableImageError: its file is missing or unreadable.
        UserError: its shard is.
    """
    try:
        return split.read(row)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnusableImageError("missing file") from error
    except OSError as error:
        raise UnusableImageError("unreadable file", error.strerror or str(error)) from error
