"""Charts as SVG within the page: sharp, small, in the page's colours, readable without a program.

Colours are classes of the page's style, so that a chart has those of the reader's mode. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 36
# A point, or None where there is nothing.
Point = tuple[float, float | None]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, at most about `most`, that cover low to high; around one number where these differ by rounding."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.05 or 0.5
        # What is never negative, such as per cent, has no negative tick.
        low, high = low - pad if low else 0.0, high + pad
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover low to high."""
    return [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high * 0.999999)) + 1)]


def tick_text(value: float) -> str:
    """A tick for people: `20`, `0.25`, `40k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def _f(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def text_mark(kind: str, x: float | str, y: float, text: str) -> Markup:
    """A text in a chart.

    Args:
        kind: its classes.
        x: where it begins, ends or has its middle, by its classes; such as `25%` in a `RowChart`.
        y: of its base line.
        text: anything.
    """
    at = x if isinstance(x, str) else _f(x)
    return Markup(f'<text class="{kind}" x="{at}" y="{_f(y)}">') + escape(text) + Markup("</text>")


@dataclass
class RowChart:
    """Rows along one axis. Across, places are per cent of the width, so that text has one size in windows of any width.

    Attributes:
        title: what it shows, for those who cannot see it.
        ticks: of the axis, ascending, the first and last of which are its ends.
        rows: how many; each has a line for its name and value, and its marks below.
        unit: below the axis.
        marks: what was drawn.
    """

    title: str
    ticks: Sequence[float]
    rows: int
    unit: str = ""
    marks: list[Markup] = field(default_factory=list)

    # Pixels: a row, and from its top to the base line of its name and to its marks.
    ROW: ClassVar[int] = 40
    NAME: ClassVar[int] = 16
    MARKS: ClassVar[int] = 28

    def across(self, value: float) -> str:
        """Where a value lies."""
        return f"{100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]):.2f}%"

    def names(self, row: int, name: str, value: str = "") -> None:
        """What stands over the marks of a row: its name and, at the other end, its value."""
        y = self.ROW * row + self.NAME
        self.marks.append(text_mark("name", 0, y, name))
        if value:
            self.marks.append(text_mark("name end strong", "100%", y, value))

    def line(self, kind: str, row: int, low: float, high: float) -> None:
        """A line between two values.

        Args:
            kind: its classes.
            row: where.
            low: where it begins.
            high: where it ends.
        """
        y = self.ROW * row + self.MARKS
        ends = f'x1="{self.across(low)}" x2="{self.across(high)}" y1="{y}" y2="{y}"'
        self.marks.append(Markup(f'<line class="{kind}" {ends}/>'))

    def stroke(self, kind: str, row: int, value: float) -> None:
        """An upright mark at a value.

        Args:
            kind: its classes.
            row: where.
            value: where.
        """
        x, y = self.across(value), self.ROW * row + self.MARKS
        self.marks.append(Markup(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{y - 7}" y2="{y + 7}"/>'))

    def dot(self, kind: str, row: int, value: float, text: str) -> None:
        """A dot that says what it is.

        Args:
            kind: its classes.
            row: where.
            value: where.
            text: shown when it is pointed at.
        """
        shape = f'<circle class="{kind}" cx="{self.across(value)}" cy="{self.ROW * row + self.MARKS}" r="4">'
        self.marks.append(Markup(shape) + Markup("<title>%s</title></circle>") % text)

    def bar(self, kind: str, row: int, low: float, high: float, text: str) -> None:
        """A bar that says what it is.

        Args:
            kind: its classes.
            row: where.
            low: where it begins.
            high: where it ends.
            text: shown when it is pointed at.
        """
        width = 100 * (high - low) / (self.ticks[-1] - self.ticks[0])
        shape = f'x="{self.across(low)}" y="{self.ROW * row + self.MARKS - 6}" width="{width:.2f}%" height="14"'
        self.marks.append(Markup(f'<rect class="{kind}" {shape}>') + Markup("<title>%s</title></rect>") % text)

    def svg(self) -> Markup:
        """The chart."""
        end = self.ROW * self.rows + 6
        height = end + (34 if self.unit else 20)
        out = [
            Markup(f'<svg class="chart rows" height="{height}" role="img">'),
            Markup("<title>%s</title>") % self.title,
        ]
        for place, tick in enumerate(self.ticks):
            # The outer ones stay within the chart.
            kind = "tick" if place == 0 else "tick end" if place == len(self.ticks) - 1 else "tick mid"
            x = self.across(tick)
            out.append(Markup(f'<line class="grid" x1="{x}" x2="{x}" y1="2" y2="{end}"/>'))
            out.append(text_mark(kind, x, end + 14, tick_text(tick)))
        if self.unit:
            out.append(text_mark("tick mid", "50%", end + 28, self.unit))
        return Markup("").join([*out, *self.marks, Markup("</svg>")])


@dataclass
class Chart:
    """Marks in a frame with two axes.

    Attributes:
        title: what it shows, for those who cannot see it.
        x: ticks of the x axis, ascending, the first and last of which are its ends.
        y: ticks of the y axis, likewise.
        x_label: below the x axis.
        width: in units that are pixels on a wide page.
        height: likewise.
        log_x: the x axis is logarithmic.
        log_y: the y axis is logarithmic.
        marks: what was drawn.
    """

    title: str
    x: Sequence[float]
    y: Sequence[float]
    x_label: str = ""
    width: int = 400
    height: int = 240
    log_x: bool = False
    log_y: bool = False
    marks: list[Markup] = field(default_factory=list)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""

        def part(value: float, ends: Sequence[float], log: bool) -> float:
            low, high = ends[0], ends[-1]
            if log:
                value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
            return (value - low) / (high - low)

        across, up = part(x, self.x, self.log_x), part(y, self.y, self.log_y)
        return LEFT + across * (self.width - LEFT - RIGHT), TOP + (1 - up) * (self.height - TOP - BOTTOM)

    def line(self, points: Sequence[Point], colour: str, dash: str = "", width: float = 2, pale: bool = False) -> None:
        """A line, which has gaps where nothing is.

        Args:
            points: in order.
            colour: class of its colour.
            dash: as SVG has it; empty for none.
            width: of the line.
            pale: one of several whose mean is drawn too.
        """
        parts, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            at = self.place(x, y)
            parts.append(f"{pen}{_f(at[0])} {_f(at[1])}")
            pen = "L"
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        kind = "line pale" if pale else "line"
        self.marks.append(
            Markup(f'<path class="{kind} {colour}" stroke-width="{width:g}"{dashes} d="{"".join(parts)}"/>')
        )

    def dot(self, x: float, y: float, colour: str, text: str, radius: float = 3.5) -> None:
        """A dot that says what it is.

        Args:
            x: where.
            y: where.
            colour: class of its colour.
            text: shown when it is pointed at.
            radius: of the dot.
        """
        at = self.place(x, y)
        shape = f'<circle class="dot {colour}" cx="{_f(at[0])}" cy="{_f(at[1])}" r="{radius:g}">'
        self.marks.append(Markup(shape) + Markup("<title>%s</title></circle>") % text)

    def cloud(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """Many dots as one path: lines of no length with round ends.

        Args:
            points: any number.
            colour: class of its colour.
            width: of a dot.
        """
        parts = (self.place(x, y) for x, y in points)
        path = "".join(f"M{_f(x)} {_f(y)}h.01" for x, y in parts)
        self.marks.append(Markup(f'<path class="cloud {colour}" stroke-width="{width:g}" d="{path}"/>'))

    def svg(self) -> Markup:
        """The chart."""
        low, high = TOP, self.height - BOTTOM
        out = [
            Markup(f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img">'),
            Markup("<title>%s</title>") % self.title,
        ]
        for y in self.y:
            at = self.place(self.x[0], y)[1]
            out.append(Markup(f'<path class="grid" d="M{LEFT} {_f(at)}H{self.width - RIGHT}"/>'))
            out.append(text_mark("tick end", LEFT - 6, at + 4, tick_text(y)))
        for x in self.x:
            at = self.place(x, self.y[0])[0]
            out.append(Markup(f'<path class="grid" d="M{_f(at)} {low}V{high}"/>'))
            out.append(text_mark("tick mid", at, high + 16, tick_text(x)))
        out.append(Markup(f'<path class="axis" d="M{LEFT} {high}H{self.width - RIGHT}"/>'))
        middle = (LEFT + self.width - RIGHT) / 2
        out.append(
            Markup(f'<text class="tick mid" x="{_f(middle)}" y="{self.height - 4}">')
            + escape(self.x_label)
            + Markup("</text>")
        )
        return Markup("").join([*out, *self.marks, Markup("</svg>")])
