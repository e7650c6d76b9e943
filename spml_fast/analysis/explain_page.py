"""Sheets of images with the maps of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spml_fast.analysis.explain import Explained, Kind
from spml_fast.analysis.explain_colours import colour_scales, overlay, scale_strip
from spml_fast.analysis.explain_layout import (
    CONTRADICTED,
    Block,
    ColourBar,
    Line,
    Panel,
    displayable_names,
    draw_page,
)
from spml_fast.analysis.localisation import peaks
from spml_fast.analysis.suggest import NAMES
from spml_fast.core.io import printable

_MEANINGS: dict[Kind, str] = {
    "evidence": "evidence: red is for the class, blue against it, and the mean of all cells is the logit",
    "attention": "attention: where the query of the class looks, mean over heads, 1 in sum; not evidence",
    "map": "the head's own map: red is above 0, blue below; its mean is not the logit",
}


def colour_bars(scales: dict[Kind, float], positive_only: bool) -> list[ColourBar]:
    """A colour scale for each kind of map.

    Args:
        scales: kind -> end of its scale.
        positive_only: evidence from 0 on.
    """
    bars = []
    for kind, end in scales.items():
        colours, low = scale_strip(kind, positive_only)
        ticks = [(0.0, "0"), (1.0, f"{end:.2g}")]
        if low < 0:
            ticks = [(0.0, f"\u2212{end:.2g}"), (0.5, "0"), (1.0, f"+{end:.2g}")]
        meaning = _MEANINGS[kind]
        if positive_only and kind == "evidence":
            meaning = "evidence for the class alone; what is against it is left out"
        bars.append(ColourBar(colours, ticks, meaning))
    return bars


def page_notes(images: Sequence[Explained]) -> list[Line]:
    """What shared maps, frames, boxes and crosses of these images mean."""
    notes = []
    shared = max((image.classes_per_query for image in images), default=1)
    if shared > 1:
        notes.append(Line(f"{shared} classes share a query and so one map of attention; their logits tell them apart"))
    if any(image.boxes is not None for image in images):
        notes.append(Line("white box: an object of the class; cross: the peak of the map, inside a box or outside"))
    if any(image.known is not None for image in images):
        notes.append(Line("thick orange frame: the prediction contradicts the label", bold=True))
    return notes


def class_names(images: Sequence[Explained], classes: Sequence[str]) -> tuple[dict[int, str], list[str], int]:
    """`displayable_names` of all classes that stand on a page."""
    ids = {int(c) for p in images for group in (p.classes, p.predicted, *(p.labels or ())) for c in group}
    return displayable_names(classes, ids)


def image_lines(image: Explained, names: dict[int, str]) -> list[Line]:
    """The lines below an image. The end of a path tells more than its beginning."""
    lines = [Line(printable(image.path), 0.0)]
    if image.reason:
        lines.append(Line(printable(image.reason)))
    if image.labels is not None:
        seen, hidden = ([names[c] for c in ids] for ids in image.labels)
        text = "positive: " + (", ".join(seen) or "none")
        lines.append(Line(text + (f"; hidden: {', '.join(hidden)}" if hidden else ""), 1.0))
    lines.append(Line("predicted: " + (", ".join(names[c] for c in image.predicted) or "none"), 1.0))
    return lines


def logit_text(image: Explained, place: int, alpha: float) -> str:
    """A class's logit, and with BoostLU's factor."""
    plain = f"logit {image.plain[place]:.2f}"
    return plain if alpha == 1 else f"{plain}, at alpha {alpha:g}: {image.logit[place]:.2f}"


def map_panel(image: Explained, place: int, lines: Sequence[Line], end: float, positive_only: bool) -> Panel:
    """A map with the boxes of its class and its peak, where boxes are known.

    Args:
        image: with its maps.
        place: of the class among the image's.
        lines: below it.
        end: of the colour scale.
        positive_only: leave out what speaks against the class.
    """
    cells = image.shown[place]
    hit = image.hit(place)
    where = "" if hit is None else " inside" if hit else " outside"
    text = f"peak {cells.max():.2g}{where}"
    if image.kind == "evidence":
        text = f"{100 * image.positive_fraction[place]:.0f}% positive cells{where and f', peak{where}'}"
    elif image.kind == "attention":
        text = f"attention, {text}"
    return Panel(
        overlay(image.image, cells, end, positive_only, image.kind),
        [*lines, Line(text)],
        CONTRADICTED if image.wrong(place) else None,
        None if image.boxes is None else image.boxes[place],
        None if hit is None else peaks(cells[None])[0],
    )


def boxed_image(image: Explained, places: Sequence[int], lines: Sequence[Line]) -> Panel:
    """The image with the boxes of some of its classes."""
    boxes = None if image.boxes is None else np.concatenate([image.boxes[k] for k in places])
    return Panel(image.image, lines, boxes=boxes)


def image_block(
    image: Explained, names: dict[int, str], alpha: float, scales: dict[Kind, float], positive_only: bool
) -> Block:
    """An image and the maps of its classes.

    Args:
        image: with its maps.
        names: of the classes.
        alpha: of the probabilities.
        scales: kind -> end of its colour scale.
        positive_only: leave out what speaks against a class.
    """
    panels = [Panel(image.image, image_lines(image, names))]
    for k, class_id in enumerate(image.classes.tolist()):
        label = "" if image.known is None else f", label {NAMES[int(image.known[k])]}"
        lines = [
            Line(names[class_id], bold=True),
            Line(f"probability {image.probability[k]:.3f}{label}"),
            Line(logit_text(image, k, alpha)),
        ]
        panels.append(map_panel(image, k, lines, scales[image.kind], positive_only))
    return Block(image.aspect, panels)


def draw(
    out: Path,
    images: Sequence[Explained],
    classes: Sequence[str],
    title: str,
    alpha: float,
    positive_only: bool = False,
) -> int:
    """Draw images with their maps on one page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        images: at least one, with the same number of maps each.
        classes: class names in class-id order; drawn literally, without mathematical notation.
        title: first line of the page.
        alpha: of the probabilities.
        positive_only: draw what speaks for a class alone.

    Returns:
        How many class names no font of this machine can show; they stand as "class ID".

    Raises:
        UserError: the file cannot be written.
    """
    names, families, undrawable = class_names(images, classes)
    scales = colour_scales(images)
    blocks = [image_block(image, names, alpha, scales, positive_only) for image in images]
    draw_page(out, title, colour_bars(scales, positive_only), page_notes(images), blocks, families)
    return undrawable
