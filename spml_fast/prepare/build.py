"""From a raw data set to a Manifest: draw observed labels over all official rows, cut off the validation split, check
every image, drop the bad ones from every column, write the Manifest and its report."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line, next_lines
from spml_fast.data.image_check import CheckResults, Level, check_images, choose_level
from spml_fast.data.manifest import Manifest
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype
from spml_fast.prepare import convert
from spml_fast.prepare.boxes import TURNED_BACK, pixels_to_fractions, turn_fractions
from spml_fast.prepare.label_encodings import observed_from_file
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.observed_labels import published_split
from spml_fast.prepare.raw import CommonOptions, RawDataset, RawSplit

# At most this many left-out images are named one by one in report.json.
MAX_LISTED = 100_000
# How many classes are named on screen.
MAX_NAMED = 10


def build(raw: RawDataset, common: CommonOptions) -> Manifest:
    """Draw, cut, check, drop, write. Nothing is left at `common.out` when this raises.

    Raises:
        UserError: the output folder cannot be used, a split is empty, training has no positive, every image of a
            split is bad.
    """
    for split in raw.splits:
        if not len(split):
            raise UserError(f"split {split.name!r} of {raw.name} is empty; check the annotation files")
    writer = ManifestWriter(common.out, raw.name, raw.classes, raw.image_root, common.overwrite)
    try:
        return _build(raw, common, writer)
    except OSError as error:
        shutil.rmtree(writer.staging, ignore_errors=True)
        raise UserError(f"writing {writer.staging} failed: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(writer.staging, ignore_errors=True)
        raise


def _build(raw: RawDataset, common: CommonOptions, writer: ManifestWriter) -> Manifest:
    root = raw.image_root
    if raw.make_images is not None:
        root = writer.staging / "images"
        root.mkdir()
        raw.make_images(root)
        writer.image_root = root.resolve()
    if raw.labels_alone:
        root = Path()
    if root is None:
        raise ValueError("a data set needs an image root, or a way to make its images")
    present = [np.arange(len(s)) if s.present is None else np.flatnonzero(s.present) for s in raw.splits]
    level = "none" if raw.labels_alone else choose_level(common.verify, sum(len(rows) for rows in present))
    preparation = _Preparation(raw, common, writer, root, level)
    for official, rows in zip(raw.splits, present, strict=True):
        preparation.add(official, rows)
    if not preparation.splits[raw.splits[0].name]["known"]["positive"]:
        raise UserError(f"split {raw.splits[0].name!r} has no positive label at all; check classes and annotations")
    return writer.finish(preparation.report())


class _Preparation:
    """Draws, cuts, checks and writes one official split after the other, and keeps the report.

    Args:
        raw: the data set.
        common: options of every data set.
        writer: of the Manifest.
        root: folder of the images.
        level: how closely they are checked.

    Attributes:
        splits: final split -> its entry in the report.
    """

    def __init__(
        self, raw: RawDataset, common: CommonOptions, writer: ManifestWriter, root: Path, level: Level
    ) -> None:
        self.raw, self.common, self.writer, self.root, self.level = raw, common, writer, root, level
        self.splits: dict[str, Any] = {}
        self._left_out: list[dict[str, str]] = []
        self._reasons: Counter[str] = Counter()
        self._converted: list[dict[str, str]] = []
        self._notes = list(raw.notes)
        # Where the observed labels of the first split come from when they are not drawn.
        self._read_from: str | None = None
        if level == "none" and common.orientation == "exif":
            self._notes.append(
                "no image was checked, so --orientation exif turns none; leave out --verify none to turn images as "
                "their EXIF data say"
                if not raw.labels_alone
                else "there are no images to check, so --orientation exif turns none"
            )

    def add(self, official: RawSplit, present: npt.NDArray[np.int64]) -> None:
        """Write an official split, in two parts where validation is cut off it.

        Labels are drawn over all of its rows, so that those of an image do not depend on which other images are left
        out.
        """
        observed = self._observed(official)
        hides_labels = observed is not None
        if official.extra is not None:
            observed = merge_labels(official.known if observed is None else observed, official.extra)
        official, checked = self._check(official, present)
        parts = [(official.name, np.arange(len(official)))]
        if self.raw.carve is not None and self.raw.carve[0] == official.name:
            kept, cut = published_split(len(official))
            parts = [(official.name, kept), (self.raw.carve[1], cut)]
        for name, rows in parts:
            usable = rows[checked.ok[rows]]
            if not len(usable):
                raise UserError(f"split {name!r} is empty ({len(official)} rows in the official {official.name!r})")
            part = official.select(usable, name)
            seen = None if observed is None else observed.select(usable)
            entry = self._write(part, seen, hides_labels, checked, usable)
            entry["left_out"] = len(rows) - len(usable)
            self.splits[name] = entry

    def _observed(self, official: RawSplit) -> SparseLabels | None:
        """The labels that training sees of an official split, from a file or drawn; None for all that are known."""
        common = self.common
        if official.observed is not None:
            if common.observe.kind != "all":
                raise UserError(
                    "--observe draws labels, but the files say which are observed; leave it out, or the list"
                )
            if common.observed is not None and official is self.raw.splits[0]:
                raise UserError(
                    f"--observed {common.observed[0]} and the data set's own list both say which labels are observed; "
                    "give one of them"
                )
            self._read_from = "the data set's own list"
            return official.observed
        if common.observed is not None and official is self.raw.splits[0]:
            self._read_from = str(common.observed[0])
            self._notes.append(f"{official.name}: observed labels were read from {self._read_from}, not drawn")
            return observed_from_file(*common.observed, official.known)
        return common.observe.draw(official.known, common.seed, official.name)

    def _check(self, official: RawSplit, present: npt.NDArray[np.int64]) -> tuple[RawSplit, CheckResults]:
        """Check the images `present`, int64, of a split; it comes back with the paths of copies that were made.

        Raises:
            UserError: none of them can be used.
        """
        if self.level == "none":
            checked = check_images(len(present), str, "none")
        else:
            common, path_of = self.common, _full_path(official, self.root, present)
            label = f"{official.name} images"
            checked = check_images(
                len(present), path_of, self.level, common.workers, label, common.progress, common.max_pixels
            )
        if official.present is not None:
            checked = checked.among(present, len(official))
        if self.common.convert:
            # Images that the Manifest holds have their copies beside them, and move with it.
            own = self.raw.make_images is not None
            folder = (self.root if own else self.writer.staging) / convert.FOLDER
            prefix = convert.FOLDER if own else str(self.writer.folder / convert.FOLDER)
            official, made = convert.convert_rejected(official, checked, self.root, folder, prefix, self.common)
            self._converted += made
        for index, (reason, detail) in checked.rejected.items():
            self._reasons[reason] += 1
            if len(self._left_out) < MAX_LISTED:
                path = official.relative_path(index)
                self._left_out.append({"split": official.name, "path": path, "reason": reason, "detail": detail})
        if checked.ok.any():
            return official, checked
        if not len(present):
            raise UserError(f"there is no image for any of the {len(official)} rows of split {official.name!r}")
        first, (reason, detail) = next(iter(checked.rejected.items()))
        raise UserError(
            f"none of the {len(present)} images of split {official.name!r} can be used; the first is "
            f"{os.path.join(self.root, official.relative_path(first))}: {reason}{f' ({detail})' if detail else ''}"
            f"{', which --convert does' if convert.can_convert(reason) else ''}"
        )

    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        raw, common, reasons = self.raw, self.common, self._reasons
        # Reports of before have no such entries, and say the same.
        more: dict[str, Any] = {"negatives": common.observe.negatives} if common.observe.negatives else {}
        converted: dict[str, Any] = {}
        if self._converted:
            kinds = Counter(entry["kind"] for entry in self._converted)
            images = self._converted[:MAX_LISTED]
            converted["converted"] = {"total": len(self._converted), "kinds": dict(kinds), "images": images}
        if self._read_from is not None:
            more["first_split_read_from"] = self._read_from
        return {
            "name": raw.name,
            "classes": len(raw.classes),
            "observe": {
                "kind": common.observe.kind,
                "positives": common.observe.positives,
                **more,
                "fraction": common.observe.fraction,
                "seed": common.seed,
            },
            "verify": self.level,
            "labels_alone": raw.labels_alone,
            "orientation": common.orientation,
            "settings": raw.settings,
            "coverage": raw.coverage,
            "notes": self._notes,
            "splits": self.splits,
            **converted,
            "left_out": {
                "total": sum(reasons.values()),
                "reasons": dict(reasons.most_common()),
                "images": self._left_out,
            },
        }

    def _write(
        self,
        part: RawSplit,
        observed: SparseLabels | None,
        hides_labels: bool,
        checked: CheckResults,
        rows: npt.NDArray[np.int64],
    ) -> dict[str, Any]:
        """Write one final split, the rows `rows` of the official one, and return its entry in the report."""
        notes, size, exif = self._notes, len(part), checked.orientation[rows]
        annotated_width, annotated_height = (
            np.zeros(size, np.int32) if side is None else np.asarray(side, np.int32)
            for side in (part.width, part.height)
        )
        width, height = checked.width[rows], checked.height[rows]
        opened = width > 0
        applied = exif if self.common.orientation == "exif" else np.ones(size, np.uint8)
        listed = np.zeros(size, np.bool_) if part.orientation is None else part.orientation > 0
        if part.orientation is not None:
            applied = np.where(listed, part.orientation, applied)
        differ = opened & (annotated_width > 0) & ((width != annotated_width) | (height != annotated_height))
        # Tools that read sizes with OpenCV annotate the image as EXIF shows it: on its side, the size tells.
        as_shown = differ & (exif >= 5) & (annotated_width == height) & (annotated_height == width)
        differ &= ~as_shown
        if differ.any():
            notes.append(
                f"{part.name}: another size than the annotation says: {int(differ.sum()):,} images "
                f"(first: {part.relative_path(int(np.argmax(differ)))}); the images' own sizes are kept"
            )
        width, height = np.where(opened, width, annotated_width), np.where(opened, height, annotated_height)
        back = np.where(as_shown, TURNED_BACK[exif], 1).astype(np.uint8)
        frame_width = np.where(annotated_width > 0, annotated_width, width)
        frame_height = np.where(annotated_height > 0, annotated_height, height)
        boxes = _placed_boxes(part, exif, back, applied, frame_width, frame_height)
        if boxes is None and part.boxes is not None:
            notes.append(f"{part.name}: boxes are left out, since the sizes of some images are unknown")
        turned = applied >= 5
        self.writer.add_split(
            part.name,
            known=part.known,
            observed=observed,
            width=np.where(turned, height, width),
            height=np.where(turned, width, height),
            orientation=applied,
            paths=part.paths,
            ids=part.ids,
            template=part.template,
            template_of=part.template_of,
            hides_labels=hides_labels,
            boxes=boxes,
        )
        seen = part.known if observed is None else observed
        return {
            "samples": size,
            "known": count_labels(part.known),
            "observed": count_labels(seen),
            "without_positive": int((part.known.row_counts(POSITIVE) == 0).sum()),
            "classes_without_positive": int((part.known.class_counts(POSITIVE) == 0).sum()),
            "turned_by_exif": int(((applied != 1) & ~listed).sum()),
            "turned_by_list": int(((applied != 1) & listed).sum()),
        }


def _full_path(split: RawSplit, root: Path, rows: npt.NDArray[np.int64]) -> Callable[[int], str]:
    """Number of an image among `rows` -> its full path."""
    return lambda index: os.path.join(root, split.relative_path(int(rows[index])))


def merge_labels(first: SparseLabels, second: SparseLabels) -> SparseLabels:
    """The labels of both, of the same rows; partly annotated, and no (row, class) may be in both."""
    keys = np.empty(len(first.codes) + len(second.codes), np.int64)
    for part, out in ((first, keys[: len(first.codes)]), (second, keys[len(first.codes) :])):
        np.multiply(part.entry_rows(), first.num_classes, out=out)
        out += part.classes
        out <<= 1
        out |= np.asarray(part.codes == POSITIVE)
    # Sorting the values in place needs no memory and a fraction of the time of sorting their positions.
    keys.sort()
    codes = (keys & 1).astype(np.int8)
    keys >>= 1
    classes = (keys % first.num_classes).astype(class_dtype(first.num_classes))
    return SparseLabels(first.indptr + second.indptr, classes, codes, first.num_classes, UNKNOWN)


def count_labels(labels: SparseLabels) -> dict[str, int]:
    """Numbers of positive, negative and unknown (image, class) pairs."""
    counts = {code: int((np.asarray(labels.codes) == code).sum()) for code in (POSITIVE, NEGATIVE)}
    total = len(labels) * labels.num_classes
    if labels.default == NEGATIVE:
        counts[NEGATIVE] += total - len(labels.codes)
    known = counts[POSITIVE] + counts[NEGATIVE]
    return {"positive": counts[POSITIVE], "negative": counts[NEGATIVE], "unknown": total - known}


def _placed_boxes(
    part: RawSplit,
    exif: npt.NDArray[np.uint8],
    back: npt.NDArray[np.uint8],
    applied: npt.NDArray[np.uint8],
    width: npt.NDArray[np.int32],
    height: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
    """A split's boxes as fractions of its images as the loader turns them; None where it has none, or sizes lack."""
    if part.boxes is None:
        return None
    if part.boxes_as_shown:
        return part.boxes[0], turn_fractions(part.boxes, exif, applied)
    if (width > 0).all() and (height > 0).all():
        return part.boxes[0], pixels_to_fractions(part.boxes, width, height, back, applied)
    return None


def _without_positive(manifest: Manifest, split: str, number: int) -> str:
    """Which classes have no positive image."""
    missing = np.flatnonzero(manifest.split(split).known.class_counts(POSITIVE) == 0)
    named = ", ".join(_in_list(manifest.classes[int(i)]) for i in missing[:MAX_NAMED])
    more = f" and {number - MAX_NAMED:,} more" if number > MAX_NAMED else ""
    return f"no positive image for {number:,} of {manifest.num_classes:,} classes: {named}{more}"


def _in_list(name: str) -> str:
    """A class's name among others with commas between them: in quotes where it has one itself."""
    return repr(name) if "," in name else name


def _images_by_class(manifest: Manifest, split: str) -> str:
    """Positive images of every class, of the most and least frequent ones where there are many."""
    counts = manifest.split(split).known.class_counts(POSITIVE)
    order = np.argsort(-counts, kind="stable")
    texts = [f"{_in_list(manifest.classes[int(i)])} {counts[i]:,}" for i in order]
    if len(texts) <= 2 * MAX_NAMED:
        return f"positive images by class ({split}): {', '.join(texts)}"
    half = MAX_NAMED // 2
    return (
        f"positive images by class ({split}): {', '.join(texts[:half])} ... {', '.join(texts[-half:])}; "
        f"median {int(np.median(counts)):,}"
    )


def summary(manifest: Manifest, train_options: Sequence[str] = ()) -> str:
    """What the command prints at its end: counts, what was left out and why, the next command.

    Args:
        manifest: that was prepared.
        train_options: that the next command has besides --data.dir.
    """
    report = cast(dict[str, Any], json.loads((manifest.folder / "report.json").read_text(encoding="utf-8")))
    lines = [f"{report['name']}: {report['classes']:,} {'class' if report['classes'] == 1 else 'classes'}"]
    header = ("split", "samples", "known +", "known -", "unknown", "observed +", "observed -", "unknown")
    rows = [header]
    for name, split in report["splits"].items():
        counts = [split[kind][code] for kind in ("known", "observed") for code in ("positive", "negative", "unknown")]
        rows.append((name, *(f"{value:,}" for value in (split["samples"], *counts))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    for name, split in report["splits"].items():
        if split["without_positive"]:
            lines.append(f"{name}: no positive label for {split['without_positive']:,} of {split['samples']:,} images")
        if split["classes_without_positive"]:
            lines.append(f"{name}: {_without_positive(manifest, name, split['classes_without_positive'])}")
        if split["turned_by_exif"]:
            lines.append(f"{name}: turned as their EXIF data say: {split['turned_by_exif']:,} images")
        if split["turned_by_list"]:
            lines.append(f"{name}: turned as the image lists say: {split['turned_by_list']:,} images")
    lines.append(_images_by_class(manifest, next(iter(report["splits"]))))
    lines += report["notes"]
    left_out = report["left_out"]
    if "converted" in report:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["converted"]["kinds"].items())
        lines.append(f"converted into JPEG or PNG copies: {kinds} (each is named in {manifest.folder / 'report.json'})")
    if left_out["total"]:
        lines.append(f"left out: {left_out['total']:,} images (each is named in {manifest.folder / 'report.json'})")
        lines += [f"  {count:,}  {reason}" for reason, count in left_out["reasons"].items()]
        convertible = sum(count for reason, count in left_out["reasons"].items() if convert.can_convert(reason))
        if convertible:
            lines.append(f"  --convert makes JPEG or PNG copies of {convertible:,} of them, and uses those")
    elif report["verify"] == "none":
        lines.append("no image was checked (--verify none)")
    else:
        how = "decoded" if report["verify"] == "decode" else "headers read"
        lines.append(f"0 images left out (all were checked: {how})")
    lines.append(f"Manifest: {manifest.folder}")
    words = [*train_options, "--data.dir", manifest.folder]
    if report["labels_alone"]:
        words += ["--data.image_root", "FOLDER_OF_THE_IMAGES"]
    lines.append(next_lines([command_line("train", *words)]))
    return "\n".join(lines)
