"""Packs all images over worker processes, and resumes a run that was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from spml_fast.core import env
from spml_fast.core.errors import UserError
from spml_fast.core.io import partial_path
from spml_fast.core.progress import show_progress
from spml_fast.core.urls import Url
from spml_fast.data.image_check import Level, choose_level
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.pack.images import UnusableImageError, make_image, read_image
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.plan import PackPlan, TarSource, load_or_make_plan
from spml_fast.prepare.pack.result import write_manifest
from spml_fast.prepare.pack.upload import Upload
from spml_fast.prepare.pack.workers import run_jobs
from spml_fast.prepare.pack.writer import ShardWriter, is_whole
from spml_fast.prepare.tar_source import member_bytes, member_path, read_members


@dataclass
class _Work:
    """What all processes know.

    Attributes:
        options: of the run.
        manifest: whose images are packed.
        folder: of the unfinished work.
        level: how closely images are checked.
        plan: the shards to write.
        tars: the tar files that hold the images; None without.
        missing: numbers of the planned shards that are not written yet.
    """

    options: PackOptions
    manifest: Manifest
    folder: Path
    level: Level
    plan: PackPlan
    tars: TarSource | None
    upload: Upload | None = None
    missing: list[int] = field(default_factory=list)

    @property
    def put(self) -> Callable[[Path], None] | None:
        """What takes a whole shard to where it belongs."""
        return None if self.upload is None else self.upload.put_shard


def _check_shard(work: _Work, number: int) -> tuple[int, bool]:
    """(number, whether that shard of the plan is whole)."""
    planned = work.plan.shards[number]
    return number, is_whole(work.folder, planned) if work.upload is None else work.upload.is_whole(work.folder, planned)


def _add_image(work: _Work, writer: ShardWriter, split: Split, row: int, read: Callable[[], bytes]) -> None:
    """Pack one image, or leave it out if that is allowed."""
    options = work.options
    try:
        image = make_image(read(), split, row, work.level, options.short_side, options.quality)
    except UnusableImageError as unusable:
        if not options.leave_out:
            what = f"{unusable.reason} ({unusable.detail})" if unusable.detail else unusable.reason
            raise UserError(
                f"image {split.place(row)} of split {split.name!r} cannot be packed: {what}; fix it, or pass "
                "--leave-out to leave such images out"
            ) from unusable
        writer.leave_out(row, unusable.reason, unusable.detail)
    else:
        writer.add(row, image)


def _pack_files(work: _Work, number: int) -> int:
    """Write one shard from images that can be read in any order. Returns the number of samples."""
    planned = work.plan.shards[number]
    split = work.manifest.splits[planned.split]
    writer = ShardWriter(work.folder, planned, work.put)
    try:
        for row in planned.rows.tolist():
            _add_image(work, writer, split, row, partial(read_image, split, row))
        writer.finish()
    finally:
        writer.close()
    return len(planned.rows)


def _pack_tar(work: _Work, tar: int) -> int:
    """Write the shards that are missing of those that come from a tar file. Returns the number of samples."""
    assert work.tars is not None
    shards, path, index = work.plan.shards, work.tars.paths[tar], work.tars.index
    wanted = [number for number in work.missing if shards[number].tar == tar]
    # Shards of a split follow each other in the tar file, so one of each split is open at a time.
    shard_of = {(shards[number].split, row): number for number in wanted for row in shards[number].rows.tolist()}
    writers: dict[int, ShardWriter] = {}
    try:
        for archive, member, reason in read_members(path):
            sample = -1 if reason else index.find(member_path(member))
            if sample < 0:
                continue
            split, row = index.locate(sample)
            number = shard_of.get((split.name, row))
            if number is None:
                continue
            if number not in writers:
                writers[number] = ShardWriter(work.folder, shards[number], work.put)
            _add_image(work, writers[number], split, row, partial(member_bytes, path, archive, member))
            if writers[number].seen == len(shards[number].rows):
                writers.pop(number).finish()
        if writers:
            raise UserError(f"tar file {path} has changed since it was scanned; repeat the command")
    finally:
        for writer in writers.values():
            writer.close()
    return sum(len(shards[number].rows) for number in wanted)


def pack(options: PackOptions) -> Manifest:
    """Pack the images of a Manifest into shards and write a Manifest of them.

    A run that was cut off resumes with the shards that are whole when it is repeated.

    Returns:
        The new Manifest: the same classes, splits, labels, boxes and ids; images that were shrunk have their new
        sizes. Samples keep their order, except with `tars`, where they have the order of the tar files.

    Raises:
        UserError: the Manifest or its images cannot be used, or there is no room.
    """
    manifest = Manifest(options.manifest, options.image_root)
    upload = Upload(options.out) if isinstance(options.out, Url) else None
    folder = _work_folder(options, manifest)
    manifest.register_reader()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                return _pack(options, manifest, folder, upload)
            finally:
                if not (folder / "plan.json").exists():
                    # Done, or not begun.
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"writing {error.filename or folder} failed ({error.strerror or error}); what is whole is kept, and the "
            "same command resumes from it"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands from packing into a folder. Raises `UserError` if one is."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another command is packing into {folder}; wait for it, or stop it") from error
        yield


def _choose_level(options: PackOptions, manifest: Manifest, report: Mapping[str, Any]) -> Level:
    if options.verify is not None:
        return options.verify
    if options.tars is None and report.get("verify") in ("decode", "header"):
        return "header"
    return choose_level(None, sum(len(split) for split in manifest.splits.values()))


def _work_folder(options: PackOptions, manifest: Manifest) -> Path:
    """Folder of the unfinished work. Raises `UserError` where the Manifest must not be written to `out`."""
    if isinstance(options.out, Url):
        name = hashlib.sha256(options.out.encode()).hexdigest()[:16]
        # A folder of its own: it is removed when the work is done.
        return (options.work or env.cache_home() / "spml_fast" / "packing") / name
    ManifestWriter.check_target(options.out, options.overwrite)
    out = Path(os.path.abspath(options.out))
    for used in (manifest.source, manifest.image_root, options.tars):
        if isinstance(used, Path) and used.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{used} lies inside --out {options.out} and is needed; choose another --out")
    return out.with_name(out.name + ".packing")


def _pack(options: PackOptions, manifest: Manifest, folder: Path, upload: Upload | None) -> Manifest:
    if upload is not None and (finished := upload.finished(folder)) is not None:
        (folder / "plan.json").unlink()
        return finished
    report_path = manifest.folder / "report.json"
    report = json.loads(report_path.read_text(encoding="utf-8")) if report_path.exists() else {}
    level = _choose_level(options, manifest, report)
    tars = None if options.tars is None else TarSource(options.tars, manifest.splits)
    if upload is not None:
        upload.check(folder)
        options = replace(options, out=folder / "manifest", work=None, overwrite=True)
    assert isinstance(options.out, Path)
    staging = partial_path(Path(os.path.abspath(options.out)))
    if not (folder / "shards").exists() and (staging / "shards").exists():
        # Cut off after the last shard, when the Manifest was being put in its place.
        os.rename(staging / "shards", folder / "shards")
    (folder / "shards").mkdir(exist_ok=True)
    plan = load_or_make_plan(folder, manifest, options, level, tars)
    if upload is not None:
        # Before anything else is written there, and once there is a plan that a run that is cut off resumes from.
        upload.claim(folder)
    work = _Work(options, manifest, folder, level, plan, tars, upload)
    numbers = range(len(plan.shards))
    work.missing = sorted(
        number for number, whole in run_jobs(_check_shard, numbers, work, options.workers) if not whole
    )
    total = sum(len(planned.rows) for planned in plan.shards)
    kept = total - sum(len(plan.shards[number].rows) for number in work.missing)
    if kept:
        plan.notes.append(f"kept from a run that was cut off: {len(plan.shards) - len(work.missing):,} shards")
    with show_progress(total, "packing images", options.progress) as advance:
        advance(kept)
        if tars is None:
            counts = run_jobs(_pack_files, work.missing, work, options.workers)
        else:
            # Made before the worker processes are forked, so that they share it.
            _ = tars.index
            wanted = sorted({plan.shards[number].tar for number in work.missing})
            counts = run_jobs(_pack_tar, wanted, work, options.workers)
        for count in counts:
            advance(count)
    packed = write_manifest(options, manifest, folder, plan, level, report)
    if upload is not None:
        packed = upload.publish(packed)
    (folder / "plan.json").unlink()
    return packed
