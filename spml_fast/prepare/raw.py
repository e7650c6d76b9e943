"""What a data set reads: raw splits before labels are drawn and images checked or dropped; and the common options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spml_fast.core.config import MAX_PIXELS
from spml_fast.data.image_check import Level
from spml_fast.data.sparse_labels import SparseLabels
from spml_fast.prepare.label_encodings import ImportFormat
from spml_fast.prepare.observed_labels import PUBLISHED_SEED, ObservationScheme

Orientation = Literal["exif", "ignore"]


@dataclass
class RawSplit:
    """One official split as a data set reads it; rows in official order, before any is dropped.

    Attributes:
        name: train, val, test, or any other name.
        known: all annotated labels, N rows.
        paths: N paths relative to the data set's image root (or absolute); or None with `ids` and `template`.
        ids: numeric ids, N.
        template: path from an id, such as `{split}/{id:016x}.jpg`; or several of them, with `template_of`.
        template_of: number of each image's template, N.
        present: bool [N], False for annotated images without a file; None when that is not known yet. Labels are
            drawn for all rows, so that those of an image do not depend on which others exist.
        extra: labels of the same rows that training sees besides the observed ones, and that are not part of the truth;
            they name no (image, class) that `known` does.
        observed: the labels that training sees, where the data set's own files say which; else they are drawn.
        orientation: annotated EXIF orientation 1..8, uint8 [N], 0 where unknown; it is applied whatever the images'
            own EXIF data say.
        width: annotated stored widths in pixels, int [N], 0 where unknown; None when the annotations have none.
        height: annotated stored heights.
        boxes: (indptr int64 [N + 1], float [K, 5] of class, x0, y0, x1, y1 in pixels of the stored image; of the one
            that EXIF shows, where `width` and `height` are that one's).
        boxes_as_shown: boxes are fractions, 0 to 1, of the image turned as its EXIF data say, which is what annotation
            tools show.
    """

    name: str
    known: SparseLabels
    paths: Sequence[str] | None = None
    ids: npt.NDArray[np.integer] | None = None
    template: str | Sequence[str] | None = None
    template_of: npt.NDArray[np.integer] | None = None
    present: npt.NDArray[np.bool_] | None = None
    extra: SparseLabels | None = None
    observed: SparseLabels | None = None
    orientation: npt.NDArray[np.uint8] | None = None
    width: npt.NDArray[np.integer] | None = None
    height: npt.NDArray[np.integer] | None = None
    boxes: tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]] | None = None
    boxes_as_shown: bool = False

    def __post_init__(self) -> None:
        if (self.paths is None) == (self.ids is None or self.template is None):
            raise ValueError("give either paths, or ids with a template")

    def __len__(self) -> int:
        return len(self.known)

    def relative_path(self, index: int) -> str:
        """Path of row `index` relative to the image root."""
        if self.paths is not None:
            return self.paths[index]
        assert self.ids is not None and self.template is not None
        if isinstance(self.template, str):
            template = self.template
        else:
            template = self.template[0 if self.template_of is None else int(self.template_of[index])]
        return template.format(id=int(self.ids[index]), split=self.name)

    def select(self, index: npt.NDArray[np.int64], name: str | None = None) -> RawSplit:
        """The rows `index`, in that order, under another name if one is given."""
        # The official split's name stays in the images' paths.
        if isinstance(self.template, str):
            template: str | Sequence[str] | None = self.template.replace("{split}", self.name)
        else:
            template = self.template and [t.replace("{split}", self.name) for t in self.template]
        if len(index) == len(self) and (np.diff(index) == 1).all():
            return replace(self, name=name or self.name, template=template)
        boxes = None
        if self.boxes is not None:
            indptr, values = self.boxes
            counts = np.diff(indptr)[index]
            new_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            boxes = new_indptr, values[np.repeat(indptr[index] - new_indptr[:-1], counts) + np.arange(new_indptr[-1])]
        return replace(
            self,
            name=name or self.name,
            known=self.known.select(index),
            paths=None if self.paths is None else [self.paths[i] for i in index],
            ids=None if self.ids is None else self.ids[index],
            template=template,
            template_of=None if self.template_of is None else self.template_of[index],
            present=None if self.present is None else self.present[index],
            extra=None if self.extra is None else self.extra.select(index),
            observed=None if self.observed is None else self.observed.select(index),
            orientation=None if self.orientation is None else self.orientation[index],
            width=None if self.width is None else self.width[index],
            height=None if self.height is None else self.height[index],
            boxes=boxes,
        )


@dataclass
class RawDataset:
    """What a data set gives to `build`.

    Attributes:
        name: name of the data set.
        classes: class names in class-id order.
        image_root: folder that paths are relative to; None when `make_images` makes them inside the Manifest, or with
            `labels_alone`.
        splits: the official splits.
        carve: (from, to): cut the published fifth off split `from` as the new split `to`; None for no cut.
        notes: sentences for the summary, such as how unlisted classes were read.
        settings: options that the content depends on, kept in report.json.
        make_images: called with an empty folder; writes the images there.
        labels_alone: there are no images (yet).
        coverage: which annotated images exist, kept in report.json.
    """

    name: str
    classes: Sequence[str]
    image_root: Path | None
    splits: list[RawSplit]
    carve: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    make_images: Callable[[Path], None] | None = None
    labels_alone: bool = False
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass
class CommonOptions:
    """Options of every data set.

    Attributes:
        out: Manifest directory to write.
        observe: how observed labels are drawn.
        seed: seed of that draw; 1200 is the published one.
        verify: how closely images are checked; None decides by their number.
        orientation: whether the loader turns images as their EXIF data say.
        overwrite: replace an older Manifest.
        max_pixels: width x height of the largest image that is accepted.
        workers: processes that check images; None for all cores.
        observed: an array of the first split's observed labels, and its format, in place of a draw.
        convert: copy images that the loader does not read into the Manifest, as JPEG or PNG.
        progress: show progress.
    """

    out: Path
    observe: ObservationScheme
    seed: int = PUBLISHED_SEED
    verify: Level | None = None
    orientation: Orientation = "ignore"
    overwrite: bool = False
    max_pixels: int = MAX_PIXELS
    workers: int | None = None
    observed: tuple[Path, ImportFormat] | None = None
    convert: bool = False
    progress: bool = True
