"""Which samples each shard holds: planned once, kept on disk, and taken over by a run that resumes."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import write_text
from spml_fast.core.progress import show_progress
from spml_fast.data.image_check import Level
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.workers import run_jobs
from spml_fast.prepare.tar_source import MemberIndex, find_tars, member_path, read_members

IntArray = npt.NDArray[np.int64]

# About what a JPEG of quality 90 has, 4:2:0; it only decides how many images share a shard.
_BYTES_PER_PIXEL = 0.25


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write.

    Attributes:
        name: its file name without the ending.
        split: name of the split.
        rows: int64 [n] sample indices, in the order in which they are stored.
        tar: number of the tar file that the images come from; -1 without tar files.
    """

    name: str
    split: str
    rows: IntArray
    tar: int


@dataclass
class PackPlan:
    """What is to be written.

    Attributes:
        shards: the shards.
        notes: sentences for the report.
        absent: split name -> samples that are in no tar file.
    """

    shards: list[PlannedShard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absent: dict[str, int] = field(default_factory=dict)


class TarSource:
    """The tar files that hold the images of a Manifest.

    Args:
        folder: where the tar files are.
        splits: the Manifest's splits.

    Attributes:
        paths: the tar files, by name.

    Raises:
        UserError: there is no tar file.
    """

    def __init__(self, folder: Path, splits: Mapping[str, Split]) -> None:
        self.folder, self.splits = folder, splits
        self.paths = find_tars(folder)

    @cached_property
    def index(self) -> MemberIndex:
        """Finds samples by file name. Made when it is first asked for: with millions of images it takes a while."""
        return MemberIndex(list(self.splits.values()))


def cut(sizes: IntArray, limit: int) -> list[slice]:
    """Cut images of `sizes` bytes, int64 [n], into runs that fit a shard of `limit` bytes; at least one image each."""
    stored = tarfile.BLOCKSIZE + -(-sizes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    ends = np.cumsum(stored)
    runs, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + limit, "right")))
        runs.append(slice(first, last))
        first = last
    return runs


def _stored_sizes(split: Split) -> IntArray:
    """Bytes of every image of a split, int64 [N]; 0 for a missing one."""
    if split.shards is not None:
        return np.array(split.shards.table[:, 2])
    sizes = np.zeros(len(split), np.int64)
    for row in range(len(split)):
        try:
            sizes[row] = os.stat(split.path(row)).st_size
        except OSError:
            # It is named, or left out, when its turn comes.
            continue
    return sizes


def _expected_sizes(sizes: IntArray, split: Split, rows: IntArray, short_side: int | None) -> IntArray:
    """About how many bytes images of `sizes` bytes, the samples `rows`, will have when they are packed."""
    if short_side is None:
        return sizes
    width, height = split.width[rows].astype(np.float64), split.height[rows].astype(np.float64)
    short = np.minimum(width, height)
    scale = np.divide(short_side, short, out=np.ones_like(short), where=short > short_side)
    expected = (scale * scale * width * height * _BYTES_PER_PIXEL).astype(np.int64)
    return np.where(scale < 1, np.minimum(sizes, expected), sizes)


def plan_files(splits: Mapping[str, Split], options: PackOptions) -> PackPlan:
    """Shards of images that can be read in any order: every split in the order of its samples."""
    shards = []
    for name, split in splits.items():
        sizes = _expected_sizes(_stored_sizes(split), split, np.arange(len(split)), options.short_side)
        for number, run in enumerate(cut(sizes, options.shard_size)):
            shards.append(PlannedShard(f"{name}-{number:05d}", name, np.arange(run.start, run.stop), -1))
    return PackPlan(shards)


class _TarContents(NamedTuple):
    """What one tar file holds, in its order.

    Attributes:
        tar: number of the file.
        samples: int64 [n] sample numbers over all splits.
        sizes: int64 [n] bytes.
        ignored: members that are no images of the Manifest, by reason.
    """

    tar: int
    samples: IntArray
    sizes: IntArray
    ignored: Counter[str]


def _scan_tar(source: TarSource, tar: int) -> _TarContents:
    samples, sizes = [], []
    ignored: Counter[str] = Counter()
    for _, member, reason in read_members(source.paths[tar]):
        if reason:
            ignored[reason] += 1
            continue
        sample = source.index.find(member_path(member))
        if sample < 0:
            ignored["not in the Manifest"] += 1
            continue
        samples.append(sample)
        sizes.append(member.size)
    return _TarContents(tar, np.array(samples, np.int64), np.array(sizes, np.int64), ignored)


def plan_tars(source: TarSource, options: PackOptions) -> PackPlan:
    """Shards in the order of the tar files, so that each of them is read once, from its start to its end.

    Raises:
        UserError: an image is in no tar file (unless such are left out) or in several, or a tar file is damaged.
    """
    plan = PackPlan()
    starts = source.index.starts
    contents: dict[int, _TarContents] = {}
    ignored: Counter[str] = Counter()
    numbers = range(len(source.paths))
    with show_progress(len(numbers), "scanning tar files", options.progress) as advance:
        for content in run_jobs(_scan_tar, numbers, source, options.workers):
            contents[content.tar] = content
            ignored.update(content.ignored)
            advance(1)
    for reason, count in sorted(ignored.items()):
        plan.notes.append(f"ignored in the tar files: {count:,} members, {reason}")
    present = _refuse_repeated(source, contents)
    for number, (name, split) in enumerate(source.splits.items()):
        rows = present[(present >= starts[number]) & (present < starts[number + 1])] - starts[number]
        if missing := len(split) - len(rows):
            if not options.leave_out:
                mask = np.ones(len(split), np.bool_)
                mask[rows] = False
                first = split.relative_path(int(np.argmax(mask)))
                raise UserError(
                    f"{missing:,} of the {len(split):,} images of split {name!r} are in no tar file of "
                    f"{source.folder} (first: {first}); add the file that has them, or pass --leave-out to leave them "
                    "out"
                )
            plan.absent[name] = missing
    counts: Counter[str] = Counter()
    for tar in numbers:
        content = contents[tar]
        for number, (name, split) in enumerate(source.splits.items()):
            mask = (content.samples >= starts[number]) & (content.samples < starts[number + 1])
            rows = content.samples[mask] - starts[number]
            for run in cut(_expected_sizes(content.sizes[mask], split, rows, options.short_side), options.shard_size):
                plan.shards.append(PlannedShard(f"{name}-{counts[name]:05d}", name, rows[run], tar))
                counts[name] += 1
    return plan


def _refuse_repeated(source: TarSource, contents: Mapping[int, _TarContents]) -> IntArray:
    """All samples in the tar files, ascending. Raises `UserError` when one is in them more than once."""
    everything = np.concatenate([contents[tar].samples for tar in range(len(source.paths))])
    present, times = np.unique(everything, return_counts=True)
    if (times > 1).any():
        repeated = int(present[np.argmax(times > 1)])
        paths = [str(path) for tar, path in enumerate(source.paths) if (contents[tar].samples == repeated).any()]
        split, row = source.index.locate(repeated)
        raise UserError(
            f"the image {split.relative_path(row)} is more than once in {' and '.join(paths)}; keep one of them"
        )
    return present


def _settings(manifest: Manifest, options: PackOptions, level: Level, tars: TarSource | None) -> dict[str, Any]:
    """What the content of the shards depends on."""
    paths = [] if tars is None else tars.paths
    root = manifest.image_root
    return {
        "manifest": manifest.where,
        "content": manifest.meta,
        "image_root": str(root.resolve() if isinstance(root, Path) else root),
        "short_side": options.short_side,
        "quality": options.quality if options.short_side is not None else None,
        "shard_size": options.shard_size,
        "leave_out": options.leave_out,
        "verify": level,
        "tars": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
    }


def load_or_make_plan(
    work: Path, manifest: Manifest, options: PackOptions, level: Level, tars: TarSource | None
) -> PackPlan:
    """The plan of a run that was cut off, or a new one; either is kept in `work`.

    Args:
        work: folder of the unfinished work.
        manifest: whose images are packed.
        options: of this run.
        level: how closely images are checked.
        tars: the tar files that hold the images; None without.

    Raises:
        UserError: the plan there is another command's, or damaged; or as in `plan_tars`.
    """
    settings = _settings(manifest, options, level, tars)
    path = work / "plan.json"
    if path.exists():
        return _load_plan(path, settings)
    plan = plan_files(manifest.splits, options) if tars is None else plan_tars(tars, options)
    rows = [planned.rows for planned in plan.shards]
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in rows])]).astype(np.int64)
    with open(work / "plan.npz", "wb") as file:
        np.savez(file, rows=np.concatenate([np.empty(0, np.int64), *rows]), bounds=bounds)
    _save_plan(path, plan, settings)
    return plan


def _load_plan(path: Path, settings: Mapping[str, Any]) -> PackPlan:
    """The plan kept at `path`. Raises `UserError` if it was made with other settings."""
    work = path.parent
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["settings"] not in (settings, {**settings, "leave_out": False}):
            # Whole shards have no unusable image, so `leave_out` may be decided on later; not the reverse.
            raise UserError(
                f"{work} holds shards of another command, or its images have changed since; repeat that command, or "
                f"delete {work}"
            )
        with np.load(path.with_suffix(".npz")) as arrays:
            parts = np.split(arrays["rows"], arrays["bounds"][1:-1])
        shards = [
            PlannedShard(name, split, rows, tar)
            for (name, split, tar), rows in zip(saved["shards"], parts, strict=True)
        ]
        plan = PackPlan(shards, saved["notes"], saved["absent"])
    except (ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {work}, and repeat the command") from error
    _save_plan(path, plan, settings)
    return plan


def _save_plan(path: Path, plan: PackPlan, settings: Mapping[str, Any]) -> None:
    """Write all of a plan but its rows."""
    text = json.dumps(
        {
            "settings": settings,
            "shards": [[planned.name, planned.split, planned.tar] for planned in plan.shards],
            "notes": plan.notes,
            "absent": plan.absent,
        },
        ensure_ascii=False,
    )
    write_text(path, text)
