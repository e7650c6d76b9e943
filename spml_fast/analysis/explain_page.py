"""Sheets of images with their maps."""

from __future__ import annotations

import math
import shutil
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from spml_fast.analysis.explain import Explained
from spml_fast.analysis.suggest import NAMES
from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, move_into_place, partial_path, printable, write_json
from spml_fast.core.outputs import writer_name


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


# Inches.
PANEL, GAP, CAPTION, _BLOCK_GAP, MARGIN, HEADER = 1.9, 0.12, 0.62, 0.3, 0.2, 0.72

# Red and blue that colour-blind people can tell from each other.
_FOR, _AGAINST = np.array([0.78, 0.05, 0.13]), np.array([0.05, 0.28, 0.75])

# How much of a pixel the map covers where it is strongest, and how much of the image's own colour stays.
_OPACITY, _COLOURED = 0.75, 0.3

LINE = 0.135

_DPI = 110

_CONTRADICTED = "#e08a00"


def colour_scale(images: Sequence[Explained]) -> float:
    """The end of the colour scale: 99 per cent of all cells of the maps lie within plus and minus this."""
    cells = np.concatenate([np.abs(p.maps).ravel() for p in images])
    end = float(np.percentile(cells, 99))
    return end if end > 0 else 1.0


def tint(pixels: npt.NDArray[np.float64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pixels coloured by the map there, float64 [..., 3] in 0..1.

    Args:
        pixels: [..., 3] in 0..1.
        value: [...] in -1..1; 0 leaves the pixel as it is, the ends are red and blue as strong as they get.
    """
    colour = np.where(value[..., None] > 0, _FOR, _AGAINST)
    # The exponent lifts small values, so that weak evidence is visible too.
    weight = _OPACITY * np.abs(value)[..., None] ** 0.7
    out: npt.NDArray[np.float64] = pixels * (1 - weight) + colour * weight
    return out


def overlay(
    image: npt.NDArray[np.uint8], cells: npt.NDArray[np.float32], scale: float, positive_only: bool = False
) -> npt.NDArray[np.float64]:
    """A map over the image, whose colours are paled, float64 [S, S, 3] in 0..1.

    Args:
        image: uint8 [S, S, 3].
        cells: float32 [h, w], upsampled bilinearly.
        scale: where colours are full.
        positive_only: leave out what speaks against the class.
    """
    size = image.shape[:2]
    large = F.interpolate(torch.from_numpy(cells)[None, None], size=size, mode="bilinear", align_corners=False)
    value = np.clip(large[0, 0].double().numpy() / scale, 0 if positive_only else -1, 1)
    # The weights are those of luma.
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    # Lightened, so that colours show over black.
    return tint(0.25 + 0.7 * (_COLOURED * image + (1 - _COLOURED) * grey) / 255, value)


def _across(count: int, width: float, height: float) -> int:
    """How many blocks of that size go in a row of a page of `count`: near 4 : 3 and at most 26 inches wide."""
    usable = [n for n in range(1, count + 1) if n == 1 or n * width <= 26]
    return min(usable, key=lambda n: abs(math.log(n * width / (math.ceil(count / n) * height) / (4 / 3))))


class Page:
    """A figure on which text is put in inches from the upper left corner, cut to the width that it has."""

    def __init__(self, width: float, height: float, families: list[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.families = width, height, families
        self.figure = Figure(figsize=(width, height), dpi=_DPI)
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
        while kept > 1 and (wide := artist.get_window_extent(self._renderer).width / _DPI) > room:
            kept = min(kept - 1, int(kept * room / wide))
            head = int(kept * keep)
            artist.set_text(text[:head] + "\u2026" + text[len(text) - max(0, kept - head - 1) :])

    def image(self, x: float, y: float, pixels: npt.NDArray[Any], aspect: float, frame: str | None) -> None:
        """An image at the lower edge of the panel at (x, y), in the aspect ratio of its original.

        Args:
            x: inches from the left edge of the page.
            y: inches from its upper edge.
            pixels: [S, S, 3], uint8 or float in 0..1.
            aspect: width / height of the original.
            frame: colour of a thick frame, or None for a thin grey one.
        """
        wide, high = PANEL * min(1, aspect), PANEL * min(1, 1 / aspect)
        left, top = x, y + PANEL - high
        axes = self.figure.add_axes(
            (left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height)
        )
        axes.imshow(pixels, aspect="auto", interpolation="bilinear")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=frame or "#999999", linewidth=3 if frame else 0.6)

    def scale(self, x: float, y: float, end: float) -> None:
        """The colour scale at (x, y)."""
        width, high = 1.3, 0.12
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + high) / self.height, width / self.width, high / self.height)
        )
        axes.imshow(
            tint(np.full((1, 256, 3), 0.75), np.linspace(-1, 1, 256)[None]), aspect="auto", extent=(-1, 1, 0, 1)
        )
        axes.set_yticks([])
        axes.set_xticks([-1, 0, 1], [f"\u2212{end:.2g}", "0", f"+{end:.2g}"], fontsize=7)
        axes.tick_params(length=2, pad=1)

    def save(self, out: Path) -> None:
        """Write the page as a PNG file, whole or not at all. Raises `UserError`."""
        try:
            with atomic_write(out) as partial:
                self.figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": writer_name("explain")})
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error


def image_caption(image: Explained, names: dict[int, str]) -> list[str]:
    """The lines below an image."""
    lines = [printable(image.path)]
    if image.reason:
        lines.append(image.reason)
    if image.labels is not None:
        seen, hidden = ([names[c] for c in ids] for ids in image.labels)
        text = "positive: " + (", ".join(seen) or "none")
        lines.append(text + (f"; hidden: {', '.join(hidden)}" if hidden else ""))
    lines.append("predicted: " + (", ".join(names[c] for c in image.predicted) or "none"))
    return lines


def _map_caption(image: Explained, place: int, names: dict[int, str], alpha: float, signed: bool) -> list[str]:
    """The lines below a map; the first is the class. Positive cells are counted in signed maps only."""
    label = "" if image.known is None else f", label {NAMES[int(image.known[place])]}"
    logit = f"logit {image.logit[place]:.2f}"
    if alpha != 1:
        logit = f"logit {image.plain[place]:.2f}, at alpha {alpha:g} {image.logit[place]:.2f}"
    lines = [names[int(image.classes[place])], f"probability {image.probability[place]:.3f}{label}", logit]
    return lines + ([f"{100 * image.positive_fraction[place]:.0f}% of cells positive"] if signed else [])


def draw(
    out: Path,
    images: Sequence[Explained],
    classes: Sequence[str],
    title: str,
    alpha: float,
    signed: bool,
    positive_only: bool = False,
) -> int:
    """Draw images with their maps on one page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        images: at least one, with the same number of maps each.
        classes: class names in class-id order; drawn literally, without mathematical notation.
        title: first line of the page.
        alpha: of the probabilities.
        signed: whether the maps are evidence whose mean is the logit (CAM), else attention.
        positive_only: draw what speaks for a class alone.

    Returns:
        How many class names no font of this machine can show; they stand as "class ID".

    Raises:
        UserError: the file cannot be written.
    """
    ids = {int(c) for p in images for group in (p.classes, p.predicted, *(p.labels or ())) for c in group}
    names, families, undrawable = displayable_names(classes, ids)
    width = (len(images[0].classes) + 1) * (PANEL + GAP) + _BLOCK_GAP
    height = PANEL + CAPTION + GAP
    across = _across(len(images), width, height)
    page = Page(
        max(6.5, 2 * MARGIN + across * width - _BLOCK_GAP),
        2 * MARGIN + HEADER + math.ceil(len(images) / across) * height,
        families,
    )
    end = colour_scale(images)
    labelled = any(p.known is not None for p in images)
    draw_header(page, printable(title), end, signed, labelled)
    with warnings.catch_warnings():
        # A path may have characters that no font has; boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for place, image in enumerate(images):
            x = MARGIN + place % across * width
            y = MARGIN + HEADER + place // across * height
            captions = [image_caption(image, names)]
            captions += [_map_caption(image, k, names, alpha, signed) for k in range(len(image.maps))]
            _draw_block(page, x, y, image, captions, end, positive_only)
        page.save(out)
    return undrawable


def draw_header(page: Page, title: str, end: float, signed: bool, labelled: bool) -> None:
    """Title, colour scale and their explanation.

    Args:
        page: to draw on.
        title: the first line.
        end: of the colour scale.
        signed: whether maps are evidence, as in `draw`.
        labelled: whether frames mark predictions that contradict labels.
    """
    page.text(MARGIN, MARGIN, title, page.width - 2 * MARGIN, 10, fontweight="bold")
    page.scale(MARGIN + 0.15, MARGIN + 0.28, end)
    meaning = (
        "cell of the map: red for the class, blue against it" if signed else "attention of the class query x features"
    )
    page.text(MARGIN + 1.75, MARGIN + 0.25, meaning, page.width - 2.1)
    if labelled:
        frames = "thick frame: the prediction contradicts the label"
        page.text(MARGIN + 1.75, MARGIN + 0.25 + LINE, frames, page.width - 2.1, color=_CONTRADICTED)


def _draw_block(
    page: Page,
    x: float,
    y: float,
    image: Explained,
    captions: list[list[str]],
    end: float,
    positive_only: bool,
) -> None:
    """An image and its maps in one row at (x, y), each above its caption."""
    page.image(x, y, image.image, image.aspect, None)
    for k, cells in enumerate(image.maps):
        frame = _CONTRADICTED if image.wrong(k) else None
        pixels = overlay(image.image, cells, end, positive_only)
        page.image(x + (k + 1) * (PANEL + GAP), y, pixels, image.aspect, frame)
    for k, lines in enumerate(captions):
        for row, line in enumerate(lines):
            left, top = x + k * (PANEL + GAP), y + PANEL + 0.05 + row * LINE
            # The end of a path tells more than its beginning.
            keep, weight = (0.7, "bold" if row == 0 else "normal") if k else (1.0 if row else 0.0, "normal")
            page.text(left, top, line, PANEL, keep=keep, fontweight=weight)


class MapFolder:
    """Writes maps as float32 [h, w] .npy files with `maps.json` beside them; the folder appears when all is written.

    Args:
        out: folder to make; it must not exist, or be empty.
        metadata: entries of `maps.json` beside its list (run, alpha, ...).

    Raises:
        UserError: the folder is in use or cannot be written.
    """

    def __init__(self, out: Path, metadata: dict[str, Any]) -> None:
        self.out, self.metadata = out, metadata
        self.entries: list[dict[str, Any]] = []
        self._staging = partial_path(out)
        self._images = 0
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists and is not an empty folder; choose another --maps")
            self._staging.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{self._staging} is left from an interrupted run; delete it") from error
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error

    def add(self, image: Explained, classes: Sequence[str]) -> None:
        """Write the maps of one image."""
        for k, class_id in enumerate(image.classes.tolist()):
            name = f"{self._images:06d}-{class_id}.npy"
            try:
                np.save(self._staging / name, image.maps[k])
            except OSError as error:
                raise UserError(f"{self._staging / name} cannot be written: {error.strerror}") from error
            self.entries.append(
                {
                    "file": name,
                    # Escaped where the file name's bytes are not UTF-8, which JSON could not hold.
                    "path": image.path.encode("utf-8", "backslashreplace").decode(),
                    "class": classes[class_id],
                    "class_id": class_id,
                    "probability": float(image.probability[k]),
                    "logit": float(image.logit[k]),
                    "logit_alpha_1": float(image.plain[k]),
                    "positive_share": float(image.positive_fraction[k]),
                }
            )
        self._images += 1

    def __enter__(self) -> MapFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._staging)
            return
        try:
            write_json(self._staging / "maps.json", {**self.metadata, "maps": self.entries})
            move_into_place(self._staging, self.out)
        except OSError as problem:
            raise UserError(f"{self.out} cannot be written: {problem.strerror}") from problem
