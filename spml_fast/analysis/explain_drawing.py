"""What becomes of images as they are explained: one page of all of them, or a page each, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spml_fast.analysis.compare_page import Column, draw_comparison
from spml_fast.analysis.explain import Explained, MaskedView
from spml_fast.analysis.explain_files import MapFolder
from spml_fast.analysis.explain_page import draw
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import OutputFile, writer_name


def page_file(path: Path, overwrite: bool) -> OutputFile:
    """A page to draw."""
    return OutputFile(path, "png", writer_name("explain"), "--out", overwrite)


def check_pages(out: Path, one_page: bool, overwrite: bool) -> None:
    """Raise `UserError` where a page that would be drawn may have the name of a file of another origin."""
    for path in [out] if one_page else sorted(out.glob("[0-9][0-9][0-9][0-9]-*.png")):
        page_file(path, overwrite).check(parent=False)


def page_name(place: int, path: str) -> str:
    """File name of an image's own page: its number, and its name in plain characters."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(path).stem)
    return f"{place:04d}-{stem[:80]}.png"


@dataclass(frozen=True)
class Style:
    """How pages are drawn.

    Attributes:
        title: over every page.
        run: what the run is called beside others.
        about: its method and alphas.
        alpha: BoostLU's factor of its probabilities.
        positive_only: draw what speaks for a class alone.
        boosted: in a comparison, draw the run's maps with the boost as well.
        mask: how a run of IGNORE masks images; None for other methods.
        mask_alpha: BoostLU's factor in training.
    """

    title: str
    run: str
    about: str
    alpha: float
    positive_only: bool = False
    boosted: bool = False
    mask: MaskedView | None = None
    mask_alpha: float = 1.0


class Drawing:
    """Draws images as they are explained: all on one page at the end, or a page each.

    A page of several runs, or of one of IGNORE, has a row for each class of an image; else an image has one row.

    Args:
        out: a PNG file for one page, or a folder.
        one_page: which of the two.
        overwrite: replace files that this command did not draw, too.
        classes: class names in class-id order.
        style: of the pages.
        maps: takes the maps as arrays; None for pictures alone.
        others: gives the columns of the compared runs for images, by their places among those chosen; None for one run.

    Attributes:
        shown: images drawn so far.
        unprintable: class names for which no font has the characters, at most on one page.
    """

    def __init__(
        self,
        out: Path,
        one_page: bool,
        overwrite: bool,
        classes: Sequence[str],
        style: Style,
        maps: MapFolder | None = None,
        others: Callable[[list[int], list[Explained]], list[Column]] | None = None,
    ) -> None:
        check_pages(out, one_page, overwrite)
        self.out, self.one_page, self.overwrite = out, one_page, overwrite
        self.classes, self.style, self.maps, self.others = classes, style, maps, others
        self.images: list[Explained] = []
        self.places: list[int] = []
        self.shown = self.unprintable = 0
        try:
            (out.parent if one_page else out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error

    def add(self, place: int, image: Explained) -> None:
        """The image that is number `place` of those chosen."""
        self.shown += 1
        if self.maps is not None:
            self.maps.add(image, self.classes)
        if self.one_page:
            self.images.append(image)
            self.places.append(place)
        else:
            self._draw(self.out / page_name(place, image.path), [place], [image])

    def finish(self) -> None:
        """Draw the one page; `UserError` where there is nothing to draw."""
        if not self.shown:
            raise UserError("none of the images can be used; the reasons stand above")
        if self.one_page:
            self._draw(self.out, self.places, self.images)

    def _draw(self, path: Path, places: list[int], images: list[Explained]) -> None:
        page_file(path, self.overwrite).check()
        s = self.style
        if self.others is None and s.mask is None:
            unprintable = draw(path, images, self.classes, s.title, s.alpha, s.positive_only)
        else:
            own = Column(s.run, s.about, s.alpha, images, s.boosted and s.alpha != 1, s.mask, s.mask_alpha)
            others = [] if self.others is None else self.others(places, images)
            # The first of the others is what all are compared with.
            columns = [*others[:1], own, *others[1:]]
            unprintable = draw_comparison(path, columns, images, self.classes, s.title, s.positive_only)
        self.unprintable = max(self.unprintable, unprintable)
