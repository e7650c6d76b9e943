"""A page that compares runs: a row for each class of each image, a column for each run's map of it.

The first run is what the others are compared with, such as one trained with full labels: Spearman's rank correlation of
each map with its map stands below. Maps of one kind have one colour scale, so that weaker evidence is paler; attention
has its own. A run can have a column more with the boost in the map (phi(m) = alpha m for m > 0), and a run of IGNORE
has two more that show how it sees the image: where the map of the class is high, the mask, and what is left of the
image with its logit.

Source: docs/sources.md#boostlu (rank correlation, boosted maps), docs/sources.md#ignore (the masked image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.analysis.diagnostics import rank_correlation
from spml_fast.analysis.explain import Explained, Kind, MaskedView
from spml_fast.analysis.explain_colours import colour_scales, overlay
from spml_fast.analysis.explain_layout import Block, Line, Panel, draw_page
from spml_fast.analysis.explain_page import (
    boxed_image,
    class_names,
    colour_bars,
    image_lines,
    logit_text,
    map_panel,
    page_notes,
)
from spml_fast.analysis.suggest import NAMES

# What is masked: the mean of the channels, about.
_GREY = np.uint8(127)


@dataclass(frozen=True)
class Column:
    """One run's maps.

    Attributes:
        title: what the run is called, the same wherever it is named.
        about: its method and alphas.
        alpha: BoostLU's factor of its probabilities.
        images: with the same classes in the same order in every column; those with `kept` are drawn masked too.
        boosted: draw the maps with the boost as well.
        mask: how a run of IGNORE masks images in training; None for other methods.
        mask_alpha: BoostLU's factor of the logits that are compared with those of the masked image: that of training.
    """

    title: str
    about: str
    alpha: float
    images: Sequence[Explained]
    boosted: bool = False
    mask: MaskedView | None = None
    mask_alpha: float = 1.0


def boosted_map(cells: npt.NDArray[np.float32], alpha: float) -> npt.NDArray[np.float32]:
    """BoostLU's phi of a map: its positive cells times alpha, whose mean is the boosted logit."""
    return np.where(cells > 0, np.float32(alpha) * cells, cells)


def correlation_text(image: Explained, first: Explained, k: int, title: str) -> str:
    """The line about the rank correlation of an image's map with another run's.

    Args:
        image: of this run.
        first: of the other.
        k: place of the class among the image's.
        title: of the other run.
    """
    cells, other = image.shown[k], first.shown[k]
    if image.kind != first.kind:
        return f"another kind of map than {title}'s"
    if cells.shape != other.shape:
        return f"a map of another size than {title}'s"
    value = float(rank_correlation(cells[None], other[None])[0])
    return f"rank correlation {value:.2f} with {title}" if np.isfinite(value) else "a flat map"


def mask_panels(column: Column, image: Explained, k: int) -> list[Panel]:
    """IGNORE's mask of an image by the map of a class, and the masked image; none for other methods."""
    if image.kept is None or image.masked_logit is None or image.full_logit is None or column.mask is None:
        return []
    kept = image.kept[k][..., None]
    white = np.where(kept, np.uint8(255), np.zeros_like(image.image))
    options = column.mask.options
    about = [
        Line(f"{column.title}: mask", bold=True),
        Line(f"map above {options.threshold:g}: {100 * kept.mean():.0f}% kept"),
        Line("each map scaled to 0..1 by itself" + ("" if options.norm == "per_image" else ",")),
    ]
    if options.norm != "per_image":
        about.append(Line("in training together with its batch"))
    if image.kind == "attention":
        about.append(Line("this map: attention x mean feature"))
    full, masked = float(image.full_logit[k]), float(image.masked_logit[k])
    at = "" if column.mask_alpha == column.alpha else f", at alpha {column.mask_alpha:g} of training"
    change = [
        Line(f"{column.title}: masked image", bold=True),
        Line(f"logit {full:.2f}, masked {masked:.2f}"),
        Line(f"gap {abs(full - masked):.2f}{at}"),
    ]
    return [Panel(white, about), Panel(np.where(kept, image.image, _GREY), change)]


def row_panels(
    columns: Sequence[Column], place: int, k: int, scales: dict[Kind, float], positive_only: bool
) -> list[Panel]:
    """The panels right of the image: maps of one class in every column.

    Args:
        columns: at least one.
        place: of the image.
        k: of the class among the image's.
        scales: kind -> end of its colour scale.
        positive_only: draw what speaks for the class alone.
    """
    first = columns[0].images[place]
    panels = []
    for number, column in enumerate(columns):
        image = column.images[place]
        end, logit = scales[image.kind], logit_text(image, k, column.alpha)
        lines = [
            Line(column.title, bold=True),
            Line(column.about),
            Line(f"probability {image.probability[k]:.3f}"),
            Line(logit),
        ]
        if number:
            lines.append(Line(correlation_text(image, first, k, columns[0].title)))
        panels.append(map_panel(image, k, lines, end, positive_only))
        if column.boosted and image.kind == "evidence":
            large = overlay(image.image, boosted_map(image.maps[k], column.alpha), end, positive_only)
            title = Line(f"{column.title}: boosted map", bold=True)
            panels.append(Panel(large, [title, Line(f"positive cells times {column.alpha:g}"), Line(logit)]))
        panels += mask_panels(column, image, k)
    return panels


def draw_comparison(
    out: Path,
    columns: Sequence[Column],
    images: Sequence[Explained],
    classes: Sequence[str],
    title: str,
    positive_only: bool = False,
) -> int:
    """Draw the page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        columns: at least one, with the same images.
        images: those of the column whose labels and predictions stand below them.
        classes: class names in class-id order.
        title: first line of the page.
        positive_only: draw what speaks for a class alone.

    Returns:
        How many class names no font of this machine can show; they stand as "class ID".

    Raises:
        UserError: the file cannot be written.
    """
    names, families, undrawable = class_names(images, classes)
    every = [image for column in columns for image in column.images]
    scales = colour_scales(every)
    blocks = []
    for place, image in enumerate(images):
        for k, class_id in enumerate(image.classes.tolist()):
            lines = [Line(names[class_id], bold=True)]
            if image.known is not None:
                hidden = image.labels is not None and class_id in image.labels[1]
                lines.append(Line(f"label {NAMES[int(image.known[k])]}{', hidden in training' if hidden else ''}"))
            lines += image_lines(image, names)
            panels = row_panels(columns, place, k, scales, positive_only)
            blocks.append(Block(image.aspect, [boxed_image(image, [k], lines), *panels]))
    draw_page(out, title, colour_bars(scales, positive_only), page_notes([*images, *every]), blocks, families)
    return undrawable
