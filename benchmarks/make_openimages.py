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
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.openimages_content import (
    Layout,
    Order,
    RowOptions,
    class_ids,
    class_name,
    write_image_list,
    write_images,
    write_labels,
    zipf_cdf,
)

Version = Literal["v3", "v4", "v5", "v6", "v7"]
SPLITS = ("train", "validation", "test")
# Images, human-verified rows and trainable classes of the whole releases; V5's rows are not published.
FULL_IMAGES = {"train": 9_011_219, "validation": 41_620, "test": 125_436}
FULL_ROWS: dict[str, dict[str, int]] = {
    "v3": {"train": 20_868_755, "validation": 551_390, "test": 1_667_399},
    "v4": {"train": 27_894_289, "validation": 551_390, "test": 1_667_399},
    "v6": {"train": 57_524_352, "validation": 595_339, "test": 1_799_883},
    "v7": {"train": 58_783_034, "validation": 618_184, "test": 2_003_748},
}
FULL_CLASSES = {"v3": 5000, "v4": 7186, "v5": 7186, "v6": 9605, "v7": 9668}


@dataclass
class Release:
    """Where the files of a release lie.

    Attributes:
        labels: split -> CSV of human-verified labels.
        machine: split -> CSV of machine labels, where they were asked for.
        images_info: split -> image list, where it was asked for.
        classes: file of the trainable classes.
        descriptions: file of the class names.
        images: image folder, or None.
        ids: split -> uint64 ids of all images of the split, ascending.
        written: split -> uint64 ids of the images that were written, ascending.
    """

    labels: dict[str, Path]
    machine: dict[str, Path]
    images_info: dict[str, Path]
    classes: Path
    descriptions: Path
    images: Path | None = None
    ids: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)
    written: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)


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
    image_fraction: float = 0.0,
    layout: Layout = "bucket",
    seed: int = 0,
) -> Release:
    """Write a release.

    Args:
        out: folder to write to; the official folders are made below it.
        version: v3 to v7.
        images: split (train, validation, test) -> number of images with human labels; default 300, 60, 80.
        rows: split -> number of human-verified rows; default 6.5 rows per image, as in V7's training file.
        classes: number of trainable classes.
        other_classes: number of classes that rows may name and that are not trainable.
        machine_rows: split -> number of machine rows; default none.
        images_info: write image lists too (with a column Rotation from V4 on).
        decimals: confidences as 0.0 and 1.0 in place of 0 and 1.
        order: rows grouped by image and sorted by id, or in no order.
        image_fraction: fraction of the ids for which a small JPEG is written.
        layout: `bucket` SPLIT/ID.jpg, `flat` ID.jpg, `nested` SPLIT/AB/ID.jpg, `tar` and `tar.gz` tar files.
        seed: of everything.

    Raises:
        ValueError: more or fewer rows than the images and classes allow.
    """
    release = release_paths(Path(out), version)
    images = images or {"train": 300, "validation": 60, "test": 80}
    rows = rows or {split: int(number * 6.5) for split, number in images.items()}
    names = class_ids(classes + other_classes, all_forms=version == "v7")
    rng = np.random.default_rng([seed, 0])
    _write_classes(release, version, names, rng.permutation(classes))
    # Classes that are not trainable are rare: they stand at the end of Zipf's law.
    options = RowOptions(zipf_cdf(len(names)), pa.array(names), decimals, order)
    total = sum(images.values())
    ids = np.unique(rng.integers(0, 2**64, total + total // 100 + 16, dtype=np.uint64))
    # Ids with leading zeros, which must stay 16 digits long.
    ids[:2] = (7, 0xABC)
    ids = rng.permutation(ids)[:total]
    start = 0
    for split_number, split in enumerate(SPLITS):
        number = images.get(split, 0)
        if not number:
            for paths in (release.labels, release.machine, release.images_info):
                paths.pop(split)
            continue
        of_split = np.sort(ids[start : start + number])
        start += number
        release.ids[split] = of_split
        rng = np.random.default_rng([seed, 1, split_number])
        write_labels(release.labels[split], rng, of_split, rows[split], False, options)
        if machine_rows and machine_rows.get(split):
            write_labels(release.machine[split], rng, of_split, machine_rows[split], True, options)
        else:
            release.machine.pop(split)
        if images_info:
            write_image_list(release.images_info[split], rng, of_split, split, rotation=version != "v3")
        else:
            release.images_info.pop(split)
        if image_fraction:
            chosen = of_split[np.sort(rng.permutation(number)[: round(image_fraction * number)])]
            release.written[split] = chosen
            release.images = Path(out) / "images"
            write_images(release.images, split, chosen, layout)
    return release


def _write_classes(release: Release, version: Version, names: list[str], order: npt.NDArray[np.int64]) -> None:
    """Write the list of trainable classes, `names` in that order, and the names of all classes."""
    for path in (release.classes, release.descriptions):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The order of the file is not that of the frequencies.
    release.classes.write_text("".join(f"{names[i]}\n" for i in order), encoding="utf-8")
    with release.descriptions.open("w", encoding="utf-8", newline="") as file:
        # As published: V7's file has the line ends of Windows.
        writer = csv.writer(file, lineterminator="\r\n" if version == "v7" else "\n")
        if version in ("v6", "v7"):
            writer.writerow(["LabelName", "DisplayName"])
        writer.writerows([name, class_name(i)] for i, name in enumerate(names))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write a release."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--version", choices=["v3", "v4", "v5", "v6", "v7"], default="v7")
    parser.add_argument("--full", action="store_true", help="images, rows and classes of the whole release")
    parser.add_argument("--images", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--rows", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="human labels")
    parser.add_argument("--machine-rows", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--classes", type=int, help="trainable classes")
    parser.add_argument("--other-classes", type=int, help="classes that rows name and that are not trainable")
    parser.add_argument("--images-info", action="store_true", help="image lists, with rotation from V4 on")
    parser.add_argument("--decimals", action="store_true", help="confidences 0.0 and 1.0 in place of 0 and 1")
    parser.add_argument("--order", choices=["image", "shuffled"], default="image")
    parser.add_argument("--pictures", type=float, default=0.0, help="fraction of the ids that get a small JPEG file")
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
        image_fraction=options.pictures,
        layout=options.layout,
        seed=options.seed,
    )
    command = ["python", "launch/prepare.py", "openimages", "--labels"]
    command += [f"{kind}={path}" for kind, path in release.labels.items()]
    if release.machine:
        command += ["--machine-labels", *(f"{kind}={path}" for kind, path in release.machine.items())]
    if release.images_info and options.version != "v3":
        command += ["--images-info", *map(str, release.images_info.values())]
    command += ["--classes", str(release.classes), "--descriptions", str(release.descriptions)]
    print(shlex.join([*command, "--images", str(release.images or "none"), "--out", "DIR"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
