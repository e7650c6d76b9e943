"""What files of OpenImages hold, made at random: ids, classes, label rows, image lists, small JPEG files."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from PIL import Image

Layout = Literal["bucket", "flat", "nested", "tar", "tar.gz"]
Order = Literal["image", "shuffled"]
HEADER = ("ImageID", "Source", "LabelName", "Confidence")
INFO_HEADER = (
    *("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title"),
    *("OriginalSize", "OriginalMD5", "Thumbnail300KURL"),
)
# Images whose rows are made at a time.
_BATCH_IMAGES = 200_000
_HEX = np.frombuffer(b"".join(b"%02x" % i for i in range(256)), np.uint16)


def hex_ids(ids: npt.NDArray[np.uint64]) -> pa.StringArray:
    """Numeric ids as the 16 hexadecimal digits of the files, zero padded."""
    text = _HEX[ids.astype(">u8").view(np.uint8)]
    offsets = pa.py_buffer(np.arange(len(ids) + 1, dtype=np.int32) * 16)
    return pa.StringArray.from_buffers(len(ids), offsets, pa.py_buffer(text))


def class_ids(number: int, all_forms: bool = False) -> list[str]:
    """`number` different class ids that look like those of the releases: /m/0..., in V7 /g/... and /oi/m_0... too."""
    digits = "0123456789bcdfghjklmnpqrstvwxyz_"
    out = []
    for i in range(number):
        # With an odd factor no value comes twice within 32^4 of them.
        value, name = i * 632_459 % 32**4, ""
        for _ in range(4):
            value, digit = divmod(value, 32)
            name += digits[digit]
        # V7 has 47 ids of the second form and ten of the third among 20,931.
        start = {7: "/g/11", 9: "/oi/m_0"}.get(i % 40, "/m/0") if all_forms else "/m/0"
        out.append(start + name)
    return out


def class_name(number: int) -> str:
    """Display name of a class by its number; some need CSV quoting, some are not ASCII, two are equal."""
    special = {1: 'Quoted "name"', 2: "Ducks, geese and swans", 3: "Café au lait", 4: "茶", 5: "Twin", 6: "Twin"}
    return special.get(number, f"Class {number}")


def zipf_cdf(number: int, exponent: float = 1.0) -> npt.NDArray[np.float64]:
    """Cumulative probabilities of `number` classes, the first one the most frequent."""
    weight = 1 / np.arange(1, number + 1) ** exponent
    cdf = np.cumsum(weight / weight.sum())
    cdf[-1] = 1
    return cdf


def draw_rows(
    rng: np.random.Generator, images: int, rows: int, cdf: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw different (image, class) pairs, at least one for each image.

    Args:
        rng: random numbers.
        images: number of images N.
        rows: number of pairs.
        cdf: float64 [C], cumulative probabilities of the classes.

    Returns:
        image int64 [rows], ascending, and class int64 [rows], in no order.

    Raises:
        ValueError: there are fewer pairs than images, or more than N x C.
    """
    if rows < images:
        raise ValueError(f"{rows} rows are too few for {images} images")
    num_classes = len(cdf)
    if rows > images * num_classes:
        raise ValueError(f"{rows} rows are too many for {images} images x {num_classes} classes")
    keys = np.empty(0, np.int64)
    while len(keys) < rows:
        missing = max(int(1.2 * (rows - len(keys))), 16)
        image = rng.integers(0, images, missing)
        if not len(keys):
            image = np.concatenate([np.arange(images), image])
        drawn = image * num_classes + np.searchsorted(cdf, rng.random(len(image)), side="right")
        keys = np.unique(np.concatenate([keys, drawn]))
    image = keys // num_classes
    first = np.ones(len(keys), bool)
    first[1:] = image[1:] != image[:-1]
    # One row of each image stays; the surplus is taken from the others.
    optional = np.flatnonzero(~first)
    keep = np.ones(len(keys), bool)
    keep[rng.choice(optional, len(keys) - rows, replace=False, shuffle=False)] = False
    image, classes = image[keep], keys[keep] % num_classes
    order = np.argsort(image * 256 + rng.integers(0, 256, len(image)), kind="stable")
    return image[order], classes[order]


@dataclass(frozen=True)
class RowOptions:
    """How the rows of label files look.

    Attributes:
        cdf: float64 [C], cumulative probabilities of the classes.
        class_ids: their ids.
        decimals: confidences as 0.0 and 1.0 in place of 0 and 1.
        order: rows grouped by image and sorted by id, or in no order.
    """

    cdf: npt.NDArray[np.float64]
    class_ids: pa.Array
    decimals: bool
    order: Order


def write_labels(
    path: Path, rng: np.random.Generator, ids: npt.NDArray[np.uint64], rows: int, machine: bool, options: RowOptions
) -> None:
    """Write a label file.

    Args:
        path: the file.
        rng: random numbers.
        ids: uint64 [N] ids of the images, ascending.
        rows: number of rows.
        machine: of machine labels.
        options: how the rows look.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    style = pa.csv.WriteOptions(include_header=False, quoting_style="none")
    with path.open("wb") as file:
        file.write((",".join(HEADER) + "\n").encode())
        for batch in _label_batches(rng, ids, rows, machine, options):
            pa.csv.write_csv(batch, file, style)


def _label_batches(
    rng: np.random.Generator, ids: npt.NDArray[np.uint64], rows: int, machine: bool, options: RowOptions
) -> Iterator[pa.RecordBatch]:
    """Rows of a label file, some hundred thousand images at a time."""
    if options.order == "shuffled":
        ids = rng.permutation(ids)
    sources = pa.array(["machine"] if machine else ["verification", "crowdsource-verification"])
    values = ["0.0", "1.0"] if options.decimals else ["0", "1"]
    if machine:
        values = [f"{v / 10:.1f}" for v in range(5, 11)]
    # Frequent classes are verified as present more often, as in the releases (36 per cent positive in V7).
    positive = np.linspace(0.6, 0.25, len(options.cdf))
    done = 0
    for start in range(0, len(ids), _BATCH_IMAGES):
        part = ids[start : start + _BATCH_IMAGES]
        stop = rows * (start + len(part)) // len(ids)
        image, classes = draw_rows(rng, len(part), stop - done, options.cdf)
        done = stop
        if options.order == "shuffled":
            mixed = rng.permutation(len(image))
            image, classes = image[mixed], classes[mixed]
        if machine:
            source, confidence = np.zeros(len(image), np.int32), rng.integers(0, len(values), len(image))
        else:
            source = (rng.random(len(image)) < 0.1).astype(np.int32)
            confidence = (rng.random(len(image)) < positive[classes]).astype(np.int64)
        columns = [
            hex_ids(part[image]),
            sources.take(pa.array(source)),
            options.class_ids.take(pa.array(classes)),
            pa.array(values).take(pa.array(confidence)),
        ]
        yield pa.RecordBatch.from_arrays(columns, names=list(HEADER))


def write_image_list(
    path: Path, rng: np.random.Generator, ids: npt.NDArray[np.uint64], split: str, rotation: bool
) -> None:
    """Write an image list; titles have commas, quotes and other alphabets, and some fields are empty.

    Args:
        path: the file.
        rng: random numbers.
        ids: uint64 [N] ids of the images.
        split: their split.
        rotation: with a column Rotation.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = ("Sunset", "IMG_0001.JPG", "Rome, Italy", 'The "old" bridge', "夏の日", "Señor, sí", "")
    # 2.6 per cent of the images are turned; an unknown rotation is empty or nan.
    turns, borders = ("0.0", "90.0", "180.0", "270.0", "", "nan"), [0.85, 0.859, 0.864, 0.876, 0.95]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*INFO_HEADER, "Rotation") if rotation else INFO_HEADER)
        for start in range(0, len(ids), _BATCH_IMAGES):
            part = ids[start : start + _BATCH_IMAGES].tolist()
            draws = rng.integers(0, 2**31, len(part)).tolist()
            turned = np.searchsorted(borders, rng.random(len(part)), side="right").tolist()
            for number, draw, turn in zip(part, draws, turned, strict=True):
                row = [
                    f"{number:016x}",
                    split,
                    f"https://farm6.staticflickr.com/1/{draw}_o.jpg",
                    f"https://www.flickr.com/photos/someone/{draw}",
                    "https://creativecommons.org/licenses/by/2.0/",
                    "https://www.flickr.com/people/someone/",
                    ("Some One", "One, Some")[draw % 2],
                    titles[draw % len(titles)],
                    draw % 5_000_000,
                    "2SCTBw3jbNGTnnA8ZHwIFg==",
                    f"https://c1.staticflickr.com/1/{draw}_z.jpg" if draw % 40 else "",
                ]
                writer.writerow([*row, turns[turn]] if rotation else row)


def small_jpegs(number: int = 16) -> list[bytes]:
    """A few small JPEG files of different sizes and colours."""
    out = []
    for i in range(number):
        y, x = np.mgrid[0 : 32 + i, 0 : 48 - i]
        pixels = np.stack([x * 5, y * 5, (x + y) * (i + 1)], -1).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        out.append(buffer.getvalue())
    return out


def write_images(folder: Path, split: str, ids: npt.NDArray[np.uint64], layout: Layout) -> None:
    """Write a small JPEG for each id.

    Args:
        folder: the image folder.
        split: of the images.
        ids: uint64 [N].
        layout: as in `make_release`.
    """
    files = small_jpegs()
    folders: set[Path] = set()
    folder.mkdir(parents=True, exist_ok=True)
    if layout in ("tar", "tar.gz"):
        # The bucket has 16 tar files of training images, by the first digit of the id, and one of each other split.
        groups: dict[str, list[int]] = {}
        for number in ids.tolist():
            groups.setdefault(f"train_{number >> 60:x}" if split == "train" else split, []).append(number)
        for name, members in groups.items():
            mode: Any = "w:gz" if layout == "tar.gz" else "w"
            with tarfile.open(folder / f"{name}.{layout}", mode) as tar:
                for number in members:
                    info = tarfile.TarInfo(f"{name}/{number:016x}.jpg")
                    info.size = len(files[number % len(files)])
                    tar.addfile(info, io.BytesIO(files[number % len(files)]))
        return
    for number in ids.tolist():
        name = f"{number:016x}.jpg"
        path = {"bucket": folder / split, "flat": folder, "nested": folder / split / name[:2]}[layout] / name
        if path.parent not in folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.add(path.parent)
        path.write_bytes(files[number % len(files)])
