"""Digit scenes: the embedded data set, made from the handwritten digits that scikit-learn ships. No download.

1,797 real handwritten digits of 8 x 8 pixels; the first 1,300 appear in training and validation scenes, the rest in
test scenes only. A scene is a 64 x 64 image: a patchwork of 4 x 4 colours with a little noise, and on it one to five
digits of 20 pixels, each in another cell of a 3 x 3 grid, shifted a little and coloured. Its label is the set of
digits. Everything is a pure function of the seeds.

Source: docs/sources.md#digits.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.data.manifest import Manifest
from spml_fast.data.sparse_labels import NEGATIVE, SparseLabels
from spml_fast.prepare.build import build
from spml_fast.prepare.datasets.base import Dataset, register
from spml_fast.prepare.observed_labels import PUBLISHED_SEED, ObservationScheme
from spml_fast.prepare.raw import CommonOptions, RawDataset, RawSplit

CLASSES = [str(digit) for digit in range(10)]
SIZES: dict[str, int] = {"train": 4000, "val": 500, "test": 1500}
TRAIN_DIGITS = 1300
SIDE, DIGIT, GRID, PATCHES, MAX_DIGITS = 64, 20, 3, 4, 5
NOISE = 8.0
JPEG_QUALITY = 90
# Raised whenever a scene changes for equal seeds.
VERSION = 1
# Ink above this fraction counts as part of the digit when its box is drawn.
_INK = 0.3
# Scenes rendered at a time: 25 MB of float32.
_BLOCK = 512


@dataclass
class Scenes:
    """N scenes with K digits in all, before they are drawn; much smaller than the images.

    Attributes:
        indptr: int64 [N + 1], digits of scene i are `indptr[i]:indptr[i + 1]`.
        source: int64 [K], row of scikit-learn's digits.
        label: int64 [K], 0 to 9.
        x: int64 [K], left edge of the 20-pixel square.
        y: int64 [K], top edge.
        colour: float32 [K, 3], 0 to 255.
        patches: uint8 [N, 4, 4, 3] background colours.
        noise_seed: seed of the pixel noise.
    """

    indptr: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    colour: npt.NDArray[np.float32]
    patches: npt.NDArray[np.uint8]
    noise_seed: list[int]

    def __len__(self) -> int:
        return len(self.indptr) - 1


def _load_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(ink in 0..1, float32 [1797, 20, 20]; labels int64 [1797])."""
    values, labels = _scikit_learn_digits()
    small = np.round(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(s).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)) for s in small]
    return np.stack(large).astype(np.float32) / np.float32(255), labels.astype(np.int64)


def _scikit_learn_digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Pixels [1797, 64], 0 to 16, and labels [1797] of `sklearn.datasets.load_digits`, from the file that it reads.

    Importing scikit-learn takes longer than a half of what the scenes are made in.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1]
    # A version that keeps it elsewhere.
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data, data.target


def plan_scenes(count: int, sources: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], seed: list[int]) -> Scenes:
    """Decide what `count` scenes show; a pure function of the arguments.

    Args:
        count: number of scenes N.
        sources: rows of scikit-learn's digits that may appear.
        labels: int64 [1797], the digit of every row.
        seed: entropy of the generator.
    """
    rng = np.random.default_rng(seed)
    per_scene = rng.integers(1, MAX_DIGITS + 1, count)
    indptr = np.concatenate([[0], np.cumsum(per_scene)]).astype(np.int64)
    total = int(indptr[-1])
    # A random order of the nine cells for every scene; its digits take the first ones.
    shuffled = rng.random((count, GRID * GRID)).argsort(axis=1)
    cell = shuffled[np.arange(GRID * GRID) < per_scene[:, None]]
    source = rng.choice(sources, total)
    cell_side = SIDE / GRID
    jitter = rng.integers(-2, 3, (2, total))
    x = np.clip(np.round(cell % GRID * cell_side).astype(np.int64) + jitter[0], 0, SIDE - DIGIT)
    y = np.clip(np.round(cell // GRID * cell_side).astype(np.int64) + jitter[1], 0, SIDE - DIGIT)
    # Digits are bright, patches are dark: a digit of any hue is visible on a patch of any hue.
    colour = rng.uniform(90, 255, (total, 3))
    colour[np.arange(total), rng.integers(0, 3, total)] = 255
    patches = rng.integers(0, 130, (count, PATCHES, PATCHES, 3)).astype(np.uint8)
    return Scenes(indptr, source, labels[source], x, y, colour.astype(np.float32), patches, [*seed, 1])


def render_scenes(scenes: Scenes, ink: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.uint8]]:
    """Images uint8 [n, 64, 64, 3] of scenes, some hundred at a time, in their order.

    Args:
        scenes: what they show.
        ink: float32 [1797, 20, 20] in 0..1.
    """
    rng = np.random.default_rng(scenes.noise_seed)
    scale = SIDE // PATCHES
    side = np.arange(DIGIT)
    digits = np.diff(scenes.indptr)
    noise = np.empty((_BLOCK, SIDE, SIDE, 3), np.float32)
    for start in range(0, len(scenes), _BLOCK):
        block = scenes.patches[start : start + _BLOCK].repeat(scale, 1).repeat(scale, 2).astype(np.float32)
        # Digits of one scene may overlap, so that the first ones of all are drawn, then the second ones.
        for number in range(MAX_DIGITS):
            scene = np.flatnonzero(digits[start : start + _BLOCK] > number)
            k = scenes.indptr[start + scene] + number
            rows, columns = scenes.y[k, None, None] + side[:, None], scenes.x[k, None, None] + side
            square = block[scene[:, None, None], rows, columns]
            square += ink[scenes.source[k], :, :, None] * (scenes.colour[k, None, None] - square)
            block[scene[:, None, None], rows, columns] = square
        added = noise[: len(block)]
        rng.standard_normal(out=added, dtype=np.float32)
        added *= NOISE
        block += added
        yield np.clip(np.round(block, out=block), 0, 255, out=block).astype(np.uint8)


def _boxes(scenes: Scenes, ink: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Boxes [K, 5] (digit, x0, y0, x1, y1 in pixels) around the ink of every digit."""
    inked = ink > _INK
    columns, rows = np.any(inked, axis=1), np.any(inked, axis=2)
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1, y1 = DIGIT - columns[:, ::-1].argmax(1), DIGIT - rows[:, ::-1].argmax(1)
    s = scenes.source
    edges = (scenes.x + x0[s], scenes.y + y0[s], scenes.x + x1[s], scenes.y + y1[s])
    return np.stack([scenes.label, *edges], 1).astype(np.float64)


def read_digits(sizes: Mapping[str, int] = SIZES, scene_seed: int = 0) -> RawDataset:
    """Digit scenes as a raw data set whose images are made inside the Manifest.

    Args:
        sizes: split -> number of scenes; "test" draws from the held-out digits, every other split from the rest.
        scene_seed: another seed, other scenes.

    Raises:
        UserError: a split has no scenes.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"split {name!r} of the digit scenes needs at least one image, not {size}")
    ink, labels = _load_digits()
    plans: dict[str, Scenes] = {}
    splits = []
    for name, size in sizes.items():
        rows = np.arange(TRAIN_DIGITS, len(labels)) if name == "test" else np.arange(TRAIN_DIGITS)
        scenes = plan_scenes(size, rows, labels, [scene_seed, *name.encode()])
        plans[name] = scenes
        digits = np.split(scenes.label, scenes.indptr[1:-1])
        splits.append(
            RawSplit(
                name,
                SparseLabels.from_positives([d.tolist() for d in digits], len(CLASSES), NEGATIVE),
                ids=np.arange(size),
                template="{split}/{id:05d}.jpg",
                width=np.full(size, SIDE),
                height=np.full(size, SIDE),
                boxes=(scenes.indptr, _boxes(scenes, ink)),
            )
        )

    def make_images(folder: Path) -> None:
        def save(out: Path, first: int, images: npt.NDArray[np.uint8]) -> None:
            for i, pixels in enumerate(images, first):
                Image.fromarray(pixels).save(out / f"{i:05d}.jpg", quality=JPEG_QUALITY)

        total = sum(len(scenes) for scenes in plans.values())
        with show_progress(total, "drawing digit scenes") as advance, ThreadPoolExecutor(1) as writer:
            for name, scenes in plans.items():
                (folder / name).mkdir()
                done, under_way = 0, writer.submit(lambda: None)
                # The next scenes are drawn while these are written.
                for images in render_scenes(scenes, ink):
                    under_way.result()
                    under_way = writer.submit(save, folder / name, done, images)
                    done += len(images)
                    advance(len(images))
                under_way.result()

    return RawDataset("digits", CLASSES, None, splits, settings=_settings(sizes, scene_seed), make_images=make_images)


def _settings(sizes: Mapping[str, int], scene_seed: int) -> dict[str, Any]:
    """What the content depends on."""
    return {"version": VERSION, "sizes": dict(sizes), "scene_seed": scene_seed}


def prepare_digits(
    out: str | Path,
    seed: int = PUBLISHED_SEED,
    sizes: Mapping[str, int] = SIZES,
    observe: str = "single",
    scene_seed: int = 0,
    progress: bool = False,
) -> Manifest:
    """The digit scenes at `out`, made now unless they are already there.

    Several processes may call this at once: one makes them, the others wait and open what it made.

    Args:
        out: Manifest directory.
        seed: seed of the observed labels.
        sizes: split -> number of scenes.
        observe: as the option `--observe`.
        scene_seed: seed of the scenes.
        progress: show progress.

    Raises:
        UserError: `out` cannot be written, or holds something else.
    """
    out = Path(out)
    scheme = ObservationScheme.parse(observe)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.parent / f".{out.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror})") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "manifest.json").is_file():
            common = CommonOptions(out, scheme, seed, verify="none", progress=progress)
            return build(read_digits(sizes, scene_seed), common)
    manifest = Manifest(out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    wanted = {
        "name": "digits",
        "settings": _settings(sizes, scene_seed),
        "observe": {"kind": scheme.kind, "positives": scheme.positives, "fraction": scheme.fraction, "seed": seed},
    }
    for key, value in wanted.items():
        if report.get(key) != value:
            raise UserError(
                f"{out} holds another data set than the digit scenes asked for "
                f"({key}: {report.get(key)}, not {value}); delete it or choose another folder"
            )
    return manifest


@register("digits")
class Digits(Dataset):
    """Digit scenes: 64 x 64 images made from scikit-learn's handwritten digits; nothing is downloaded."""

    train_options = ("--config", "digits")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Sizes and seed of the scenes."""
        for name, size in SIZES.items():
            parser.add_argument(f"--{name}", type=int, default=size, help=f"{name} images (default: %(default)s)")
        parser.add_argument("--scene-seed", type=int, default=0, help="another seed, other scenes (default: 0)")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Plan the scenes; they are drawn when the Manifest is written."""
        if options.scene_seed < 0:
            raise UserError(f"--scene-seed {options.scene_seed}: it must not be negative")
        return read_digits({name: getattr(options, name) for name in SIZES}, options.scene_seed)
