"""Charts as SVG within the page: sharp, small, in the page's colours, readable without a program.

Colours are classes of the page's style, so that a chart has those of the reader's mode. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 36
# A point, or None where there is nothing.
Point = tuple[float, float | None]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, at most about `most`, that cover low to high."""
    if not high > low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


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


def text_mark(kind: str, x: float, y: float, text: str) -> Markup:
    """A text in a chart.

    Args:
        kind: its classes.
        x: where it begins, ends or has its middle, by its classes.
        y: of its base line.
        text: anything.
    """
    return Markup(f'<text class="{kind}" x="{_f(x)}" y="{_f(y)}">') + escape(text) + Markup("</text>")


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
