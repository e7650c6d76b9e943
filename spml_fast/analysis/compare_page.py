"""A page that compares runs: a row for each class of each image, a column for each run's map of it.

The first run is what the others are compared with, such as one trained with full labels: Spearman's rank correlation of
each map with its map stands below. All maps have one colour scale, so that weaker evidence is paler. A run can have a
column more with the boost in the map (phi(m) = alpha m for m > 0), and two more that show how IGNORE sees the image:
where the map of the class is high, the mask, and what is left of the image with its logit.

Source: docs/sources.md#boostlu (rank correlation, boosted maps), docs/sources.md#ignore (the masked image).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.analysis.diagnostics import rank_correlation
from spml_fast.analysis.explain import Explained
from spml_fast.analysis.explain_page import (
    CAPTION,
    GAP,
    HEADER,
    LINE,
    MARGIN,
    PANEL,
    Page,
    colour_scale,
    displayable_names,
    draw_header,
    image_caption,
    overlay,
)
from spml_fast.analysis.suggest import NAMES
from spml_fast.core.io import printable

# What is masked: the mean of the channels, about.
_GREY = np.uint8(127)


@dataclass(frozen=True)
class Column:
    """One run's maps.

    Attributes:
        title: what the run is called.
        alpha: BoostLU's factor of its probabilities.
        images: with the same classes in the same order in every column; those with `kept` are drawn masked too.
        boosted: draw the maps with the boost as well.
    """

    title: str
    alpha: float
    images: Sequence[Explained]
    boosted: bool = False


@dataclass(frozen=True)
class Panel:
    """An image and the lines below it; of a map its rank correlation is added."""

    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float64]
    lines: list[str]


def boosted_map(cells: npt.NDArray[np.float32], alpha: float) -> npt.NDArray[np.float32]:
    """BoostLU's phi of a map: its positive cells times alpha, whose mean is the boosted logit."""
    return np.where(cells > 0, np.float32(alpha) * cells, cells)


def correlation_text(cells: npt.NDArray[np.float32], other: npt.NDArray[np.float32], title: str) -> str:
    """The line about the rank correlation [h, w] of two maps."""
    if cells.shape != other.shape:
        return f"a map of another size than {title}'s"
    value = float(rank_correlation(cells[None], other[None])[0])
    return f"rank correlation {value:.2f} with {title}" if np.isfinite(value) else "a flat map"


def row_panels(columns: Sequence[Column], place: int, k: int, scale: float, positive_only: bool) -> list[Panel]:
    """The panels right of the image: maps of one class in every column.

    Args:
        columns: at least one.
        place: of the image.
        k: of the class among the image's.
        scale: end of the colour scale.
        positive_only: draw what speaks for the class alone.
    """
    first = columns[0].images[place].maps[k]
    panels = []
    for number, column in enumerate(columns):
        image = column.images[place]
        cells = image.maps[k]
        logit = f"logit {image.plain[k]:.2f}"
        if column.alpha != 1:
            logit += f", at alpha {column.alpha:g} {image.logit[k]:.2f}"
        lines = [column.title, f"probability {image.probability[k]:.3f}", logit]
        if number:
            lines.append(correlation_text(cells, first, columns[0].title))
        panels.append(Panel(overlay(image.image, cells, scale, positive_only), lines))
        if column.boosted:
            large = overlay(image.image, boosted_map(cells, column.alpha), scale, positive_only)
            panels.append(Panel(large, [f"{column.title}, BoostLU x{column.alpha:g}", "", lines[2]]))
        if image.kept is not None and image.masked_logit is not None:
            kept = image.kept[k][..., None]
            white = np.where(kept, np.uint8(255), np.zeros_like(image.image))
            panels.append(Panel(white, [f"{column.title}, mask", f"{100 * kept.mean():.0f}% of the image kept"]))
            change = f"logit {image.logit[k]:.2f}, masked {image.masked_logit[k]:.2f}"
            panels.append(Panel(np.where(kept, image.image, _GREY), [f"{column.title}, masked image", "", change]))
    return panels


def draw_comparison(
    out: Path,
    columns: Sequence[Column],
    images: Sequence[Explained],
    classes: Sequence[str],
    title: str,
    positive_only: bool = False,
    signed: bool = True,
) -> int:
    """Draw the page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        columns: at least one, with the same images.
        images: those of the column whose labels and predictions stand below them.
        classes: class names in class-id order.
        title: first line of the page.
        positive_only: draw what speaks for a class alone.
        signed: whether maps say what speaks against a class.

    Returns:
        How many class names no font of this machine can show; they stand as "class ID".

    Raises:
        UserError: the file cannot be written.
    """
    ids = {int(c) for p in images for group in (p.classes, p.predicted, *(p.labels or ())) for c in group}
    names, families, undrawable = displayable_names(classes, ids)
    scale = colour_scale([image for column in columns for image in column.images])
    rows = [(place, k) for place, image in enumerate(images) for k in range(len(image.classes))]
    across = 1 + len(row_panels(columns, 0, 0, scale, positive_only))
    height = PANEL + CAPTION + GAP
    page = Page(2 * MARGIN + across * (PANEL + GAP) - GAP, 2 * MARGIN + HEADER + len(rows) * height, families)
    draw_header(page, printable(title), scale, signed, False)
    with warnings.catch_warnings():
        # A path may have characters that no font has; boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for number, (place, k) in enumerate(rows):
            image = images[place]
            label = "" if image.known is None else f", label {NAMES[int(image.known[k])]}"
            if image.labels is not None and int(image.classes[k]) in image.labels[1]:
                label += " (hidden in training)"
            captions = [f"{names[int(image.classes[k])]}{label}", *image_caption(image, names)[:3]]
            panels = [Panel(image.image, captions), *row_panels(columns, place, k, scale, positive_only)]
            for at, panel in enumerate(panels):
                x, y = MARGIN + at * (PANEL + GAP), MARGIN + HEADER + number * height
                page.image(x, y, panel.pixels, image.aspect, None)
                for line, text in enumerate(panel.lines):
                    weight = "normal" if line else "bold"
                    page.text(x, y + PANEL + 0.05 + line * LINE, text, PANEL, fontweight=weight)
        page.save(out)
    return undrawable
