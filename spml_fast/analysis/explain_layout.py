"""Pages of panels: an image or a map each, with lines of text below. Nothing here knows what the panels show.

Panels of an image stand in a row, a block. All panels have one width and the height that the image's aspect ratio gives
them, so that landscape and portrait images fill them alike. Blocks stand in as many columns as make the page about
4 : 3, each in the column that is shortest so far.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, printable
from spml_fast.core.outputs import writer_name

# Inches.
PANEL, GAP, LINE, MARGIN = 1.9, 0.12, 0.135, 0.2
_BLOCK_GAP, _ROW_GAP, _CAPTION_GAP, _WIDEST = 0.3, 0.16, 0.05, 26.0

# Of panels: a taller image is narrower.
_TALLEST = 2 * PANEL

DPI = 110

# Of frames, and of the words about them, which would be too pale on white.
CONTRADICTED, CONTRADICTED_TEXT = "#e08a00", "#9a5b00"


def _fonts(text: str) -> tuple[list[str], set[str]]:
    """Font families that together have the characters of `text`, and the characters that none of them has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    families = ["DejaVu Sans"]
    # It comes with matplotlib.
    default = FT2Font(font_manager.findfont(families[0]))
    missing = {c for c in set(text) if not default.get_char_index(ord(c))}
    for entry in font_manager.fontManager.ttflist if missing else ():
        if "lastresort" in entry.name.lower().replace(" ", ""):
            # Its glyphs are boxes.
            continue
        try:
            font = FT2Font(entry.fname)
            available = {c for c in missing if font.get_char_index(ord(c))}
        except (OSError, RuntimeError):
            # A font file that is gone or damaged has no glyphs to offer.
            continue
        if available:
            families.append(entry.name)
            missing -= available
        if not missing:
            break
    return families, missing


def displayable_names(classes: Sequence[str], ids: set[int]) -> tuple[dict[int, str], list[str], int]:
    """Class names as the fonts of this machine can draw them.

    Returns:
        id -> name, or "class ID" where no font has its characters; the font families; how many names cannot be drawn.
    """
    # Composed, as fonts have more of such characters.
    names = {i: printable(unicodedata.normalize("NFC", classes[i])) for i in sorted(ids)}
    families, missing = _fonts("".join(names.values()))
    undrawable = {i for i, name in names.items() if missing & set(name)}
    return {i: f"class {i}" if i in undrawable else name for i, name in names.items()}, families, len(undrawable)


@dataclass(frozen=True)
class Line:
    """A line of text below a panel.

    Attributes:
        text: cut to the width of the panel.
        keep: fraction of what is kept of a line that is too long that comes from its beginning.
        bold: whether it is a title.
    """

    text: str
    keep: float = 0.7
    bold: bool = False


@dataclass(frozen=True)
class Panel:
    """An image and the lines below it.

    Attributes:
        pixels: [S, S, 3], uint8 or float in 0..1.
        lines: of text.
        frame: colour of a thick frame, or None for a thin grey one.
        boxes: [n, 4] to draw, x0, y0, x1, y1 as fractions of the image; or None.
        peak: (x, y) to mark, as fractions; or None.
    """

    pixels: npt.NDArray[Any]
    lines: Sequence[Line]
    frame: str | None = None
    boxes: npt.NDArray[np.floating] | None = None
    peak: npt.NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Block:
    """Panels of one image, in a row.

    Attributes:
        aspect: width / height of the image.
        panels: from left to right.
    """

    aspect: float
    panels: Sequence[Panel]


@dataclass(frozen=True)
class ColourBar:
    """A colour scale of the header.

    Attributes:
        colours: float64 [1, n, 3] in 0..1.
        ticks: (place in 0..1, text) of each.
        meaning: what stands beside it.
    """

    colours: npt.NDArray[np.float64]
    ticks: Sequence[tuple[float, str]]
    meaning: str


def panel_size(aspect: float) -> tuple[float, float]:
    """Width and height of a panel in inches, for an image of that width / height."""
    height = min(PANEL / aspect, _TALLEST)
    return min(PANEL, height * aspect), height


def block_size(block: Block) -> tuple[float, float]:
    """Width and height of a block in inches, with its captions."""
    lines = max((len(panel.lines) for panel in block.panels), default=0)
    width = len(block.panels) * (PANEL + GAP) - GAP
    return width, panel_size(block.aspect)[1] + _CAPTION_GAP + lines * LINE


def columns_of(heights: Sequence[float], count: int) -> tuple[list[tuple[int, float]], float]:
    """Blocks in `count` columns: (column, inches below the top) of each, and the height of the longest column."""
    ends = [0.0] * count
    places = []
    for height in heights:
        column = min(range(count), key=ends.__getitem__)
        places.append((column, ends[column]))
        ends[column] += height + _ROW_GAP
    return places, max(ends) - _ROW_GAP if heights else 0.0


def across(width: float, heights: Sequence[float]) -> int:
    """How many columns of blocks make the page nearest 4 : 3 and at most 26 inches wide.

    Args:
        width: of a block, inches.
        heights: of the blocks.
    """
    step = width + _BLOCK_GAP
    usable = [n for n in range(1, len(heights) + 1) if n == 1 or n * step <= _WIDEST]
    return min(usable, key=lambda n: abs(math.log(n * step / columns_of(heights, n)[1] / (4 / 3))), default=1)


class Page:
    """A figure on which text is put in inches from the upper left corner, cut to the width that it has."""

    def __init__(self, width: float, height: float, families: list[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.families = width, height, families
        self.figure = Figure(figsize=(width, height), dpi=DPI)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text(
        self, x: float, y: float, text: str, room: float, size: float = 7.5, keep: float = 0.7, **style: Any
    ) -> None:
        """A line of text with its top left corner at (x, y).

        Args:
            x: inches from the left edge.
            y: inches from the upper edge.
            text: the line.
            room: width that it may take, inches; a longer line is cut and an ellipsis stands for the rest.
            size: of the font, points.
            keep: fraction of what is kept that comes from the beginning.
            **style: of matplotlib's `Text`.
        """
        artist = self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            fontfamily=self.families,
            va="top",
            parse_math=False,
            **style,
        )
        kept = len(text)
        while kept > 1 and (wide := artist.get_window_extent(self._renderer).width / DPI) > room:
            kept = min(kept - 1, int(kept * room / wide))
            head = int(kept * keep)
            artist.set_text(text[:head] + "\u2026" + text[len(text) - max(0, kept - head - 1) :])

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def panel(self, x: float, y: float, panel: Panel, aspect: float) -> None:
        """A panel in the aspect ratio of its image, and its lines.

        Args:
            x: inches from the left edge of the page.
            y: inches from its upper edge.
            panel: what to draw.
            aspect: width / height of the image.
        """
        from matplotlib import patheffects
        from matplotlib.patches import Rectangle

        width, height = panel_size(aspect)
        axes = self._axes(x, y, width, height)
        axes.imshow(panel.pixels, aspect="auto", interpolation="bilinear", extent=(0, 1, 1, 0))
        axes.set_xlim(0, 1)
        axes.set_ylim(1, 0)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=panel.frame or "#999999", linewidth=3 if panel.frame else 0.6)
        # White on black, so that lines show over any image.
        edge = [patheffects.withStroke(linewidth=2.6, foreground="black")]
        for x0, y0, x1, y1 in () if panel.boxes is None else panel.boxes.tolist():
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="white", lw=1.2, path_effects=edge))
        if panel.peak is not None:
            axes.plot(*panel.peak, "+", color="white", markersize=7, markeredgewidth=1.2, path_effects=edge)
        for row, line in enumerate(panel.lines):
            weight = "bold" if line.bold else "normal"
            top = y + height + _CAPTION_GAP + row * LINE
            self.text(x, top, line.text, PANEL, keep=line.keep, fontweight=weight)

    def bar(self, x: float, y: float, bar: ColourBar) -> None:
        """A colour scale at (x, y) and what it means."""
        axes = self._axes(x + 0.15, y + 0.04, 1.3, 0.12)
        axes.imshow(bar.colours, aspect="auto", extent=(0, 1, 0, 1))
        axes.set_yticks([])
        axes.set_xticks([place for place, _ in bar.ticks], [text for _, text in bar.ticks], fontsize=7)
        axes.tick_params(length=2, pad=1)
        self.text(x + 1.75, y + 0.02, bar.meaning, self.width - x - MARGIN - 1.75)

    def save(self, out: Path) -> None:
        """Write the page as a PNG file, whole or not at all. Raises `UserError`."""
        try:
            with atomic_write(out) as partial:
                self.figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": writer_name("explain")})
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error


def draw_page(
    out: Path,
    title: str,
    bars: Sequence[ColourBar],
    notes: Sequence[Line],
    blocks: Sequence[Block],
    families: list[str],
) -> None:
    """Draw blocks on one page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        title: first line.
        bars: colour scales below it.
        notes: lines below these; bold ones in the colour of thick frames.
        blocks: with the same number of panels, at least one.
        families: of fonts.

    Raises:
        UserError: the file cannot be written.
    """
    sizes = [block_size(block) for block in blocks]
    width, heights = sizes[0][0], [height for _, height in sizes]
    count = across(width, heights)
    places, height = columns_of(heights, count)
    header = 0.26 + 0.36 * len(bars) + LINE * len(notes) + 0.12
    page = Page(
        max(6.5, 2 * MARGIN + count * (width + _BLOCK_GAP) - _BLOCK_GAP), 2 * MARGIN + header + height, families
    )
    with warnings.catch_warnings():
        # A path may have characters that no font has; boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        page.text(MARGIN, MARGIN, printable(title), page.width - 2 * MARGIN, 10, fontweight="bold")
        for row, bar in enumerate(bars):
            page.bar(MARGIN, MARGIN + 0.26 + 0.36 * row, bar)
        for row, note in enumerate(notes):
            colour = CONTRADICTED_TEXT if note.bold else "black"
            top = MARGIN + 0.26 + 0.36 * len(bars) + LINE * row
            page.text(MARGIN, top, note.text, page.width - 2 * MARGIN, keep=note.keep, color=colour)
        for block, (column, top) in zip(blocks, places, strict=True):
            for k, panel in enumerate(block.panels):
                x = MARGIN + column * (width + _BLOCK_GAP) + k * (PANEL + GAP)
                page.panel(x, MARGIN + header + top, panel, block.aspect)
        page.save(out)
