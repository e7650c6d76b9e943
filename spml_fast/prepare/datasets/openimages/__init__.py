"""OpenImages V3 to V7: image-level labels that people verified, a few of thousands of classes for each image.

    python launch/prepare.py openimages --labels TRAIN.csv VAL.csv TEST.csv --classes classes-trainable.txt
        --descriptions class-descriptions.csv --images DIR --out DIR

Protocol (spec/protocol.md 2.5, 4 and 5): a row with confidence 1 is an observed positive, with 0 an observed negative,
and what has no row is unknown. Classes are those of the trainable list, in its order; rows of others are dropped. An
image is in a split if it has a label of these classes and if it is there. Machine labels are used only on request;
training sees them as positives, and they are never part of the truth that evaluation uses.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.base import Dataset, register
from spml_fast.prepare.datasets.openimages.csv import (
    ABSENT,
    MACHINE,
    THERE,
    Images,
    LabelRows,
    find_images,
    read_classes,
    read_descriptions,
    read_labels,
    read_rotations,
)
from spml_fast.prepare.raw import RawDataset, RawSplit

Conflicts = Literal["positive", "negative", "last", "drop"]
SPLITS = {"train": "train", "val": "validation", "test": "test"}
_SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# At most so many ids without an image are named in report.json.
_MAX_NAMED = 1000
_CHUNK = 1 << 22


@dataclass
class Grouped:
    """Labels by image.

    Attributes:
        ids: uint64 [N], ascending: the images with a label of the wanted classes.
        human: verified labels, N rows.
        machine: machine labels of the same rows, none on a (image, class) that a person has verified; None without
            machine labels.
        named: number of images that the files name.
        repeated: verified rows on a (image, class) that a row before had named.
        conflicts: (image, class) pairs on which verified rows contradict each other.
        overruled: machine rows on pairs that a person has verified.
    """

    ids: npt.NDArray[np.uint64]
    human: SparseLabels
    machine: SparseLabels | None
    named: int
    repeated: int
    conflicts: int
    overruled: int


def group_rows(rows: LabelRows, machine: LabelRows | None, num_classes: int, conflicts: Conflicts) -> Grouped:
    """Group rows by image; the files need not be sorted.

    Args:
        rows: verified rows.
        machine: machine rows, or None.
        num_classes: C.
        conflicts: which of contradicting verified rows counts; `last` is the last one in the order of the files,
            `drop` makes the pair unknown.
    """
    bits = max(1, (num_classes - 1).bit_length())
    run_ids, run_counts, packed = rows.run_ids, rows.run_counts, rows.packed
    if machine is not None:
        run_ids = np.concatenate([run_ids, machine.run_ids])
        run_counts = np.concatenate([run_counts, machine.run_counts])
        packed = np.concatenate([packed, machine.packed])
    ids, run_rows = _number_runs(run_ids)
    named = len(ids)

    def row_keys(runs: int) -> npt.NDArray[np.int64]:
        """(image, class, what is said) of the rows of the first runs, in the order of the files."""
        keys = np.empty(int(run_counts[:runs].sum(dtype=np.int64)), np.int64)
        done = 0
        for start in range(0, runs, _CHUNK):
            stop = min(start + _CHUNK, runs)
            part = np.repeat(run_rows[start:stop].astype(np.int64) << (bits + 2), run_counts[start:stop])
            np.bitwise_or(part, packed[done : done + len(part)], out=keys[done : done + len(part)])
            done += len(part)
        return keys

    # One number a row, sorted in place: no second array, and several times as fast as sorting places.
    keys = row_keys(len(run_rows))
    keys.sort()
    said = (keys & 3).astype(np.uint8)
    keys >>= 2
    first = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    starts = None if first.all() else np.flatnonzero(first)
    if starts is None:
        lowest = highest = said
    else:
        lowest, highest = said[starts], said[np.append(starts[1:], len(said)) - 1]
        keys = keys[starts]
    verified = (lowest == ABSENT) | (highest == THERE)
    contradicted = np.flatnonzero((lowest == ABSENT) & (highest == THERE))
    overruled = 0
    if machine is not None and starts is not None:
        overruled = int(np.add.reduceat(said == MACHINE, starts, dtype=np.int64)[verified].sum())
    codes = (highest == THERE).astype(np.int8)
    repeated = len(rows.packed) - int(verified.sum())
    del said, first, starts, lowest, highest

    machine_labels = None
    if machine is not None:
        unverified = keys[~verified]
        machine_labels = _from_keys(unverified, np.full(len(unverified), POSITIVE, np.int8), named, num_classes, bits)
        del unverified
    if conflicts == "negative":
        codes[contradicted] = NEGATIVE
    elif conflicts == "last" and len(contradicted):
        codes[contradicted] = _last_said(keys[contradicted], row_keys(len(rows.run_ids)))
    elif conflicts == "drop":
        verified[contradicted] = False
    if not verified.all():
        keys, codes = keys[verified], codes[verified]
    del verified
    human = _from_keys(keys, codes, named, num_classes, bits)
    labelled = np.diff(human.indptr) > 0
    if machine_labels is not None:
        labelled |= np.diff(machine_labels.indptr) > 0
        machine_labels = _without(machine_labels, labelled)
    return Grouped(
        ids[labelled], _without(human, labelled), machine_labels, named, repeated, len(contradicted), overruled
    )


def _number_runs(run_ids: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Different ids, ascending, and the place of each run's id among them, int32."""
    sorted_already = bool((run_ids[1:] >= run_ids[:-1]).all())
    ordered = run_ids if sorted_already else np.sort(run_ids)
    new = np.ones(len(run_ids), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    ids = ordered[new]
    if sorted_already:
        # As official files are.
        return ids, np.cumsum(new, dtype=np.int32) - np.int32(1)
    del ordered, new
    places = np.empty(len(run_ids), np.int32)
    for start in range(0, len(run_ids), _CHUNK):
        part = run_ids[start : start + _CHUNK]
        # Searching in order keeps to the cache, and is several times as fast.
        order = np.argsort(part)
        places[start : start + _CHUNK][order] = np.searchsorted(ids, part[order])
    return ids, places


def _last_said(pairs: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Codes of some (image, class) pairs, ascending, by the last row on each in the order of the files."""
    out = np.zeros(len(pairs), np.int8)
    for start in range(0, len(keys), _CHUNK):
        part = keys[start : start + _CHUNK]
        place = np.minimum(np.searchsorted(pairs, part >> 2), len(pairs) - 1)
        hit = pairs[place] == part >> 2
        # Of several assignments to one place the last stays.
        out[place[hit]] = (part[hit] & 3) == THERE
    return out


def _from_keys(
    keys: npt.NDArray[np.int64], codes: npt.NDArray[np.int8], num_rows: int, num_classes: int, bits: int
) -> SparseLabels:
    """Labels from ascending (row, class) keys, each once; `keys` is overwritten."""
    indptr = np.searchsorted(keys, np.arange(num_rows + 1) << bits).astype(np.int64, copy=False)
    keys &= (1 << bits) - 1
    return SparseLabels(indptr, keys.astype(class_dtype(num_classes)), codes, num_classes, UNKNOWN)


def _without(labels: SparseLabels, kept: npt.NDArray[np.bool_]) -> SparseLabels:
    """The rows that are kept, bool [N]; the others must be empty."""
    indptr = labels.indptr[np.append(kept, True)]
    return SparseLabels(indptr, labels.classes, labels.codes, labels.num_classes, labels.default)


def split_files(words: Sequence[str], splits: Sequence[str] | None, option: str) -> dict[str, list[Path]]:
    """Split name (train, val, test) -> its files.

    A word is a path, or SPLIT=path. Without that, `splits` says where they belong, one for each word or one for all;
    else their names do (train, val, validation or test as a word in the file's name, or as the folder's name).

    Raises:
        UserError: a file's split cannot be told.
    """
    out: dict[str, list[Path]] = {}
    plain = [word for word in words if _prefix(word) is None]
    if splits and len(splits) not in (1, len(plain)):
        raise UserError(f"--split names {len(splits)} splits for {len(plain)} files of {option}; give one for each")
    chosen = iter(splits if splits and len(splits) == len(plain) else list(splits or [""]) * len(plain))
    for word in words:
        split, path = _prefix(word), Path(word)
        if split is not None:
            path = Path(word.partition("=")[2])
        else:
            split = _SPLIT_WORDS.get(next(chosen)) or _split_of_name(path)
        if split is None and len(words) == 1:
            split = "train"
        if split is None:
            raise UserError(f"{option}: the name {path.name} does not tell the split; write train={path} or the like")
        out.setdefault(split, []).append(path)
    return {name: out[name] for name in SPLITS if name in out}


def _prefix(word: str) -> str | None:
    """The split that a word such as `train=labels.csv` names."""
    name, equals, _ = word.partition("=")
    return _SPLIT_WORDS.get(name) if equals else None


def _split_of_name(path: Path) -> str | None:
    """The split that a word in a file's name tells, or else its folder's whole name."""
    found = {_SPLIT_WORDS[word] for word in re.split("[^a-z]+", path.name.lower()) if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else _SPLIT_WORDS.get(path.absolute().parent.name.lower())


def class_names(ids: Sequence[str], descriptions: dict[str, str]) -> list[str]:
    """Display names in class order; the id where there is none, and behind names that several classes share."""
    names = [descriptions.get(class_id) or class_id for class_id in ids]
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({i})" if name in shared else name for name, i in zip(names, ids, strict=True)]


@register("openimages")
class OpenImages(Dataset):
    """OpenImages V3 to V7 image-level labels, with or without the images."""

    default_observe: ClassVar[str] = "all"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Label files, classes, images."""
        parser.add_argument(
            "--labels",
            required=True,
            nargs="+",
            metavar="[SPLIT=]CSV",
            help="human-verified image labels, of one split or of several; the split is told by the file's name, by "
            "--split, or by train=, val= or test= before the path",
        )
        parser.add_argument(
            "--split",
            nargs="+",
            choices=list(_SPLIT_WORDS),
            metavar="{train,val,test}",
            help="split of each file of --labels, or of all of them",
        )
        parser.add_argument("--classes", required=True, type=Path, help="trainable classes, one id a line, in order")
        parser.add_argument("--descriptions", type=Path, help="class names (class-descriptions.csv)")
        parser.add_argument(
            "--images",
            required=True,
            help="folder of the images, ID.jpg in any folders below it; none: prepare the labels alone",
        )
        parser.add_argument(
            "--images-info",
            nargs="+",
            type=Path,
            default=[],
            metavar="CSV",
            help="image lists with a column Rotation (V4 and later); images are turned as they say",
        )
        parser.add_argument(
            "--machine-labels",
            nargs="+",
            default=[],
            metavar="[SPLIT=]CSV",
            help="machine-generated labels; training sees those of at least --machine-threshold as positives",
        )
        parser.add_argument(
            "--machine-threshold", type=float, metavar="T", help="confidence from which on a machine label is used"
        )
        parser.add_argument(
            "--conflicts",
            choices=["positive", "negative", "last", "drop"],
            default="positive",
            help="which label counts where verified rows contradict each other; drop: none (default: %(default)s)",
        )

    def prepare(self, options: argparse.Namespace) -> Manifest:
        """Raw files -> Manifest."""
        if options.images == "none" and options.verify not in (None, "none"):
            raise UserError(f"--verify {options.verify} needs images; give their folder with --images")
        if bool(options.machine_labels) != (options.machine_threshold is not None):
            raise UserError("--machine-labels and --machine-threshold go together; give both or neither")
        if options.machine_threshold is not None and not 0 < options.machine_threshold <= 1:
            raise UserError("--machine-threshold must be above 0 and at most 1")
        return super().prepare(options)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Label files, and which images are there."""
        files = split_files(options.labels, options.split, "--labels")
        machine_files = split_files(options.machine_labels, None, "--machine-labels")
        for name in machine_files:
            if name not in files:
                raise UserError(f"--machine-labels has split {name}, --labels does not; give its verified labels too")
        folder = None if options.images == "none" else Path(options.images)
        if folder is not None and not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist; write --images none for the labels alone")
        class_ids = read_classes(options.classes)
        descriptions = read_descriptions(options.descriptions) if options.descriptions else {}
        notes = []
        unnamed = sum(class_id not in descriptions for class_id in class_ids)
        if unnamed:
            notes.append(
                f"{unnamed:,} of {len(class_ids):,} classes have no name in --descriptions; their ids are used"
            )
        # Before the labels, which take longer to read than a wrong folder to find.
        images = None if folder is None else _find(folder)

        coverage: dict[str, Any] = {}
        raw = RawDataset(
            "openimages",
            class_names(class_ids, descriptions),
            folder,
            [],
            notes=notes,
            settings={
                "conflicts": options.conflicts,
                "machine_threshold": options.machine_threshold,
                "class_ids": class_ids,
            },
            labels_alone=folder is None,
            coverage=coverage,
        )
        used = np.zeros(0 if images is None else len(images.ids), np.bool_)
        for name, paths in files.items():
            rows = read_labels(paths, class_ids)
            machine = None
            if name in machine_files:
                machine = read_labels(machine_files[name], class_ids, options.machine_threshold)
            grouped = group_rows(rows, machine, len(class_ids), options.conflicts)
            if not len(grouped.ids):
                raise UserError(f"no row of {paths[0]} has a class of {options.classes}; are they of the same release?")
            for other in raw.splits:
                _refuse_shared(name, grouped.ids, other)
            entry = _count(name, rows, machine, grouped, options, notes)
            coverage[name] = entry
            raw.splits.append(_split(name, grouped, images, folder, used, entry, notes))
        if images is not None:
            _count_unused(images, used, coverage, notes)
        if missing := [name for name in SPLITS if name not in files]:
            notes.append(f"no {' and no '.join(missing)} split (--labels has no file of it)")
        for path in options.images_info:
            _add_rotations(path, raw.splits)
        for split in raw.splits if options.images_info else ():
            known = 0 if split.orientation is None else int(np.count_nonzero(split.orientation))
            if known < len(split):
                raw.notes.append(
                    f"{split.name}: the image lists know the rotation of {known:,} of {len(split):,} images; "
                    "--orientation decides for the others"
                )
        return raw


def _refuse_shared(name: str, ids: npt.NDArray[np.uint64], other: RawSplit) -> None:
    """Raise `UserError` when a split has images of another one: test figures would be worth nothing."""
    assert isinstance(other.ids, np.ndarray)
    small, large = sorted((ids, other.ids), key=len)
    place = np.minimum(np.searchsorted(large, small), len(large) - 1)
    shared = small[large[place] == small]
    if len(shared):
        raise UserError(
            f"{len(shared):,} images have labels in split {other.name} and in split {name} (the first is "
            f"{int(shared[0]):016x}); give each label file to one split (train=, val= or test= before its path)"
        )


def _find(folder: Path) -> Images:
    """The images below a folder; `UserError` if there is none."""
    images = find_images(folder)
    if not len(images.ids):
        if images.archives:
            raise UserError(
                f"{folder} holds {len(images.archives)} packed files ({images.archives[0]}, ...) and no images; "
                "unpack them, or prepare the labels with --images none and then pack the images straight from the "
                f"tar files: prepare.py shard --manifest LABELS --tars {folder} --leave-out --out DIR"
            )
        raise UserError(
            f"there is no image below {folder} that is named by an OpenImages id (16 hexadecimal digits and .jpg); "
            "give the folder of the images, or --images none for the labels alone"
        )
    return images


def _count(
    name: str,
    rows: LabelRows,
    machine: LabelRows | None,
    grouped: Grouped,
    options: argparse.Namespace,
    notes: list[str],
) -> dict[str, Any]:
    """What became of the rows of a split: its entry in the report, and sentences for the summary."""
    entry: dict[str, Any] = {
        "rows": rows.rows,
        "rows_by_source": dict(rows.sources),
        "rows_of_other_classes": rows.other_classes,
        "repeated_rows": grouped.repeated,
        "conflicts": grouped.conflicts,
        "images_named": grouped.named,
        "images_labelled": len(grouped.ids),
    }
    notes.append(
        f"{name}: {rows.rows:,} verified rows, {grouped.named:,} images named; "
        f"{rows.other_classes:,} rows of classes that {options.classes.name} does not list are left out"
    )
    if grouped.named > len(grouped.ids):
        notes.append(f"{name}: {grouped.named - len(grouped.ids):,} images have no label of the listed classes")
    if grouped.repeated:
        words = {"positive": "there", "negative": "absent", "last": "the last row says", "drop": "unknown"}
        notes.append(
            f"{name}: {grouped.repeated:,} rows name an image and class again; {grouped.conflicts:,} pairs are "
            f"contradicted and were taken as {words[options.conflicts]} (--conflicts {options.conflicts})"
        )
    if machine is not None and grouped.machine is not None:
        entry["machine"] = {
            "rows": machine.rows,
            "rows_of_other_classes": machine.other_classes,
            "below_threshold": machine.below_threshold,
            "overruled": grouped.overruled,
            "used": len(grouped.machine.codes),
        }
        notes.append(
            f"{name}: training also sees {len(grouped.machine.codes):,} machine labels of confidence "
            f"{options.machine_threshold:g} and more as positives; {machine.below_threshold:,} are below that, "
            f"{grouped.overruled:,} are on pairs that people have verified"
        )
    return entry


def _split(
    name: str,
    grouped: Grouped,
    images: Images | None,
    folder: Path | None,
    used: npt.NDArray[np.bool_],
    entry: dict[str, Any],
    notes: list[str],
) -> RawSplit:
    """One split, with the places of its images; marks them in `used`."""
    split = RawSplit(name, grouped.human, ids=grouped.ids, template="", extra=grouped.machine)
    if images is None:
        # The folders of the official bucket, for whoever has the images elsewhere.
        split.template = SPLITS[name] + "/{id:016x}.jpg"
        return split
    place = np.minimum(np.searchsorted(images.ids, grouped.ids), len(images.ids) - 1)
    present = images.ids[place] == grouped.ids
    found = int(present.sum())
    if not found:
        raise UserError(
            f"none of the {len(present):,} labelled images of split {name} is below {folder} (the first is "
            f"{int(grouped.ids[0]):016x}.jpg); give the folder that holds them, or leave the split's labels out"
        )
    used[place[present]] = True
    numbers = images.template_of[place]
    # Only the folders that this split has, and for an image that is missing any of them.
    of_split = np.unique(numbers[present])
    split.template = [images.templates[i] for i in of_split.tolist()]
    split.template_of = np.minimum(np.searchsorted(of_split, numbers), len(of_split) - 1).astype(np.uint32)
    missing = grouped.ids[~present]
    entry["images_found"] = found
    entry["images_missing"] = len(missing)
    entry["first_missing"] = [f"{i:016x}" for i in missing[:_MAX_NAMED].tolist()]
    if len(missing):
        split.present = present
    notes.append(
        f"{name}: {found:,} of {len(present):,} labelled images are there ({found / len(present):.1%})"
        + (f"; {len(missing):,} are missing and left out, the first is {int(missing[0]):016x}" if len(missing) else "")
    )
    return split


def _count_unused(images: Images, used: npt.NDArray[np.bool_], coverage: dict[str, Any], notes: list[str]) -> None:
    """Images that no label file names, and other things in the image folder."""
    unused = images.ids[~used]
    coverage["images"] = {
        "files": len(images.ids),
        "without_label": len(unused),
        "first_without_label": [f"{i:016x}" for i in unused[:_MAX_NAMED].tolist()],
        "in_two_folders": images.twice,
        "other_files": images.others,
        "archives": images.archives[:_MAX_NAMED],
    }
    if len(unused):
        notes.append(
            f"{len(unused):,} of {len(images.ids):,} images have no label of the listed classes in these files and "
            f"are not used (the first is {int(unused[0]):016x})"
        )
    if images.twice:
        notes.append(f"{images.twice:,} images lie in two folders; the first in alphabetical order is used")
    if images.archives:
        notes.append(f"{len(images.archives)} packed files beside the images were not looked into")


def _add_rotations(path: Path, splits: list[RawSplit]) -> None:
    """Note how the images of an image list are to be turned."""
    for ids, orientation in read_rotations(path):
        for split in splits:
            assert isinstance(split.ids, np.ndarray)
            if split.orientation is None:
                split.orientation = np.zeros(len(split), np.uint8)
            place = np.minimum(np.searchsorted(split.ids, ids), len(split) - 1)
            hit = split.ids[place] == ids
            split.orientation[place[hit]] = orientation[hit]
