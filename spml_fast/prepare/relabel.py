"""A new version of a Manifest with the labels that were decided on; the old one stays as it is."""

from __future__ import annotations

import datetime
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.invocation import next_lines
from spml_fast.core.io import file_record
from spml_fast.core.text import formula_safe_path, printable
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.build import count_labels
from spml_fast.prepare.decisions import Decision, Decisions, check_agree
from spml_fast.prepare.manifest_writer import ManifestWriter

NAMES = {POSITIVE: "positive", NEGATIVE: "negative", UNKNOWN: "unknown"}


@dataclass
class Changes:
    """What decisions change in one split.

    Attributes:
        rows: image of each pair (image, class) whose label changes.
        classes: its class.
        codes: its new code.
        kinds: pairs by `unknown -> positive` and the like.
        by_class: the same for each class id.
        confirmed: decided labels that are so already.
    """

    rows: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    by_class: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    confirmed: int = 0


def find_changes(manifest: Manifest, decisions: Decisions) -> dict[str, Changes]:
    """What decisions change, by split.

    Args:
        manifest: the data set that the suggestions are about.
        decisions: as read.

    Raises:
        UserError: naming file and line: no such split or image, or a label that is another one now than it was when
            the suggestion was made.
    """
    by_split: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions.made.values():
        if decision.split not in manifest.splits:
            raise UserError(
                f"{decision.where}: {manifest.source} has no split {printable(decision.split)!r}; it has "
                f"{', '.join(sorted(manifest.splits))}"
            )
        by_split[decision.split].append(decision)
    return {name: _split_changes(manifest, manifest.split(name), found) for name, found in by_split.items()}


def _split_changes(manifest: Manifest, split: Split, decisions: Sequence[Decision]) -> Changes:
    places = _places(split, {decision.path for decision in decisions})
    for decision in decisions:
        if decision.path not in places:
            raise UserError(_no_image(manifest, split, decision))
    rows = [places[decision.path] for decision in decisions]
    class_ids = [decision.class_id for decision in decisions]
    now = split.observed.codes_at(rows, class_ids).tolist()
    # What is observed may be unknown to evaluation (labels of a machine); a decision is for both.
    truth = now if split.hides_labels else split.known.codes_at(rows, class_ids).tolist()
    changes = Changes()
    # One image may be written in two ways, with and without `./`.
    first: dict[tuple[int, int], Decision] = {}
    for decision, row, code, known in zip(decisions, rows, now, truth, strict=True):
        before = first.setdefault((row, decision.class_id), decision)
        if before is not decision:
            check_agree(before, decision, manifest.classes[decision.class_id])
            continue
        if code == known == decision.label:
            changes.confirmed += 1
            continue
        name = manifest.classes[decision.class_id]
        if code != decision.label and decision.known not in (None, code):
            raise UserError(
                f"{decision.where}: {printable(decision.path)}, {printable(name)} is {NAMES[code]} in "
                f"{manifest.source}, and was {NAMES[decision.known or 0]} when it was suggested; give the Manifest "
                "that the suggestions are about"
            )
        kind = f"{NAMES[known if code == decision.label else code]} -> {NAMES[decision.label]}"
        changes.kinds[kind] += 1
        changes.by_class[decision.class_id][kind] += 1
        changes.rows.append(row)
        changes.classes.append(decision.class_id)
        changes.codes.append(decision.label)
    return changes


def _places(split: Split, paths: set[str]) -> dict[str, int]:
    """Row of each path that the split has; a path may have the `./` of `formula_safe_path`."""
    found: dict[str, int] = {}
    for row in range(len(split)):
        path = split.relative_path(row)
        for name in (path, formula_safe_path(path)):
            if name in paths:
                found.setdefault(name, row)
    return found


def _no_image(manifest: Manifest, split: Split, decision: Decision) -> str:
    others = [s.name for s in manifest.splits.values() if s is not split and _places(s, {decision.path})]
    hint = f"; it is in split {others[0]} (--split {others[0]})" if others else ""
    return f"{decision.where}: split {split.name} of {manifest.source} has no image {printable(decision.path)!r}{hint}"


def relabel(manifest: Manifest, decisions: Decisions, source: Path, out: Path) -> tuple[Manifest, dict[str, Changes]]:
    """Write a new version of a Manifest. Images are neither copied nor moved.

    What was decided becomes an observed label, which training sees, and a known one, which evaluation sees, except in a
    split that hides known labels (a simulation): its truth stays what it is.

    Args:
        manifest: the data set; nothing of it is changed.
        decisions: about its labels.
        source: the file that they were read from.
        out: folder of the new Manifest, which must be empty or not exist.

    Returns:
        The new Manifest, and what changed by split.

    Raises:
        UserError: as `find_changes`, or `out` cannot be used.
    """
    ManifestWriter.check_target(out, overwrite=False)
    changes = find_changes(manifest, decisions)
    root = None if manifest.meta["image_root"] == "." else manifest.image_root
    writer = ManifestWriter(out, manifest.name, manifest.classes, root)
    try:
        report = _report(manifest)
        for name, split in manifest.splits.items():
            known, observed = _new_labels(split, changes.get(name, Changes()))
            writer.copy_split(split, manifest.meta["splits"][name], known, observed)
            _update_counts(report, name, known or split.known, observed or known or split.observed)
        versions = [*report.get("relabelled", []), _record(manifest, decisions, source, changes)]
        writer.version = str(len(versions) + 1)
        return writer.finish(report | {"relabelled": versions}), changes
    except OSError as error:
        shutil.rmtree(writer.staging, ignore_errors=True)
        raise UserError(f"writing {writer.staging} failed: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(writer.staging, ignore_errors=True)
        raise


def _new_labels(split: Split, changes: Changes) -> tuple[SparseLabels | None, SparseLabels | None]:
    """The split's known and observed labels with the changes; None for those that stay the files they are."""
    if not changes.rows:
        return None, None
    given = (changes.rows, changes.classes, changes.codes)
    known = None if split.hides_labels else split.known.with_codes(*given)
    # Without a folder of their own observed labels are the known ones.
    return known, split.observed.with_codes(*given) if (split.folder / "observed").exists() else None


def _report(manifest: Manifest) -> dict[str, Any]:
    """The Manifest's report; empty where it has none."""
    path = manifest.folder / "report.json"
    if not path.exists():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or delete it") from error
    return report


def _update_counts(report: dict[str, Any], name: str, known: SparseLabels, observed: SparseLabels) -> None:
    """Counts of a split in the report, where it has them."""
    entry = report.get("splits", {}).get(name)
    if not isinstance(entry, dict):
        return
    entry |= {
        "known": count_labels(known),
        "observed": count_labels(observed),
        "without_positive": int((known.row_counts(POSITIVE) == 0).sum()),
        "classes_without_positive": int((known.class_counts(POSITIVE) == 0).sum()),
    }


def _record(manifest: Manifest, decisions: Decisions, source: Path, changes: dict[str, Changes]) -> dict[str, Any]:
    """Where the new version comes from, for report.json."""
    return {
        "from": manifest.where,
        "from_version": manifest.meta.get("version", "1"),
        "decisions": str(source.resolve()),
        "decisions_crc32": file_record(source).crc32,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": {name: count for name, count in decisions.runs.items() if name},
        "who": {name: count for name, count in decisions.people.items() if name},
        "when": list(decisions.days or ()),
        "rows": decisions.rows,
        "rows_by_decision": dict(decisions.counts),
        "changed": {name: dict(found.kinds) for name, found in changes.items()},
        "changed_by_class": {
            name: {manifest.classes[c]: dict(kinds) for c, kinds in sorted(found.by_class.items())}
            for name, found in changes.items()
        },
    }


# Classes that the summary names.
MAX_CLASSES = 20


def summary(old: Manifest, new: Manifest, decisions: Decisions, changes: dict[str, Changes], next_command: str) -> str:
    """What the command prints at its end.

    Args:
        old: the data set.
        new: its new version.
        decisions: that were applied.
        changes: by split.
        next_command: what to try next.
    """
    counted = ", ".join(f"{count:,} {name}" for name, count in sorted(decisions.counts.items()))
    lines = [f"{old.name}: {decisions.rows:,} rows: {counted}"]
    for name, found in changes.items():
        text = f"{name}: {len(found.rows):,} labels changed, {found.confirmed:,} confirmed as they were"
        lines.append(text + ("; the truth that evaluation uses is kept" if old.split(name).hides_labels else ""))
        lines += [f"  {count:,}  {kind}" for kind, count in sorted(found.kinds.items())]
        order = sorted(found.by_class, key=lambda c: (-sum(found.by_class[c].values()), c))
        for c in order[:MAX_CLASSES]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.by_class[c].items()))
            lines.append(f"  {printable(old.classes[c])}: {kinds}")
        if len(order) > MAX_CLASSES:
            lines.append(f"  and {len(order) - MAX_CLASSES:,} more classes (all are in {new.folder / 'report.json'})")
    if not any(found.rows for found in changes.values()):
        lines.append("no label changed")
    lines.append(f"Manifest: {new.folder} (version {new.meta['version']}; {old.source} is as it was)")
    lines.append(next_lines([next_command]))
    return "\n".join(lines)
