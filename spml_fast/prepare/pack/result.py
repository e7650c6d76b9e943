"""The Manifest of the packed images: the old one's columns, for the images that were packed, in their order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.data.image_check import Level
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.shards import CRC_FILE, INDEX_FILE, SHARDS_FILE, ShardFile
from spml_fast.data.sparse_labels import POSITIVE, SparseLabels
from spml_fast.prepare.build import MAX_LISTED, count_labels
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.plan import IntArray, PackPlan, PlannedShard
from spml_fast.prepare.pack.writer import COLUMNS, ShardRecord, load_record
from spml_fast.prepare.raw import RawSplit


class _LeftOut:
    """Images that were not packed, counted by reason and listed one by one."""

    def __init__(self, absent: int) -> None:
        self.reasons: Counter[str] = Counter({"in no tar file": absent} if absent else {})
        self.listed: list[dict[str, str]] = []

    def add(self, split: Split, record: ShardRecord) -> None:
        """Count what one shard leaves out."""
        for row, reason, detail in record.left_out:
            self.reasons[reason] += 1
            if len(self.listed) < MAX_LISTED:
                path = split.relative_path(row)
                self.listed.append({"split": split.name, "path": path, "reason": reason, "detail": detail})

    def report(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The report's entry, together with what preparation had left out."""
        return {
            "total": earlier["total"] + sum(self.reasons.values()),
            "reasons": dict((Counter(earlier["reasons"]) + self.reasons).most_common()),
            # Version 0.1.0 called the list `pictures`.
            "images": [*earlier.get("images", earlier.get("pictures", [])), *self.listed][:MAX_LISTED],
        }


def write_manifest(
    options: PackOptions, manifest: Manifest, work: Path, plan: PackPlan, level: Level, report: Mapping[str, Any]
) -> Manifest:
    """Write the Manifest of the shards in `work`, move them into it, and put it in its place.

    Args:
        options: of the run.
        manifest: whose images were packed.
        work: folder of the unfinished work.
        plan: the shards, all of them written.
        level: how closely the images were checked.
        report: the old Manifest's report.

    Raises:
        UserError: a split has no image that could be packed, or the Manifest cannot be written.
    """
    writer = ManifestWriter(options.out, manifest.name, manifest.classes, None, options.overwrite)
    left_out = _LeftOut(sum(plan.absent.values()))
    splits: dict[str, Any] = {}
    total = 0
    for name, split in manifest.splits.items():
        entries = [entry for entry in plan.shards if entry.split == name]
        records = [record for entry in entries if (record := load_record(work, entry)) is not None]
        for record in records:
            left_out.add(split, record)
        table = np.concatenate([record.table for record in records] or [np.empty((0, COLUMNS), np.int64)])
        if not len(table):
            raise UserError(f"no image of split {name!r} can be packed; delete {work}, and fix the images")
        known, observed = _write_split(writer, split, table)
        files = _write_index(writer.staging / name, entries, records, table)
        total += sum(file.size for file in files)
        splits[name] = {
            **report.get("splits", {}).get(name, {}),
            "samples": len(table),
            "known": count_labels(known),
            "observed": count_labels(observed),
            "without_positive": int((known.row_counts(POSITIVE) == 0).sum()),
            "classes_without_positive": int((known.class_counts(POSITIVE) == 0).sum()),
            "shards": len(files),
        }
        if "left_out" in splits[name]:
            # Preparation has counted its own.
            splits[name]["left_out"] += plan.absent.get(name, 0) + sum(len(record.left_out) for record in records)
    new_report = {
        **report,
        "notes": [*report.get("notes", []), *plan.notes],
        "splits": splits,
        "left_out": left_out.report(report.get("left_out", {"total": 0, "reasons": {}})),
        "shards": {
            "manifest": manifest.where,
            "bytes": total,
            "short_side": options.short_side,
            "quality": options.quality if options.short_side is not None else None,
            "verify": level,
            "left_out": sum(left_out.reasons.values()),
        },
    }
    os.rename(work / "shards", writer.staging / "shards")
    writer.image_root = (writer.staging / "shards").resolve()
    return writer.finish(new_report)


def _write_index(
    folder: Path, entries: list[PlannedShard], records: list[ShardRecord], table: IntArray
) -> list[ShardFile]:
    """Write where every image of a split lies; returns the shards that have any."""
    counts = [len(record.table) for record in records]
    # A shard of which every image was left out is an empty tar.
    used = [number for number, count in enumerate(counts) if count]
    numbers = np.repeat(np.arange(len(used)), [counts[number] for number in used])
    files = [ShardFile(f"{entries[i].name}.tar", records[i].size, counts[i], records[i].sha256) for i in used]
    np.save(folder / INDEX_FILE, np.column_stack([numbers, table[:, 1:3]]).astype(np.int64))
    np.save(folder / CRC_FILE, table[:, 6].astype(np.uint32))
    (folder / SHARDS_FILE).write_text(json.dumps([asdict(file) for file in files], indent=1), "utf-8")
    return files


def _write_split(writer: ManifestWriter, split: Split, table: IntArray) -> tuple[SparseLabels, SparseLabels]:
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
