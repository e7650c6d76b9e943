"""Packs the images of a Manifest into tar shards: `python launch/prepare.py shard`. `shards.py` reads them.

Work goes on in `OUT.packing` beside the final place, shard by shard:

    plan.json plan.npz   what was asked for, and which samples each shard holds; a run that was cut off goes on from it
    shards/NAME.tar      under its final name only when it is whole
    NAME.npz             its record (index, sizes, checksum), written after it: a shard without a record does not count

A shard's content depends on the images and the options alone, never on the number of processes or on how often the
work was cut off. `foreign_tars.py` reads images out of other people's tar files.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, flush_to_disk, move_into_place, partial_path, write_text
from spml_fast.core.progress import show_progress
from spml_fast.core.workers import worker_pool
from spml_fast.data.image_check import Level, check_bytes, choose_level
from spml_fast.data.labels import POSITIVE
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.shards import INDEX_FILE, SHARDS_FILE, ShardFile, check_shards, file_sha256
from spml_fast.prepare.build import count_labels
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.raw import RawSplit
from spml_fast.prepare.tar_source import MemberIndex, find_tars, member_bytes, member_path, read_members

IntArray = npt.NDArray[np.int64]

_BLOCK = tarfile.BLOCKSIZE
# About what a JPEG of quality 90 has, 4:2:0; it only decides how many images share a shard.
_BYTES_A_PIXEL = 0.25
_MAX_LISTED = 100_000
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
class PackOptions:
    """What to pack and how.

    Attributes:
        manifest: Manifest whose images are packed.
        out: Manifest to write; the shards lie in its folder `shards`.
        image_root: image folder, when it is not where it was at preparation.
        tars: folder of tar files that hold the images; None reads the Manifest's own files (or shards).
        short_side: images with a longer short side are shrunk to it, in pixels; None copies every byte.
        quality: JPEG quality of images that are shrunk, 1 to 95.
        shard_size: bytes that a shard should not exceed.
        leave_out: go on without images that are missing or damaged.
        verify: how closely images are looked at; None reads headers of images that preparation has checked, and
            decides by their number for others.
        overwrite: replace an older Manifest at `out`.
        workers: processes; None for all cores.
        progress: show progress.
    """

    manifest: Path
    out: Path
    image_root: Path | None = None
    tars: Path | None = None
    short_side: int | None = None
    quality: int = 90
    shard_size: int = 256_000_000
    leave_out: bool = False
    verify: Level | None = None
    overwrite: bool = False
    workers: int | None = None
    progress: bool = True


@dataclass(frozen=True)
class _Image:
    """An image as it goes into a shard: bytes, ending, size as shown, and the orientation left to the loader."""

    data: bytes
    ending: str
    width: int
    height: int
    orientation: int


class _Bad(Exception):
    """An image that cannot be packed: (reason, detail), the reason worded alike for like images."""


def _ending(data: bytes, path: str) -> str:
    """File name ending by content; webdataset chooses a decoder by it."""
    for magic, ending in _ENDINGS.items():
        if data.startswith(magic):
            return ending
    if data[:1] == b"P" and data[1:2] in b"123456" and len(data) > 1:
        return "ppm"
    last = PurePosixPath(path).suffix[1:].lower()
    return last if last.isalnum() and last.isascii() else "bin"


def _shrink(data: bytes, orientation: int, short_side: int, quality: int) -> tuple[bytes, int, int] | None:
    """A JPEG of the image as shown with that short side, and its width and height; None when it stays as it is.

    A shrunk image is stored upright and without EXIF data. TIFF with an orientation of its own stays as it is,
    because Pillow turns it where the loader does not.
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


def _make_image(data: bytes, split: Split, row: int, options: PackOptions, level: Level) -> _Image:
    """Check an image and shrink it if asked to. Raises `_Bad`."""
    orientation = int(split.orientation[row])
    width, height = int(split.width[row]), int(split.height[row])
    if level != "none" or options.short_side is not None:
        checked = check_bytes(data, "header")
        if checked.reason is not None:
            raise _Bad(checked.reason, checked.detail)
        shown = (checked.width, checked.height) if orientation < 5 else (checked.height, checked.width)
        if width and height and shown != (width, height):
            raise _Bad(
                "another size than when the data were prepared",
                f"{shown[0]} x {shown[1]} pixels now, {width} x {height} then",
            )
        width, height = shown
    if options.short_side is not None:
        try:
            shrunk = _shrink(data, orientation, options.short_side, options.quality)
        except Exception as error:
            # Decoders of damaged bytes raise anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            raise _Bad("damaged or truncated", f"{type(error).__name__}: {error}") from error
        if shrunk is not None:
            return _Image(shrunk[0], "jpg", shrunk[1], shrunk[2], 1)
    if level == "decode":
        checked = check_bytes(data, "decode")
        if checked.reason is not None:
            raise _Bad(checked.reason, checked.detail)
    return _Image(data, _ending(data, split.relative_path(row)), width, height, orientation)


def _read(split: Split, row: int) -> bytes:
    """The stored bytes of an image. Raises `_Bad`."""
    try:
        return split.read(row)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Bad("missing file", "") from error
    except OSError as error:
        raise _Bad("unreadable file", error.strerror or str(error)) from error


@dataclass(frozen=True)
class _Planned:
    """One shard to write: the samples `rows` of a split, in that order, from tar file number `tar` (-1: none)."""

    name: str
    split: str
    rows: IntArray
    tar: int


def _cut(sizes: IntArray, limit: int) -> list[slice]:
    """Cut images into runs that fit a shard; each has one image at least."""
    stored = _BLOCK + -(-sizes // _BLOCK) * _BLOCK
    ends = np.cumsum(stored)
    runs, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + limit, "right")))
        runs.append(slice(first, last))
        first = last
    return runs


def _sizes(split: Split, options: PackOptions) -> IntArray:
    """About how many bytes each image will have; 0 for a missing one."""
    if split.shards is not None:
        sizes = np.array(split.shards.table[:, 2])
    else:
        sizes = np.zeros(len(split), np.int64)
        for row in range(len(split)):
            try:
                sizes[row] = os.stat(split.path(row)).st_size
            except OSError:
                # It is named, or left out, when its turn comes.
                continue
    return _shrunk_sizes(sizes, split, np.arange(len(split)), options)


def _shrunk_sizes(sizes: IntArray, split: Split, rows: IntArray, options: PackOptions) -> IntArray:
    if options.short_side is None:
        return sizes
    width, height = split.width[rows].astype(np.float64), split.height[rows].astype(np.float64)
    short = np.minimum(width, height)
    scale = np.divide(options.short_side, short, out=np.ones_like(short), where=short > options.short_side)
    expected = (scale * scale * width * height * _BYTES_A_PIXEL).astype(np.int64)
    return np.where(scale < 1, np.minimum(sizes, expected), sizes)


def _plan_files(manifest: Manifest, options: PackOptions) -> list[_Planned]:
    plan = []
    for name, split in manifest.splits.items():
        for number, run in enumerate(_cut(_sizes(split, options), options.shard_size)):
            plan.append(_Planned(f"{name}-{number:05d}", name, np.arange(run.start, run.stop), -1))
    return plan


def _plan_tars(context: _Context) -> list[_Planned]:
    """Shards in the order of the tar files, so that each of them is read once, from its start to its end."""
    options, splits = context.options, context.manifest.splits
    context.names = MemberIndex(list(splits.values()))
    starts = context.names.starts
    found: dict[int, tuple[IntArray, IntArray]] = {}
    skipped: Counter[str] = Counter()
    with show_progress(len(context.tars), "looking through tar files", options.progress) as advance:
        for tar, ids, sizes, ignored in _run(_scan_tar, range(len(context.tars)), context):
            found[tar] = ids, sizes
            skipped.update(ignored)
            advance(1)
    for reason, count in sorted(skipped.items()):
        context.notes.append(f"ignored in the tar files: {count:,} members, {reason}")
    everything = np.concatenate([found[tar][0] for tar in range(len(context.tars))])
    present, times = np.unique(everything, return_counts=True)
    if (times > 1).any():
        twice = int(present[np.argmax(times > 1)])
        where = [str(context.tars[tar]) for tar in range(len(context.tars)) if (found[tar][0] == twice).any()]
        split, row = context.names.locate(twice)
        raise UserError(
            f"the image {split.relative_path(row)} is more than once in {' and '.join(where)}; keep one of them"
        )
    for number, split in enumerate(splits.values()):
        here = int(np.count_nonzero((present >= starts[number]) & (present < starts[number + 1])))
        missing = len(split) - here
        if missing:
            mask = np.ones(len(split), np.bool_)
            mask[present[(present >= starts[number]) & (present < starts[number + 1])] - starts[number]] = False
            first = split.relative_path(int(np.argmax(mask)))
            if not options.leave_out:
                raise UserError(
                    f"{missing:,} of the {len(split):,} images of split {split.name!r} are in no tar file of "
                    f"{options.tars} (first: {first}); add the file that has them, or pass --leave-out to go on "
                    "without them"
                )
            context.absent[split.name] = missing
    plan = []
    counts: Counter[str] = Counter()
    for tar in range(len(context.tars)):
        ids, sizes = found[tar]
        for number, (name, split) in enumerate(splits.items()):
            mask = (ids >= starts[number]) & (ids < starts[number + 1])
            rows = ids[mask] - starts[number]
            for run in _cut(_shrunk_sizes(sizes[mask], split, rows, options), options.shard_size):
                plan.append(_Planned(f"{name}-{counts[name]:05d}", name, rows[run], tar))
                counts[name] += 1
    return plan


def _scan_tar(tar: int) -> tuple[int, IntArray, IntArray, Counter[str]]:
    """Samples in a tar file in its order: (file, numbers over all splits, bytes, ignored members by reason)."""
    context = _context()
    assert context.names is not None
    ids, sizes = [], []
    ignored: Counter[str] = Counter()
    for _, member, reason in read_members(context.tars[tar]):
        if reason:
            ignored[reason] += 1
            continue
        sample = context.names.find(member_path(member))
        if sample < 0:
            ignored["not in the Manifest"] += 1
            continue
        ids.append(sample)
        sizes.append(member.size)
    return tar, np.array(ids, np.int64), np.array(sizes, np.int64), ignored


class _HashingFile:
    """Writes to a file and sums up what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sum, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Append."""
        self._sum.update(data)
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    @property
    def sha256(self) -> str:
        """Checksum of what was written, hexadecimal."""
        return self._sum.hexdigest()


class _ShardWriter:
    """Writes one shard and then its record."""

    def __init__(self, work: Path, planned: _Planned) -> None:
        self._work, self._planned = work, planned
        self._final = work / "shards" / f"{planned.name}.tar"
        self._partial = partial_path(self._final)
        self._raw = open(self._partial, "wb")  # noqa: SIM115 (closed by `finish` or `close`)
        self._file = _HashingFile(self._raw)
        # `tarfile` asks for no more of a file than to write and to tell.
        output: Any = self._file
        self._tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT)
        self._table: list[tuple[int, int, int, int, int, int]] = []
        self._left_out: list[tuple[int, str, str]] = []
        self.seen = 0

    def add(self, row: int, image: _Image) -> None:
        """Append an image under its sample index as the key."""
        # Owner, time and mode are the same always, so equal images make equal shards.
        info = tarfile.TarInfo(f"{row:09d}.{image.ending}")
        info.size = len(image.data)
        offset = self._file.tell() + _BLOCK
        self._tar.addfile(info, io.BytesIO(image.data))
        self._table.append((row, offset, info.size, image.width, image.height, image.orientation))
        self.seen += 1

    def leave_out(self, row: int, reason: str, detail: str) -> None:
        """Note an image that is not packed."""
        self._left_out.append((row, reason, detail))
        self.seen += 1

    def finish(self) -> None:
        """Put the shard in its place, then the record that makes it count."""
        self._tar.close()
        flush_to_disk(self._raw)
        self._raw.close()
        move_into_place(self._partial, self._final)
        meta = {"size": self._file.tell(), "sha256": self._file.sha256, "left_out": self._left_out}
        table = np.array(self._table, np.int64).reshape(-1, 6)
        record = _record_path(self._work, self._planned)
        with atomic_write(record, durable=True) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, table=table, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))

    def close(self) -> None:
        """Give up what is not finished."""
        self._raw.close()


@dataclass(frozen=True)
class _Record:
    """A whole shard: table int64 [n, 6] of row, offset, size, width, height, orientation; bytes, checksum, left out."""

    table: IntArray
    size: int
    sha256: str
    left_out: list[tuple[int, str, str]]


def _record_path(work: Path, planned: _Planned) -> Path:
    return work / f"{planned.name}.npz"


def _load_record(work: Path, planned: _Planned) -> _Record | None:
    """The record of a shard; None when it has none."""
    path = _record_path(work, planned)
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            return _Record(arrays["table"], meta["size"], meta["sha256"], [tuple(x) for x in meta["left_out"]])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and repeat the command") from error


def _is_whole(number: int) -> bool:
    """Whether a shard of the plan was written, and still has the bytes that were written."""
    context = _context()
    record = _load_record(context.work, context.plan[number])
    path = context.work / "shards" / f"{context.plan[number].name}.tar"
    if record is None or not path.exists():
        return False
    return path.stat().st_size == record.size and file_sha256(path) == record.sha256


def _checked(number: int) -> tuple[int, bool]:
    return number, _is_whole(number)


def _add(writer: _ShardWriter, split: Split, row: int, read: Callable[[], bytes]) -> None:
    """Pack one image, or leave it out if that is allowed."""
    context = _context()
    try:
        writer.add(row, _make_image(read(), split, row, context.options, context.level))
    except _Bad as bad:
        reason, detail = bad.args
        if not context.options.leave_out:
            words = f"{reason} ({detail})" if detail else reason
            raise UserError(
                f"image {split.place(row)} of split {split.name!r} cannot be packed: {words}; put it right, or pass "
                "--leave-out to go on without such images"
            ) from bad
        writer.leave_out(row, reason, detail)


def _pack_files(number: int) -> int:
    """Write one shard from images that can be read in any order. Returns the number of samples."""
    context = _context()
    planned = context.plan[number]
    split = context.manifest.splits[planned.split]
    writer = _ShardWriter(context.work, planned)
    try:
        for row in planned.rows.tolist():
            _add(writer, split, row, partial(_read, split, row))
        writer.finish()
    finally:
        writer.close()
    return len(planned.rows)


def _pack_tar(tar: int) -> int:
    """Write the shards that are missing of those that come from a tar file. Returns the number of samples."""
    context = _context()
    assert context.names is not None
    wanted = [i for i in context.missing if context.plan[i].tar == tar]
    # Shards of a split follow each other in the tar file, so one of each split is open at a time.
    shard_of = {(context.plan[i].split, row): i for i in wanted for row in context.plan[i].rows.tolist()}
    writers: dict[int, _ShardWriter] = {}
    try:
        for archive, member, reason in read_members(context.tars[tar]):
            sample = -1 if reason else context.names.find(member_path(member))
            if sample < 0:
                continue
            split, row = context.names.locate(sample)
            number = shard_of.get((split.name, row))
            if number is None:
                continue
            if number not in writers:
                writers[number] = _ShardWriter(context.work, context.plan[number])
            _add(writers[number], split, row, partial(member_bytes, context.tars[tar], archive, member))
            if writers[number].seen == len(context.plan[number].rows):
                writers.pop(number).finish()
        if writers:
            raise UserError(f"tar file {context.tars[tar]} has changed since it was looked through; repeat the command")
    finally:
        for writer in writers.values():
            writer.close()
    return sum(len(context.plan[i].rows) for i in wanted)


@dataclass
class _Context:
    """What all processes know."""

    options: PackOptions
    manifest: Manifest
    work: Path
    level: Level
    tars: list[Path] = field(default_factory=list)
    names: MemberIndex | None = None
    plan: list[_Planned] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Split name -> samples that are in no tar file.
    absent: dict[str, int] = field(default_factory=dict)


# Set before the worker processes are forked, which inherit it: nothing of it is copied.
_shared: list[_Context] = []


def _context() -> _Context:
    return _shared[-1]


def _run(function: Callable[[int], Any], jobs: Sequence[int] | range, context: _Context) -> Iterator[Any]:
    """Results of jobs in any order, over worker processes."""
    workers = min(context.options.workers or len(os.sched_getaffinity(0)), len(jobs))
    _shared.append(context)
    try:
        if workers <= 1:
            yield from map(function, jobs)
            return
        with worker_pool(workers) as pool:
            try:
                for future in as_completed([pool.submit(function, job) for job in jobs]):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that was packing images died (out of memory?); repeat the command with fewer "
                    "--workers to go on from the shards that are whole"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        _shared.pop()


def pack(options: PackOptions) -> Manifest:
    """Pack the images of a Manifest into shards and write a Manifest of them.

    A run that was cut off goes on with the shards that are whole when it is repeated.

    Returns:
        The new Manifest: the same classes, splits, labels, boxes and ids; images that were shrunk have their new
        sizes. Samples keep their order, except with `tars`, where they have the order of the tar files.

    Raises:
        UserError: the Manifest or its images cannot be used, or there is no room.
    """
    if options.short_side is not None and options.short_side < 1:
        raise UserError(f"--short-side is {options.short_side}; it must be 1 or more")
    if not 1 <= options.quality <= 95:
        raise UserError(f"--quality is {options.quality}; it must lie between 1 and 95")
    if options.shard_size < 1:
        raise UserError("--shard-size must be greater than 0")
    manifest = Manifest(options.manifest, options.image_root)
    ManifestWriter.check_target(options.out, options.overwrite)
    out = Path(os.path.abspath(options.out))
    for used in (manifest.folder, manifest.image_root, options.tars):
        if used is not None and used.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{used} lies inside --out {options.out} and is needed; choose another --out")
    work = out.with_name(out.name + ".packing")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            try:
                return _pack(options, manifest, out, work)
            finally:
                if not (work / "plan.json").exists():
                    # Done, or not begun.
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"writing {error.filename or work} failed ({error.strerror or error}); what is whole is kept, and the same "
            "command goes on from it"
        ) from error


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another command is packing into {work}; wait for it, or stop it") from error
        yield


def _level(options: PackOptions, manifest: Manifest, report: dict[str, Any]) -> Level:
    if options.verify is not None:
        return options.verify
    if options.tars is None and report.get("verify") in ("decode", "header"):
        return "header"
    return choose_level(None, sum(len(split) for split in manifest.splits.values()))


def _pack(options: PackOptions, manifest: Manifest, out: Path, work: Path) -> Manifest:
    report_path = manifest.folder / "report.json"
    report = json.loads(report_path.read_text(encoding="utf-8")) if report_path.exists() else {}
    context = _Context(options, manifest, work, _level(options, manifest, report))
    if options.tars is not None:
        context.tars = find_tars(options.tars)
    staging = partial_path(out)
    if not (work / "shards").exists() and (staging / "shards").exists():
        # Cut off after the last shard, when the Manifest was being put in its place.
        os.rename(staging / "shards", work / "shards")
    (work / "shards").mkdir(exist_ok=True)
    _settle_plan(context)
    context.missing = sorted(number for number, whole in _run(_checked, range(len(context.plan)), context) if not whole)
    total = sum(len(planned.rows) for planned in context.plan)
    kept = total - sum(len(context.plan[i].rows) for i in context.missing)
    if kept:
        context.notes.append(f"kept from a run that was cut off: {len(context.plan) - len(context.missing):,} shards")
    with show_progress(total, "packing images", options.progress) as advance:
        advance(kept)
        if options.tars is None:
            jobs = _run(_pack_files, context.missing, context)
        else:
            context.names = context.names or MemberIndex(list(manifest.splits.values()))
            jobs = _run(_pack_tar, sorted({context.plan[i].tar for i in context.missing}), context)
        for count in jobs:
            advance(count)
    packed = _finish(context, report)
    (work / "plan.json").unlink()
    return packed


def _settle_plan(context: _Context) -> None:
    """Take over the plan of a run that was cut off, or make one. `UserError` if it was another command's."""
    options, work = context.options, context.work
    settings = {
        "manifest": str(context.manifest.folder.resolve()),
        "content": context.manifest.meta,
        "image_root": str(context.manifest.image_root.resolve()),
        "short_side": options.short_side,
        "quality": options.quality if options.short_side is not None else None,
        "shard_size": options.shard_size,
        "leave_out": options.leave_out,
        "verify": context.level,
        "tars": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in context.tars],
    }
    path = work / "plan.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            begun = found.pop("settings")
            # Whole shards have no bad image, so to leave such out may be decided on the way; not the reverse.
            if begun == settings or begun == {**settings, "leave_out": False}:
                with np.load(work / "plan.npz") as arrays:
                    parts = np.split(arrays["rows"], arrays["bounds"][1:-1])
                context.plan = [
                    _Planned(name, split, rows, tar)
                    for (name, split, tar), rows in zip(found["shards"], parts, strict=True)
                ]
                context.notes, context.absent = found["notes"], found["absent"]
                _save_plan(path, {"settings": settings, **found})
                return
        except (ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {work}, and repeat the command") from error
        raise UserError(
            f"{work} holds shards of another command, or its images have changed since; repeat that command, or "
            f"delete {work}"
        )
    context.plan = _plan_files(context.manifest, options) if options.tars is None else _plan_tars(context)
    rows = [planned.rows for planned in context.plan]
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in rows])]).astype(np.int64)
    with open(work / "plan.npz", "wb") as file:
        np.savez(file, rows=np.concatenate([np.empty(0, np.int64), *rows]), bounds=bounds)
    _save_plan(
        path,
        {
            "settings": settings,
            "shards": [[planned.name, planned.split, planned.tar] for planned in context.plan],
            "notes": context.notes,
            "absent": context.absent,
        },
    )


def _save_plan(path: Path, plan: dict[str, Any]) -> None:
    write_text(path, json.dumps(plan, ensure_ascii=False))


def _finish(context: _Context, report: dict[str, Any]) -> Manifest:
    """Write the Manifest of the shards, move them into it, and put it in its place."""
    options, manifest, work = context.options, context.manifest, context.work
    writer = ManifestWriter(options.out, manifest.name, manifest.classes, None, options.overwrite)
    reasons = Counter({"in no tar file": sum(context.absent.values())}) if context.absent else Counter()
    listed: list[dict[str, str]] = []
    splits: dict[str, Any] = {}
    total = 0
    for name, split in manifest.splits.items():
        planned = [entry for entry in context.plan if entry.split == name]
        records = [record for entry in planned if (record := _load_record(work, entry)) is not None]
        for row, reason, detail in (entry for record in records for entry in record.left_out):
            reasons[reason] += 1
            if len(listed) < _MAX_LISTED:
                listed.append({"split": name, "path": split.relative_path(row), "reason": reason, "detail": detail})
        table = np.concatenate([record.table for record in records] or [np.empty((0, 6), np.int64)])
        if not len(table):
            raise UserError(f"no image of split {name!r} can be packed; delete {work}, and mend the images")
        counts = [len(record.table) for record in records]
        # A shard of which every image was left out is an empty tar.
        used = [number for number, count in enumerate(counts) if count]
        numbers = np.repeat(np.arange(len(used)), [counts[number] for number in used])
        files = [ShardFile(f"{planned[i].name}.tar", records[i].size, counts[i], records[i].sha256) for i in used]
        total += sum(file.size for file in files)
        known, observed = _write_split(writer, split, table)
        np.save(writer.staging / name / INDEX_FILE, np.column_stack([numbers, table[:, 1:3]]).astype(np.int64))
        (writer.staging / name / SHARDS_FILE).write_text(json.dumps([asdict(f) for f in files], indent=1), "utf-8")
        old = report.get("splits", {}).get(name, {})
        splits[name] = {
            **old,
            "samples": len(table),
            "known": count_labels(known),
            "observed": count_labels(observed),
            "without_positive": int((known.row_counts(POSITIVE) == 0).sum()),
            "classes_without_positive": int((known.class_counts(POSITIVE) == 0).sum()),
            "shards": len(files),
        }
    before = report.get("left_out", {"total": 0, "reasons": {}})
    made = {
        **report,
        "notes": [*report.get("notes", []), *context.notes],
        "splits": splits,
        "left_out": {
            "total": before["total"] + sum(reasons.values()),
            "reasons": dict((Counter(before["reasons"]) + reasons).most_common()),
            # Version 0.1.0 called the list `pictures`.
            "images": [*before.get("images", before.get("pictures", [])), *listed][:_MAX_LISTED],
        },
        "shards": {
            "manifest": str(manifest.folder.resolve()),
            "bytes": total,
            "short_side": options.short_side,
            "quality": options.quality if options.short_side is not None else None,
            "verify": context.level,
            "left_out": sum(reasons.values()),
        },
    }
    os.rename(work / "shards", writer.staging / "shards")
    writer.image_root = (writer.staging / "shards").resolve()
    return writer.finish(made)


def _write_split(writer: ManifestWriter, split: Split, table: IntArray) -> tuple[Any, Any]:
    """Carry a split over to the rows that were packed; returns its known and its observed labels."""
    raw = RawSplit(
        split.name,
        split.known,
        paths=None if split.templates else [split.relative_path(i) for i in range(len(split))],
        ids=None if split.ids is None else np.asarray(split.ids),
        template=split.templates or None,
        template_of=split.template_of,
        boxes=split.boxes,
    ).select(table[:, 0])
    # Not `hides_labels`: training may see labels besides those that are known.
    observed = None if split.observed is split.known else split.observed
    if observed is not None and (len(table) != len(split) or (np.diff(table[:, 0]) != 1).any()):
        observed = observed.select(table[:, 0])
    writer.add_split(
        split.name,
        known=raw.known,
        observed=observed,
        hides_labels=split.hides_labels,
        width=table[:, 3],
        height=table[:, 4],
        orientation=table[:, 5],
        paths=raw.paths,
        ids=raw.ids,
        template=raw.template,
        template_of=raw.template_of,
        boxes=raw.boxes,
    )
    return raw.known, raw.known if observed is None else observed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `launch/prepare.py shard`."""
    parser.add_argument("--manifest", type=Path, help="Manifest whose images are packed")
    parser.add_argument("--out", type=Path, help="Manifest to write; the shards lie in its folder shards")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="compare the shards of this Manifest with their checksums instead"
    )
    parser.add_argument("--image-root", type=Path, help="image folder, when it is not where it was at preparation")
    parser.add_argument(
        "--tars", type=Path, metavar="DIR", help="the images are in the tar files (also compressed) of this folder"
    )
    parser.add_argument(
        "--short-side", type=int, metavar="N", help="shrink images to N pixels on their short side (default: copy)"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of shrunk images (default: %(default)s)")
    parser.add_argument(
        "--shard-size", type=float, default=256, metavar="MB", help="size of a shard in 10^6 bytes (%(default)s)"
    )
    parser.add_argument("--leave-out", action="store_true", help="go on without images that are missing or damaged")
    parser.add_argument(
        "--verify",
        choices=["decode", "header", "none"],
        help="look at every image: decode all of it, its header, or not at all (default: header if preparation has "
        "looked at the images, else decode up to 200,000)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the Manifest that is already at --out")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")


def command(options: argparse.Namespace) -> str:
    """Do what the options say; returns the summary."""
    if options.workers is not None and options.workers < 1:
        raise UserError("--workers needs at least one process")
    if options.check is not None:
        return _check(Manifest(options.check, options.image_root))
    if options.manifest is None or options.out is None:
        raise UserError("give --manifest and --out to pack images, or --check DIR to check shards")
    names = ("manifest", "out", "image_root", "tars", "short_side", "quality", "leave_out", "verify", "overwrite")
    chosen = {name: getattr(options, name) for name in names}
    packed = pack(PackOptions(**chosen, shard_size=int(options.shard_size * 1e6), workers=options.workers))
    return _summary(packed)


def _check(manifest: Manifest) -> str:
    total, files = 0, 0
    for split in manifest.splits.values():
        if split.shards is None:
            raise UserError(f"the images of {split.folder} are not in shards; there is nothing to check")
        total += check_shards(split.shards)
        files += len(split.shards.files)
    return f"{files:,} shards, {total:,} bytes: every checksum is right"


def _summary(manifest: Manifest) -> str:
    report = json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))
    made = report["shards"]
    lines = [f"{manifest.name}: {made['bytes']:,} bytes in shards"]
    for name, split in report["splits"].items():
        plural = "s" if split["shards"] != 1 else ""
        lines.append(f"  {name}: {split['samples']:,} images in {split['shards']:,} shard{plural}")
    lines += report["notes"]
    if made["left_out"]:
        lines.append(f"left out: {made['left_out']:,} images (see {manifest.folder / 'report.json'})")
    lines.append(f"Manifest: {manifest.folder}")
    lines.append(f"check it later: python launch/prepare.py shard --check {manifest.folder}")
    return "\n".join(lines)
