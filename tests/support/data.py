"""Raw data in the official formats, made on the fly: a small VOC tree, COCO JSON, odd and broken images."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter

WIDTH, HEIGHT = 48, 32
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def pixels(width: int = WIDTH, height: int = HEIGHT) -> npt.NDArray[np.uint8]:
    """A smooth coloured image uint8 [H, W, 3] that no flip or turn leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256], -1).astype(np.uint8)


def drawn_image(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """The same as an RGB image."""
    return Image.fromarray(pixels(width, height))


def encoded(image: Image.Image | None = None, fmt: str = "JPEG", **options: Any) -> bytes:
    """Bytes of an image file."""
    buffer = io.BytesIO()
    (image or drawn_image()).save(buffer, fmt, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    """EXIF data with that orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def png_chunk(kind: bytes, body: bytes, wrong: bool = False) -> bytes:
    """One chunk of a PNG, with a wrong checksum if asked for."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def good_images() -> dict[str, bytes]:
    """File name -> bytes of odd images of 48 x 32 (as stored) that the loader reads."""
    image = drawn_image()
    grey16 = Image.fromarray((np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 40).astype(np.uint16))
    jpeg = encoded()
    return {
        "plain.jpg": jpeg,
        "progressive.jpg": encoded(progressive=True),
        "grey.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "fill bytes.jpg": jpeg[:20] + b"\xff\xff" + jpeg[20:],
        "trailing.jpg": jpeg + b"more" * 50,
        "turned.jpg": encoded(exif=exif(6)),
        "mpo.jpg": encoded(fmt="MPO", save_all=True, append_images=[image]),
        "rgb.png": encoded(fmt="PNG"),
        "turned.png": encoded(fmt="PNG", exif=exif(8)),
        "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG"),
        "grey16.png": encoded(grey16, "PNG"),
        "grey alpha.png": encoded(image.convert("LA"), "PNG"),
        "one bit.png": encoded(image.convert("1"), "PNG"),
        "lossy.webp": encoded(fmt="WEBP"),
        "lossless.webp": encoded(fmt="WEBP", lossless=True),
        "rgb.bmp": encoded(fmt="BMP"),
        "rgb.tif": encoded(fmt="TIFF"),
        "turned.tif": encoded(fmt="TIFF", exif=exif(6)),
        "rgb.ppm": encoded(fmt="PPM"),
        "name with spaces.jpg": jpeg,
        "ünï-cödé-日本-🦊.jpg": jpeg,
        "wrong extension.txt": jpeg,
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, part of the reason for which it must be left out)."""
    jpeg, png = encoded(quality=95), encoded(fmt="PNG")
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "damaged or truncated"),
        "truncated a little.jpg": (jpeg[:-2], "damaged or truncated"),
        "truncated progressive.jpg": (encoded(progressive=True, quality=95)[:-40], "damaged or truncated"),
        "stray bytes.jpg": (jpeg[:20] + b"\0\0" + jpeg[20:], "damaged or truncated"),
        "restart marker.jpg": (jpeg[:20] + b"\xff\xd0" + jpeg[20:], "damaged or truncated"),
        "truncated.png": (png[: len(png) // 2], "damaged or truncated"),
        "no end.png": (png[:-12], "damaged or truncated"),
        "checksum.png": (png.replace(png[-16:-12], bytes(4)), "damaged or truncated"),
        "truncated.webp": (encoded(fmt="WEBP")[:-60], "damaged or truncated"),
        "truncated.bmp": (encoded(fmt="BMP")[:-60], "damaged or truncated"),
        "empty.jpg": (b"", "empty file"),
        "page.jpg": (b"<html>not found</html>", "not an image"),
        "a.gif": (encoded(fmt="GIF"), "format GIF"),
        "gif inside.jpg": (encoded(fmt="GIF"), "format GIF"),
        "a.ico": (encoded(fmt="ICO"), "format ICO"),
        "float.tif": (encoded(drawn_image().convert("F"), "TIFF"), "32 bits"),
        "integer.tif": (encoded(drawn_image().convert("I"), "TIFF"), "32 bits"),
        "15 bit.bmp": (_bmp16(), "BMP with 16 bits"),
    }


def _bmp16() -> bytes:
    data = bytes(4 * 4 * 2)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + info + data


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by name and return the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_voc(root: Path, train: int = 20, val: int = 6, xml: bool = True) -> Path:
    """A VOC tree of 20 classes: image i of a split has class i mod 20, every third also `person`, every fourth a
    difficult `dog`.

    Args:
        root: folder to make.
        train: official training images.
        val: official validation images.
        xml: write annotation files.

    Returns:
        The folder that holds ImageSets.
    """
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    names = {"train": [f"2008_{i:06d}" for i in range(train)], "val": [f"2009_{i:06d}" for i in range(val)]}
    for split, listed in names.items():
        (main / f"{split}.txt").write_text("".join(f"{n}\n" for n in listed))
        for c, class_name in enumerate(VOC_CLASSES):
            lines = [f"{n} {voc_flag(i, c):2d}\n" for i, n in enumerate(listed)]
            # The order of lines in a file says nothing.
            (main / f"{class_name}_{split}.txt").write_text("".join(reversed(lines)))
        for i, name in enumerate(listed):
            (root / "JPEGImages" / f"{name}.jpg").write_bytes(encoded())
            if xml:
                objects = "".join(
                    f"<object><name>{class_name}</name><difficult>{int(voc_flag(i, c) == 0)}</difficult>"
                    "<bndbox><xmin>13</xmin><ymin>9</ymin><xmax>24</xmax><ymax>16</ymax></bndbox></object>"
                    for c, class_name in enumerate(VOC_CLASSES)
                    if voc_flag(i, c) >= 0
                )
                size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
                text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
                (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def voc_flag(i: int, c: int) -> int:
    """Flag of class c in image i of the tree: 1 positive, 0 difficult, -1 absent."""
    if c == i % 20 or (c == VOC_CLASSES.index("person") and i % 3 == 0):
        return 1
    return 0 if c == VOC_CLASSES.index("dog") and i % 4 == 0 else -1


COCO_CATEGORIES = [{"id": 7, "name": "zebra"}, {"id": 1, "name": "ant"}, {"id": 90, "name": "traffic light"}]


def coco_instances(labels: Mapping[int, Sequence[int]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> dict[str, Any]:
    """An instances file: image id -> category ids, one box each; images without categories are listed too."""
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": size[0], "height": size[1]}
        for i in sorted(labels, reverse=True)
    ]
    pairs = [(i, c) for i, categories in labels.items() for c in categories]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": [12, 8, 12, 8], "iscrowd": 0}
        for n, (i, c) in enumerate(pairs)
    ]
    return {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}


def make_coco(folder: Path, name: str, labels: Mapping[int, Sequence[int]]) -> tuple[Path, Path]:
    """Write an instances file and its images. Returns (JSON file, image folder)."""
    images = write_files(folder / name, {f"{i:012d}.jpg": encoded() for i in labels})
    path = folder / f"instances_{name}.json"
    path.write_text(json.dumps(coco_instances(labels)))
    return path, images


# Paths that are hard to store: spaces, other alphabets, bytes that are not UTF-8, nothing at all.
ODD_PATHS = ["a.jpg", "sub folder/ünï.jpg", "日本/🦊.png", "not\udcffutf8.jpg", ""]


def small_labels(size: int = 5) -> SparseLabels:
    """Full labels of three classes; sample i has class i mod 3."""
    return SparseLabels.from_positives([[i % 3] for i in range(size)], 3, 0)


def write_manifest(
    folder: Path, image_root: Path, classes: Sequence[str] = ("ant", "bee", "cat"), overwrite: bool = False
) -> Manifest:
    """A Manifest of `ODD_PATHS` with `small_labels`, without their images.

    Args:
        folder: the Manifest.
        image_root: image folder that it names.
        classes: names of its three classes.
        overwrite: replace an older Manifest.
    """
    writer = ManifestWriter(folder, "mine", classes, image_root, overwrite)
    writer.add_split("train", known=small_labels(), width=range(1, 6), height=range(6, 11), paths=ODD_PATHS)
    return writer.finish({"note": "ü"})


def some_labels(images: int, classes: int, each: int, seed: int = 0) -> SparseLabels:
    """Partly known labels, rare classes at the end.

    Args:
        images: number of samples.
        classes: number of classes.
        each: labels drawn per image; repeated ones count once.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)
    rows = np.repeat(np.arange(images), each)
    chosen = rng.choice(classes, images * each, p=frequency / frequency.sum())
    keys = np.unique(rows * classes + chosen)
    codes = (rng.random(len(keys)) < 0.6).astype(np.int8)
    return SparseLabels.from_entries(keys // classes, keys % classes, codes, images, classes)
