#!/usr/bin/env python
"""Makes OpenImages releases of any size in the official formats, for tests and for measuring at full scale.

    python benchmarks/make_openimages.py --version v7 --out DIR                       a small release
    python benchmarks/make_openimages.py --version v7 --out DIR --full                as large as the real one
    python benchmarks/make_openimages.py --version v3 --out DIR --pictures 0.2 --layout flat

File names, folders, headers and quoting are those of the releases V3 to V7 (docs/data.md lists them). Content is
random: ids are random 64-bit numbers, class frequencies follow Zipf's law, and everything is a function of the seed.
Rows are written as they are made, so that a file of 58.8 million rows needs a few hundred MB of memory.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from PIL import Image

Version = Literal["v3", "v4", "v5", "v6", "v7"]
Layout = Literal["bucket", "flat", "nested", "tar", "tar.gz"]
Order = Literal["image", "shuffled"]

SPLITS = ("train", "validation", "test")
HEADER = ("ImageID", "Source", "LabelName", "Confidence")
INFO_HEADER = (
    *("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title"),
    *("OriginalSize", "OriginalMD5", "Thumbnail300KURL"),
)
# Pictures, human-verified rows and trainable classes of the whole releases; V5's rows are not published.
FULL_IMAGES = {"train": 9_011_219, "validation": 41_620, "test": 125_436}
FULL_ROWS: dict[str, dict[str, int]] = {
    "v3": {"train": 20_868_755, "validation": 551_390, "test": 1_667_399},
    "v4": {"train": 27_894_289, "validation": 551_390, "test": 1_667_399},
    "v6": {"train": 57_524_352, "validation": 595_339, "test": 1_799_883},
    "v7": {"train": 58_783_034, "validation": 618_184, "test": 2_003_748},
}
FULL_CLASSES = {"v3": 5000, "v4": 7186, "v5": 7186, "v6": 9605, "v7": 9668}
# Pictures made at a time.
_BATCH_IMAGES = 200_000
_HEX = np.frombuffer(b"".join(b"%02x" % i for i in range(256)), np.uint16)


@dataclass
class Release:
    """Where the files of a release lie.

    Attributes:
        labels: split -> CSV of human-verified labels.
        machine: split -> CSV of machine labels, where they were asked for.
        images_info: split -> image list, where it was asked for.
        classes: file of the trainable classes.
        descriptions: file of the class names.
        images: picture folder, or None.
        ids: split -> uint64 ids of all pictures of the split, ascending.
        pictures: split -> uint64 ids of the pictures that were written, ascending.
    """

    labels: dict[str, Path]
    machine: dict[str, Path]
    images_info: dict[str, Path]
    classes: Path
    descriptions: Path
    images: Path | None = None
    ids: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)
    pictures: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)


def hex_ids(ids: npt.NDArray[np.uint64]) -> pa.StringArray:
    """Numeric ids as the 16 hexadecimal digits of the files, zero padded."""
    text = _HEX[ids.astype(">u8").view(np.uint8)]
    offsets = pa.py_buffer(np.arange(len(ids) + 1, dtype=np.int32) * 16)
    return pa.StringArray.from_buffers(len(ids), offsets, pa.py_buffer(text))


def class_ids(number: int) -> list[str]:
    """`number` different class ids that look like those of the releases (/m/0...)."""
    digits = "0123456789bcdfghjklmnpqrstvwxyz_"
    out = []
    for i in range(number):
        # An odd factor walks through all of 32^4 without meeting a value twice.
        value, name = i * 632_459 % 32**4, ""
        for _ in range(4):
            value, digit = divmod(value, 32)
            name += digits[digit]
        out.append(f"/m/0{name}")
    return out


def class_name(place: int) -> str:
    """Display name of the class at `place`; some need CSV quoting, some are not ASCII, two are alike."""
    special = {1: 'Quoted "name"', 2: "Ducks, geese and swans", 3: "Café au lait", 4: "茶", 5: "Twin", 6: "Twin"}
    return special.get(place, f"Class {place}")


def zipf_cdf(number: int, exponent: float = 1.0) -> npt.NDArray[np.float64]:
    """Cumulative probabilities of `number` classes, the first one the most frequent."""
    weight = 1 / np.arange(1, number + 1) ** exponent
    cdf = np.cumsum(weight / weight.sum())
    cdf[-1] = 1
    return cdf


def draw_rows(
    rng: np.random.Generator, images: int, rows: int, cdf: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(image, class) of `rows` different pairs, at least one for each of the images, images ascending and classes in
    no order."""
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
    # One row of each image stays; the surplus comes out of the others.
    spare = np.flatnonzero(~first)
    keep = np.ones(len(keys), bool)
    keep[rng.choice(spare, len(keys) - rows, replace=False, shuffle=False)] = False
    image, classes = image[keep], keys[keep] % num_classes
    order = np.argsort(image * 256 + rng.integers(0, 256, len(image)), kind="stable")
    return image[order], classes[order]


def _label_batches(
    rng: np.random.Generator,
    ids: npt.NDArray[np.uint64],
    rows: int,
    cdf: npt.NDArray[np.float64],
    names: pa.Array,
    machine: bool,
    decimals: bool,
    order: Order,
) -> Iterator[pa.RecordBatch]:
    """Rows of a label file, some hundred thousand images at a time."""
    if order == "shuffled":
        ids = rng.permutation(ids)
    sources = pa.array(["machine"] if machine else ["verification", "crowdsource-verification"])
    values = ["0.0", "1.0"] if decimals else ["0", "1"]
    if machine:
        values = [f"{v / 10:.1f}" for v in range(5, 11)]
    # Frequent classes are verified as present more often, as in the releases (36 per cent positive in V7).
    positive = np.linspace(0.6, 0.25, len(cdf))
    done = 0
    for start in range(0, len(ids), _BATCH_IMAGES):
        part = ids[start : start + _BATCH_IMAGES]
        stop = rows * (start + len(part)) // len(ids)
        image, classes = draw_rows(rng, len(part), stop - done, cdf)
        done = stop
        if order == "shuffled":
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
            names.take(pa.array(classes)),
            pa.array(values).take(pa.array(confidence)),
        ]
        yield pa.RecordBatch.from_arrays(columns, names=list(HEADER))


def _write_labels(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
    with path.open("wb") as file:
        file.write((",".join(HEADER) + "\n").encode())
        for batch in batches:
            pa.csv.write_csv(batch, file, options)


def _write_info(path: Path, rng: np.random.Generator, ids: npt.NDArray[np.uint64], split: str, rotation: bool) -> None:
    """An image list; titles with commas, quotes and other alphabets, some fields empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = ("Sunset", "IMG_0001.JPG", "Rome, Italy", 'The "old" bridge', "夏の日", "Señor, sí", "")
    # 2.6 per cent of the pictures are turned; what is not known is empty or nan.
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


def release_paths(out: Path, version: Version) -> Release:
    """The official file names of a release, below `out`."""
    if version == "v3":
        base = out / "2017_11"
        return Release(
            {s: base / s / "annotations-human.csv" for s in SPLITS},
            {s: base / s / "annotations-machine.csv" for s in SPLITS},
            {s: base / s / "images.csv" for s in SPLITS},
            base / "classes-trainable.txt",
            base / "class-descriptions.csv",
        )
    info = {s: out / "2018_04" / s / f"{s}-images-with-rotation.csv" for s in SPLITS[1:]}
    info["train"] = out / "2018_04" / "train" / "train-images-boxable-with-rotation.csv"
    if version in ("v4", "v5"):
        base = out / ("2018_04" if version == "v4" else "v5")
        folder = {s: base / s if version == "v4" else base for s in SPLITS}
        return Release(
            {s: folder[s] / f"{s}-annotations-human-imagelabels.csv" for s in SPLITS},
            {s: folder[s] / f"{s}-annotations-machine-imagelabels.csv" for s in SPLITS},
            info,
            base / "classes-trainable.txt",
            base / "class-descriptions.csv",
        )
    base, number = out / version, version[1:]
    info["train"] = out / "v6" / "oidv6-train-images-with-labels-with-rotation.csv"

    def labels(kind: str, split: str) -> Path:
        if version == "v6" and split != "train":
            # V6 took over the labels of V5 for these.
            return out / "v5" / f"{split}-annotations-{kind}-imagelabels.csv"
        short = "val" if version == "v7" and split == "validation" else split
        return base / f"oidv{number}-{short}-annotations-{kind}-imagelabels.csv"

    return Release(
        {s: labels("human", s) for s in SPLITS},
        {s: labels("machine", s) for s in SPLITS},
        info,
        base / f"oidv{number}-classes-trainable.txt",
        base / f"oidv{number}-class-descriptions.csv",
    )


def make_release(
    out: str | Path,
    version: Version = "v7",
    *,
    images: Mapping[str, int] | None = None,
    rows: Mapping[str, int] | None = None,
    classes: int = 40,
    other_classes: int = 5,
    machine_rows: Mapping[str, int] | None = None,
    images_info: bool = False,
    decimals: bool = False,
    order: Order = "image",
    pictures: float = 0.0,
    layout: Layout = "bucket",
    seed: int = 0,
) -> Release:
    """Write a release.

    Args:
        out: folder to write to; the official folders are made below it.
        version: v3 to v7.
        images: split (train, validation, test) -> number of pictures with human labels; default 300, 60, 80.
        rows: split -> number of human-verified rows; default 6.5 rows an image, as in V7's training file.
        classes: number of trainable classes.
        other_classes: number of classes that rows may name and that are not trainable.
        machine_rows: split -> number of machine rows; default none.
        images_info: write image lists too (with a column Rotation from V4 on).
        decimals: confidences as 0.0 and 1.0 in place of 0 and 1.
        order: rows grouped by image and sorted by id, or in no order.
        pictures: share of the ids for which a small JPEG is written.
        layout: `bucket` SPLIT/ID.jpg, `flat` ID.jpg, `nested` SPLIT/AB/ID.jpg, `tar` and `tar.gz` tar files.
        seed: of everything.

    Raises:
        ValueError: more or fewer rows than the images and classes allow.
    """
    release = release_paths(Path(out), version)
    images = images or {"train": 300, "validation": 60, "test": 80}
    rows = rows or {s: int(n * 6.5) for s, n in images.items()}
    names = class_ids(classes + other_classes)
    for path in (release.classes, release.descriptions):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    # The order of the file is not that of the frequencies.
    trainable = [names[i] for i in rng.permutation(classes)]
    release.classes.write_text("".join(f"{name}\n" for name in trainable), encoding="utf-8")
    with release.descriptions.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if version in ("v6", "v7"):
            writer.writerow(["LabelName", "DisplayName"])
        writer.writerows([name, class_name(i)] for i, name in enumerate(names))
    # Classes that are not trainable are rare: they stand at the end of Zipf's law.
    cdf, listed = zipf_cdf(len(names)), pa.array(names)
    total = sum(images.values())
    ids = np.unique(rng.integers(0, 2**64, total + total // 100 + 16, dtype=np.uint64))
    # Ids with leading zeros, which must stay 16 digits long.
    ids[:2] = (7, 0xABC)
    ids = rng.permutation(ids)[:total]
    start = 0
    for place, split in enumerate(SPLITS):
        number = images.get(split, 0)
        if not number:
            for paths in (release.labels, release.machine, release.images_info):
                paths.pop(split)
            continue
        mine = np.sort(ids[start : start + number])
        start += number
        release.ids[split] = mine
        rng = np.random.default_rng([seed, 1, place])
        batches = _label_batches(rng, mine, rows[split], cdf, listed, False, decimals, order)
        _write_labels(release.labels[split], batches)
        if machine_rows and machine_rows.get(split):
            batches = _label_batches(rng, mine, machine_rows[split], cdf, listed, True, decimals, order)
            _write_labels(release.machine[split], batches)
        else:
            release.machine.pop(split)
        if images_info:
            _write_info(release.images_info[split], rng, mine, split, rotation=version != "v3")
        else:
            release.images_info.pop(split)
        if pictures:
            chosen = mine[np.sort(rng.permutation(number)[: round(pictures * number)])]
            release.pictures[split] = chosen
            release.images = Path(out) / "images"
            write_pictures(release.images, split, chosen, layout)
    return release


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


def write_pictures(folder: Path, split: str, ids: npt.NDArray[np.uint64], layout: Layout) -> None:
    """Write a small JPEG for each id."""
    files = small_jpegs()
    made: set[Path] = set()
    folder.mkdir(parents=True, exist_ok=True)
    if layout in ("tar", "tar.gz"):
        # The bucket has 16 tar files of training pictures, by the first digit of the id, and one of each other split.
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
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(files[number % len(files)])


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write a release."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--version", choices=["v3", "v4", "v5", "v6", "v7"], default="v7")
    parser.add_argument("--full", action="store_true", help="pictures, rows and classes of the whole release")
    parser.add_argument("--images", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--rows", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="human labels")
    parser.add_argument("--machine-rows", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--classes", type=int, help="trainable classes")
    parser.add_argument("--other-classes", type=int, help="classes that rows name and that are not trainable")
    parser.add_argument("--images-info", action="store_true", help="image lists, with rotation from V4 on")
    parser.add_argument("--decimals", action="store_true", help="confidences 0.0 and 1.0 in place of 0 and 1")
    parser.add_argument("--order", choices=["image", "shuffled"], default="image")
    parser.add_argument("--pictures", type=float, default=0.0, help="share of the ids that get a small JPEG file")
    parser.add_argument("--layout", choices=["bucket", "flat", "nested", "tar", "tar.gz"], default="bucket")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def by_split(values: list[int] | None) -> dict[str, int] | None:
        return None if values is None else dict(zip(SPLITS, values, strict=True))

    images, rows, classes, others = by_split(options.images), by_split(options.rows), options.classes, 1000
    if options.full:
        images, rows = images or FULL_IMAGES, rows or FULL_ROWS.get(options.version)
        classes = classes or FULL_CLASSES[options.version]
    elif classes is None:
        classes, others = 40, 5
    release = make_release(
        options.out,
        options.version,
        images=images,
        rows=rows,
        classes=classes,
        other_classes=others if options.other_classes is None else options.other_classes,
        machine_rows=by_split(options.machine_rows),
        images_info=options.images_info,
        decimals=options.decimals,
        order=options.order,
        pictures=options.pictures,
        layout=options.layout,
        seed=options.seed,
    )
    words = ["python", "launch/prepare.py", "openimages", "--labels"]
    words += [f"{kind}={path}" for kind, path in release.labels.items()]
    if release.machine:
        words += ["--machine-labels", *(f"{kind}={path}" for kind, path in release.machine.items())]
    if release.images_info and options.version != "v3":
        words += ["--images-info", *map(str, release.images_info.values())]
    words += ["--classes", str(release.classes), "--descriptions", str(release.descriptions)]
    print(shlex.join([*words, "--images", str(release.images or "none"), "--out", "DIR"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
