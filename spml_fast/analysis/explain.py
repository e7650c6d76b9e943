"""Class activation maps drawn over pictures: where a trained run sees evidence for a class, and where against it.

A CAM head's logit is the mean of its signed map (spec/boostlu_large_loss.md 1.1), so colours have the map's sign: red
is evidence for the class, blue against it, and the scale is the same for all maps of a page, symmetric around 0. Maps
are the head's own, with the bias and without the boost. A Query2Label head gives the map that IGNORE uses: the class
query's attention times the channel mean of the features (spec/ignore.md 2.2); its mean is not the logit.

Maps are made of the chosen classes alone, never of all C.
"""

from __future__ import annotations

import math
import os
import shutil
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from spml_fast.analysis.predict import PictureFiles, check_numbers, load_pictures, printable, why_refused
from spml_fast.analysis.suggest import NAMES, Suggestions
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.manifest import Split
from spml_fast.evaluation.evaluate import input_normalisation
from spml_fast.models.classifier import Classifier, boosted
from spml_fast.train.checkpoint import write_json
from spml_fast.train.engine import autocast_dtype

# A class counts as predicted from here on.
PREDICTED = 0.5
# More pictures make a page that viewers refuse.
MAX_PICTURES = 100


# --- Maps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explained:
    """One picture with the maps of its chosen classes.

    Attributes:
        path: as it is shown.
        picture: uint8 [S, S, 3] as the network saw it, normalisation undone.
        aspect: width through height of the original, 1 when unknown.
        classes: int64 [k] class ids.
        probability: float64 [k], sigmoid of `logit`.
        logit: float32 [k] at the alpha asked for.
        plain: float32 [k], logit at alpha 1.
        maps: float32 [k, h, w], signed.
        predicted: class ids of probability `PREDICTED` or more, the most probable first.
        known: int8 [k] label of each class, or None where nothing is known of the picture.
        labels: (observed positives, positives that training does not see), class ids; None as `known`.
        reason: why the picture was chosen, or "".
        refused: why the loader refused the picture, which then has no classes; None when it did not.
    """

    path: str
    picture: npt.NDArray[np.uint8]
    aspect: float
    classes: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    logit: npt.NDArray[np.float32]
    plain: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    predicted: tuple[int, ...]
    known: npt.NDArray[np.int8] | None = None
    labels: tuple[list[int], list[int]] | None = None
    reason: str = ""
    refused: str | None = None

    @property
    def positive_share(self) -> npt.NDArray[np.float64]:
        """Share of cells above 0 of each map, float64 [k]."""
        return (self.maps > 0).mean((1, 2))

    def wrong(self, place: int) -> bool:
        """Whether the prediction of the class at `place` contradicts its label."""
        if self.known is None:
            return False
        return bool(self.known[place] == (NEGATIVE if self.probability[place] >= PREDICTED else POSITIVE))


def choose_classes(logits: Tensor, top: int, first: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Classes of each picture to look at: those in `first`, then the most probable ones, `top` in all.

    Args:
        logits: [B, C].
        top: classes a picture; C where there are fewer.
        first: class ids of each picture that come first, or None.

    Returns:
        int64 [B, min(top, C)], no class twice; equal logits by class id.
    """
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    if first is not None:
        # A class's place in line: given ones before all others.
        line = torch.empty_like(order)
        line.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order).contiguous())
        for row, given in enumerate(first):
            for place, class_id in enumerate(given):
                line[row, class_id] = place - len(given)
        order = torch.argsort(line, dim=1)
    return order[:, :top]


@torch.no_grad()
def explain(
    classifier: Classifier,
    config: Config,
    files: PictureFiles,
    device: torch.device,
    *,
    alpha: float,
    classes: Sequence[str],
    top: int,
    first: Sequence[Sequence[int]] | None = None,
    aspects: Sequence[float] | None = None,
) -> Iterator[Explained]:
    """Maps of each picture, in order, a batch at a time.

    A picture that passed its check and that the loader cannot decode all the same is reported with its reason, and the
    others go on.

    Args:
        classifier: on `device`, in eval mode.
        config: the run's; `eval.batch_size` pictures go through the network at once.
        files: the pictures, at least one.
        device: where the views are made and the network runs.
        alpha: BoostLU's factor of the probabilities, 1 for heads that do not boost.
        classes: names for error messages.
        top: classes a picture.
        first: class ids of each picture that are looked at before the most probable ones, or None.
        aspects: width through height of each original, or None.

    Raises:
        UserError: a logit is not a number, or the head has no maps.
    """
    dtype = autocast_dtype(config.train.precision, device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in input_normalisation(config, classifier))
    for start, views in load_pictures(classifier, config, files, device):
        if views is None:
            path, none = files.path(start), np.empty(0, np.float32)
            yield Explained(
                path=path,
                picture=np.empty((0, 0, 3), np.uint8),
                aspect=1.0,
                classes=np.empty(0, np.int64),
                probability=np.empty(0, np.float64),
                logit=none,
                plain=none,
                maps=none.reshape(0, 1, 1),
                predicted=(),
                refused=why_refused(path),
            )
            continue
        number = len(views)
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            features = classifier.features(views)
            plain, relu, _, _ = classifier.head(features, alpha != 1)
            logits = boosted(plain, relu, alpha)
            check_numbers(logits, classes, lambda row, start=start: printable(files.path(start + row)))
            given = None if first is None else first[start : start + number]
            chosen = choose_classes(logits, top, given)
            maps = classifier.head(features, False, chosen)[2]
        if maps is None:
            raise UserError(f"head {config.model.head} has no class maps; use a run with head cam")
        pixels = (views * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        logit, at_one = (t.gather(1, chosen).float().cpu().numpy() for t in (logits, plain))
        cells, ids = maps.float().cpu().numpy(), chosen.cpu().numpy()
        order = torch.sort(logits, dim=1, descending=True, stable=True)
        count = (torch.sigmoid(order.values.double()) >= PREDICTED).sum(1).tolist()
        for row in range(number):
            yield Explained(
                path=files.path(start + row),
                picture=pixels[row],
                aspect=1.0 if aspects is None else aspects[start + row],
                classes=ids[row],
                probability=torch.sigmoid(torch.from_numpy(logit[row]).double()).numpy(),
                logit=logit[row],
                plain=at_one[row],
                maps=cells[row],
                predicted=tuple(order.indices[row, : count[row]].tolist()),
            )


# --- Which pictures of a split -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A sample to show: its index, why, and the class that it is shown for (None for random ones)."""

    index: int
    reason: str
    class_id: int | None = None


def choose_samples(mistakes: Sequence[Suggestions], size: int, count: int, seed: int) -> list[Choice]:
    """Samples for a sheet: a third where the model is most wrong in each direction, the rest at random.

    Args:
        mistakes: ranked lists of labels that the model contradicts; a picture is taken once.
        size: samples of the split.
        count: samples wanted; fewer where the split has fewer.
        seed: of the random ones.
    """
    chosen: dict[int, Choice] = {}
    words = {NEGATIVE: "false positive", POSITIVE: "missed positive"}
    for found in mistakes:
        # What a direction with few mistakes leaves free goes to the random ones.
        goal = min(count, len(chosen) + max(1, count // 3))
        for index, class_id in zip(found.index.tolist(), found.class_id.tolist(), strict=True):
            if len(chosen) >= goal:
                break
            chosen.setdefault(index, Choice(index, words[found.code], class_id))
    for index in np.random.default_rng(seed).permutation(size).tolist():
        if len(chosen) >= min(count, size):
            break
        chosen.setdefault(index, Choice(index, "at random"))
    return list(chosen.values())


def with_labels(found: Explained, split: Split, choice: Choice, classes: Sequence[str]) -> Explained:
    """The picture with what is known of its labels."""
    known, observed = split.known.rows([choice.index])[0], split.observed.rows([choice.index])[0]
    seen = np.flatnonzero(observed == POSITIVE)
    hidden = np.flatnonzero((known == POSITIVE) & (observed != POSITIVE))
    return replace(
        found,
        path=split.relative_path(choice.index),
        known=known[found.classes],
        labels=(seen.tolist(), hidden.tolist()),
        reason=choice.reason if choice.class_id is None else f"{choice.reason}: {classes[choice.class_id]}",
    )


# --- Text that a font can show -------------------------------------------------------------------------------------


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
            here = {c for c in missing if font.get_char_index(ord(c))}
        except (OSError, RuntimeError):
            # A font file that is gone or damaged helps nobody.
            continue
        if here:
            families.append(entry.name)
            missing -= here
        if not missing:
            break
    return families, missing


def shown_names(classes: Sequence[str], ids: set[int]) -> tuple[dict[int, str], list[str], int]:
    """Class names as the fonts of this machine can show them.

    Returns:
        id -> name, or "class ID" where no font has its characters; the font families; how many names cannot be shown.
    """
    # Composed, as fonts have more of such characters.
    names = {i: printable(unicodedata.normalize("NFC", classes[i])) for i in sorted(ids)}
    families, missing = _fonts("".join(names.values()))
    lost = {i for i, name in names.items() if missing & set(name)}
    return {i: f"class {i}" if i in lost else name for i, name in names.items()}, families, len(lost)


# --- Pages ---------------------------------------------------------------------------------------------------------

# Inches.
_PANEL, _GAP, _CAPTION, _BLOCK_GAP, _MARGIN, _HEADER = 1.9, 0.12, 0.62, 0.3, 0.2, 0.72
_LINE = 0.135
_DPI = 110
_CONTRADICTED = "#e08a00"
# Red and blue that stay apart for colour-blind eyes.
_FOR, _AGAINST = np.array([0.78, 0.05, 0.13]), np.array([0.05, 0.28, 0.75])


def colour_scale(pictures: Sequence[Explained]) -> float:
    """The end of the colour scale: 99 per cent of all cells of the maps lie within plus and minus this."""
    cells = np.concatenate([np.abs(p.maps).ravel() for p in pictures])
    end = float(np.percentile(cells, 99))
    return end if end > 0 else 1.0


def tint(grey: npt.NDArray[np.float64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Grey pixels coloured by the map there, float64 [..., 3] in 0..1.

    Args:
        grey: [...] in 0..1.
        value: [...] in -1..1; 0 leaves the pixel grey, the ends are full red and full blue.
    """
    colour = np.where(value[..., None] > 0, _FOR, _AGAINST)
    # A colour that begins at once: weak evidence against a class is seen too.
    weight = 0.85 * np.abs(value)[..., None] ** 0.7
    out: npt.NDArray[np.float64] = grey[..., None] * (1 - weight) + colour * weight
    return out


def overlay(picture: npt.NDArray[np.uint8], cells: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.float64]:
    """A map over the greyed picture, float64 [S, S, 3] in 0..1.

    Args:
        picture: uint8 [S, S, 3].
        cells: float32 [h, w], upsampled bilinearly.
        scale: where colours are full.
    """
    size = picture.shape[:2]
    large = F.interpolate(torch.from_numpy(cells)[None, None], size=size, mode="bilinear", align_corners=False)
    value = np.clip(large[0, 0].double().numpy() / scale, -1, 1)
    # Lightened, so that colours show over black. The weights are those of luma.
    return tint(0.35 + 0.6 * (picture @ np.array([0.299, 0.587, 0.114]) / 255), value)


def _across(count: int, width: float, height: float) -> int:
    """How many blocks of that size stand side by side on a page of `count`: near 4 : 3 and at most 26 inches wide."""
    usable = [n for n in range(1, count + 1) if n == 1 or n * width <= 26]
    return min(usable, key=lambda n: abs(math.log(n * width / (math.ceil(count / n) * height) / (4 / 3))))


class _Page:
    """A figure on which text is put in inches from the upper left corner, cut to the width that it has."""

    def __init__(self, width: float, height: float, families: list[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.families = width, height, families
        self.figure = Figure(figsize=(width, height), dpi=_DPI)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text(
        self, x: float, y: float, words: str, room: float, size: float = 7.5, keep: float = 0.7, **style: Any
    ) -> None:
        """A line of text with its top left corner at (x, y).

        Args:
            room: width that it may take; of a longer one something is left out.
            keep: share of what is kept that comes from its beginning.
        """
        artist = self.figure.text(
            x / self.width,
            1 - y / self.height,
            words,
            fontsize=size,
            fontfamily=self.families,
            va="top",
            parse_math=False,
            **style,
        )
        kept = len(words)
        while kept > 1 and (wide := artist.get_window_extent(self._renderer).width / _DPI) > room:
            kept = min(kept - 1, int(kept * room / wide))
            head = int(kept * keep)
            artist.set_text(words[:head] + "\u2026" + words[len(words) - max(0, kept - head - 1) :])

    def picture(self, x: float, y: float, pixels: npt.NDArray[Any], aspect: float, frame: str | None) -> None:
        """A picture in the panel at (x, y), on its floor beside the caption, in the aspect ratio of its original."""
        wide, high = _PANEL * min(1, aspect), _PANEL * min(1, 1 / aspect)
        left, top = x, y + _PANEL - high
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
        axes.imshow(tint(np.full((1, 256), 0.75), np.linspace(-1, 1, 256)[None]), aspect="auto", extent=(-1, 1, 0, 1))
        axes.set_yticks([])
        axes.set_xticks([-1, 0, 1], [f"\u2212{end:.2g}", "0", f"+{end:.2g}"], fontsize=7)
        axes.tick_params(length=2, pad=1)


def _caption(found: Explained, names: dict[int, str]) -> list[str]:
    """The lines below a picture."""
    lines = [printable(found.path)]
    if found.reason:
        lines.append(found.reason)
    if found.labels is not None:
        seen, hidden = ([names[c] for c in ids] for ids in found.labels)
        text = "positive: " + (", ".join(seen) or "none")
        lines.append(text + (f"; hidden: {', '.join(hidden)}" if hidden else ""))
    lines.append("predicted: " + (", ".join(names[c] for c in found.predicted) or "none"))
    return lines


def _map_caption(found: Explained, place: int, names: dict[int, str], alpha: float, signed: bool) -> list[str]:
    """The lines below a map; the first is the class. Attention has no sign worth counting."""
    label = "" if found.known is None else f", label {NAMES[int(found.known[place])]}"
    logit = f"logit {found.logit[place]:.2f}"
    if alpha != 1:
        logit = f"logit {found.plain[place]:.2f}, at alpha {alpha:g} {found.logit[place]:.2f}"
    lines = [names[int(found.classes[place])], f"probability {found.probability[place]:.3f}{label}", logit]
    return lines + ([f"{100 * found.positive_share[place]:.0f}% of cells positive"] if signed else [])


def draw(
    out: Path, pictures: Sequence[Explained], classes: Sequence[str], title: str, alpha: float, signed: bool
) -> int:
    """Draw pictures with their maps on one page and move it to its place when it is whole.

    Args:
        out: PNG file; an older one is replaced.
        pictures: at least one, with the same number of maps each.
        classes: class names in class-id order; shown literally.
        title: first line of the page.
        alpha: of the probabilities.
        signed: whether the maps are evidence whose mean is the logit (CAM), else attention.

    Returns:
        How many class names no font of this machine can show; they stand as "class ID".

    Raises:
        UserError: the file cannot be written.
    """
    ids = {int(c) for p in pictures for group in (p.classes, p.predicted, *(p.labels or ())) for c in group}
    names, families, lost = shown_names(classes, ids)
    width = (len(pictures[0].classes) + 1) * (_PANEL + _GAP) + _BLOCK_GAP
    height = _PANEL + _CAPTION + _GAP
    across = _across(len(pictures), width, height)
    page = _Page(
        max(6.5, 2 * _MARGIN + across * width - _BLOCK_GAP),
        2 * _MARGIN + _HEADER + math.ceil(len(pictures) / across) * height,
        families,
    )
    end = colour_scale(pictures)
    page.text(_MARGIN, _MARGIN, printable(title), page.width - 2 * _MARGIN, 10, fontweight="bold")
    page.scale(_MARGIN + 0.15, _MARGIN + 0.28, end)
    meaning = (
        "cell of the map: red for the class, blue against it" if signed else "attention of the class query x features"
    )
    page.text(_MARGIN + 1.75, _MARGIN + 0.25, meaning, page.width - 2.1)
    if any(p.known is not None for p in pictures):
        words = "thick frame: the prediction contradicts the label"
        page.text(_MARGIN + 1.75, _MARGIN + 0.25 + _LINE, words, page.width - 2.1, color=_CONTRADICTED)
    with warnings.catch_warnings():
        # A path may have characters that no font has; boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for place, found in enumerate(pictures):
            x = _MARGIN + place % across * width
            y = _MARGIN + _HEADER + place // across * height
            page.picture(x, y, found.picture, found.aspect, None)
            captions = [_caption(found, names)]
            for k, cells in enumerate(found.maps):
                frame = _CONTRADICTED if found.wrong(k) else None
                page.picture(x + (k + 1) * (_PANEL + _GAP), y, overlay(found.picture, cells, end), found.aspect, frame)
                captions.append(_map_caption(found, k, names, alpha, signed))
            for k, lines in enumerate(captions):
                for row, line in enumerate(lines):
                    left, top = x + k * (_PANEL + _GAP), y + _PANEL + 0.05 + row * _LINE
                    # The end of a path says more than its beginning.
                    keep, weight = (0.7, "bold" if row == 0 else "normal") if k else (1.0 if row else 0.0, "normal")
                    page.text(left, top, line, _PANEL, keep=keep, fontweight=weight)
        partial = out.with_name(out.name + ".partial")
        try:
            page.figure.savefig(partial, format="png", dpi=_DPI)
            os.replace(partial, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error
    return lost


# --- Maps as arrays ------------------------------------------------------------------------------------------------


class MapFolder:
    """Writes maps as float32 [h, w] .npy files with `maps.json` beside them; the folder appears when all is written.

    Args:
        out: folder to make; it must not exist, or be empty.
        about: what `maps.json` says beside its list (run, alpha, ...).

    Raises:
        UserError: the folder is in use or cannot be written.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.entries: list[dict[str, Any]] = []
        self._staging = out.with_name(out.name + ".partial")
        self._pictures = 0
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists and is not an empty folder; choose another --maps")
            self._staging.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{self._staging} is left from a run that was cut off; delete it") from error
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error

    def add(self, found: Explained, classes: Sequence[str]) -> None:
        """Write the maps of one picture."""
        for k, class_id in enumerate(found.classes.tolist()):
            name = f"{self._pictures:06d}-{class_id}.npy"
            try:
                np.save(self._staging / name, found.maps[k])
            except OSError as error:
                raise UserError(f"{self._staging / name} cannot be written: {error.strerror}") from error
            self.entries.append(
                {
                    "file": name,
                    # Escaped where the file name's bytes are no UTF-8, which JSON could not hold.
                    "path": found.path.encode("utf-8", "backslashreplace").decode(),
                    "class": classes[class_id],
                    "class_id": class_id,
                    "probability": float(found.probability[k]),
                    "logit": float(found.logit[k]),
                    "logit_alpha_1": float(found.plain[k]),
                    "positive_share": float(found.positive_share[k]),
                }
            )
        self._pictures += 1

    def __enter__(self) -> MapFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._staging)
            return
        try:
            write_json(self._staging / "maps.json", {**self.about, "maps": self.entries})
            os.replace(self._staging, self.out)
        except OSError as problem:
            raise UserError(f"{self.out} cannot be written: {problem.strerror}") from problem
