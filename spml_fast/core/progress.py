"""How far the work is: a bar on a terminal, elsewhere a line now and then.

Everything that takes long is a `Task` while it is under way, one within another where it has parts of its own. Both
ways show the same fields, the most important first:

    name | how much is done | time left | notes of the task, such as its speed

A terminal that is too narrow for all of them goes without the last ones; the bar comes after the first three, and is
left out before them. All of it goes to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from spml_fast.core.text import without_controls

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

T = TypeVar("T")

# Where there is no terminal: seconds of a task before its first line at least, and of silence before a line.
FIRST, EVERY = 10.0, 30.0
# Where there is no terminal and no step ends (a network is compiled, say): seconds of silence before the line comes
# again as it is, and between two looks.
STALLED, LOOK = 60.0, 1.0
# Seconds between two pictures of a bar.
REFRESH = 0.25
# Columns of a bar, and fields that are shown before it takes any.
SHORTEST_BAR, LONGEST_BAR, BEFORE_BAR = 8, 40, 3
BETWEEN = " | "
# A shorter time tells nothing about the rest.
_TELLING = 2.0


@dataclass(eq=False)
class Task:
    """What is under way.

    Attributes:
        name: what it is; may change on the way.
        total: how much there is to do; 0 where nobody knows.
        unit: what is counted, in the plural; an empty one is shown in per cent.
        done: how much is done.
        notes: what else to show, the most important first; None for the speed.
        left: seconds to the end, where the task knows better than its speed so far.
    """

    name: str
    total: int
    unit: str = "images"
    done: int = 0
    notes: Sequence[str] | None = None
    left: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    # (when, how much was done) at the first step, which often takes longest and tells nothing about the others.
    first: tuple[float, int] | None = None

    def advance(self, number: int) -> None:
        """So much more is done."""
        self.done += number
        if self.first is None:
            self.first = time.monotonic(), self.done
        if _display.due(self):
            _display.show(self)

    @property
    def due(self) -> bool:
        """Whether anybody would see what is changed now."""
        return _display.due(self)

    def change(self, name: str, done: int, notes: Sequence[str], left: float | None) -> None:
        """Show where the task stands.

        Args:
            name: what is under way.
            done: how much is done.
            notes: what else to show, the most important first.
            left: seconds to the end; None where nothing tells yet.
        """
        self.name, self.done, self.notes, self.left = name, done, notes, left
        if _display.due(self):
            _display.show(self)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """How much is done, 0..1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def fields(self, of: str) -> list[str]:
        """Everything but the name, the most important first.

        Args:
            of: between how much is done and the whole.
        """
        since, done = self.first or (time.monotonic(), self.done)
        seconds = time.monotonic() - since
        rate = (self.done - done) / seconds if seconds >= _TELLING else 0.0
        if not self.unit:
            count = f"{self.fraction:.0%} done"
        else:
            count = f"{self.done:,}" + (f"{of}{self.total:,}" if self.total else "") + f" {self.unit}"
        left = self.left
        if left is None and self.notes is None and self.total and rate:
            left = max(self.total - self.done, 0) / rate
        if self.total and self.done >= self.total:
            left = None
        notes = self.notes
        if notes is None:
            notes = [f"{speed(rate)} {self.unit}/s"] if rate else []
        return [count, *([] if left is None else [f"{duration(left)} left"]), *notes]

    def line(self) -> str:
        """All of it, for a file."""
        return BETWEEN.join([self.name, *self.fields(of=" of ")])


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `7 min`, `2.5 h`, `3.1 days`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def speed(rate: float) -> str:
    """A speed with as many digits as anybody reads: `0.35`, `7.2`, `1,234`."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def fitting(fields: Sequence[str], width: int) -> list[str]:
    """The first of the fields, as many as stand beside each other in `width` columns; the first one always."""
    from rich.cells import cell_len

    shown, used = list(fields[:1]), cell_len(fields[0]) if fields else 0
    for one in fields[1:]:
        used += len(BETWEEN) + cell_len(one)
        if used > width:
            break
        shown.append(one)
    return shown


def bar_line(task: Task, width: int, plain: bool = False) -> Text:
    """A task on a terminal, in one line.

    Args:
        task: what is shown.
        width: columns of the terminal.
        plain: in ASCII alone.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    name = without_controls(task.name)
    if cell_len(name) > width:
        dots = "..." if plain else "\u2026"
        return Text(set_cell_size(name, max(width - len(dots), 0)) + dots, no_wrap=True, overflow="crop")
    fields = [without_controls(one) for one in task.fields(of="/")]
    shown = fitting([name, *fields], width - SHORTEST_BAR - 2)
    with_bar = task.total > 0 and len(shown) >= min(1 + BEFORE_BAR, 1 + len(fields))
    if not with_bar:
        return Text(BETWEEN.join(fitting([name, *fields], width)), no_wrap=True, overflow="crop")
    rest = BETWEEN.join(shown[1:])
    size = min(LONGEST_BAR, width - cell_len(name) - cell_len(rest) - 2)
    full = round(size * task.fraction)
    line = Text(f"{name} ", no_wrap=True, overflow="crop")
    line.append(("#" if plain else "\u2501") * full, "cyan")
    line.append(("." if plain else "\u2500") * (size - full), "dim")
    return line.append(f" {rest}")


class Display:
    """What this process shows of its tasks, the outer ones first.

    Args:
        beats: where there is no bar, a thread repeats the line of a step that takes long.
    """

    def __init__(self, beats: bool = False) -> None:
        self.beats = beats
        self.over = threading.Event()
        self.tasks: list[Task] = []
        self.live: Live | None = None
        # When anything was printed last, or the bar was changed; and when the last task ended.
        self.last = self.ended = float("-inf")

    def begin(self, task: Task) -> None:
        """A task starts."""
        if not self.tasks:
            self.live = self._bars()
            now = time.monotonic()
            # Short tasks one after the other are silent together; what comes later begins with no line.
            if now - self.ended >= FIRST:
                self.last = max(self.last, now - (EVERY - FIRST))
        self.tasks.append(task)
        if len(self.tasks) > 1:
            return
        if self.live is not None:
            self.live.start(refresh=True)
        elif self.beats:
            self.over = threading.Event()
            threading.Thread(target=self._beat, args=(self.over,), daemon=True).start()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(LOOK):
            tasks = tuple(self.tasks)
            if tasks and time.monotonic() - self.last >= STALLED:
                self.show(tasks[-1])

    def end(self, task: Task) -> None:
        """A task is over; nothing stays of its bar."""
        self.tasks.remove(task)
        self.ended = time.monotonic()
        if self.tasks:
            return
        self.over.set()
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()

    def due(self, task: Task) -> bool:
        """Whether it is time to show more of a task; cheap, for it is asked at every step."""
        if task not in self.tasks:
            return False
        passed = time.monotonic() - self.last
        return passed >= (EVERY if self.live is None else REFRESH)

    def show(self, task: Task) -> None:
        """Print the line; a bar is drawn anew by itself."""
        self.last = time.monotonic()
        if self.live is None:
            print(without_controls(task.line()), file=sys.stderr, flush=True)

    def _bars(self) -> Live | None:
        """What draws the bars; None where standard error is no terminal, or one that cannot move its cursor."""
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.live import Live

        # The stream itself: a library's output may be kept from the screen for a while.
        console = Console(file=sys.stderr, highlight=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return None
        # Rich takes standard output too, to print it above the bar: only where that is the same screen.
        return Live(
            get_renderable=lambda: self.picture(console),
            console=console,
            transient=True,
            refresh_per_second=1 / REFRESH,
            redirect_stdout=sys.stdout.isatty(),
        )

    def picture(self, console: Console) -> Group:
        """A line for each task."""
        from rich.console import Group

        # The last column stays empty: some terminals go to the next line there.
        width, plain = console.width - 1, console.options.ascii_only
        return Group(*(bar_line(task, width, plain) for task in tuple(self.tasks)))

    def say(self, text: str, whole: bool) -> None:
        """As the function."""
        self.last = time.monotonic()
        if not sys.stdout.isatty():
            print(text, flush=True)
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False) if self.live is None else self.live.console
        if not whole:
            # A word that is longer than the line stays one word, which people can select.
            text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
        console.print(Text(text), soft_wrap=True)


_display = Display(beats=True)


def say(text: str, whole: bool = False) -> None:
    """A line on standard output, above the bar where there is one; a terminal gets it in lines of whole words.

    Args:
        text: without its end of line.
        whole: leave it in one line, for what people copy.
    """
    _display.say(without_controls(text), whole)


def say_fields(fields: Sequence[str]) -> None:
    """A line on standard output of fields, the most important first; all of them but on a narrow terminal."""
    if sys.stdout.isatty():
        from rich.console import Console

        fields = fitting(fields, Console().width)
    say(BETWEEN.join(fields))


@contextlib.contextmanager
def under_way(task: Task, enabled: bool = True) -> Iterator[Task]:
    """Inside, a task is shown; not at all where it is not `enabled`, such as on ranks other than 0."""
    if not enabled:
        yield task
        return
    _display.begin(task)
    try:
        yield task
    finally:
        _display.end(task)


@contextlib.contextmanager
def show_progress(total: int, name: str, enabled: bool = True, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Inside, something is shown to be under way; gives what to call with how much more is done.

    Args:
        total: how much there is to do.
        name: what it is.
        enabled: show it; rank 0 does.
        unit: what is counted, in the plural.
    """
    with under_way(Task(name, total, unit), enabled) as task:
        yield task.advance


@contextlib.contextmanager
def watched(
    items: Iterable[T],
    name: str,
    unit: str = "images",
    enabled: bool = True,
    total: int | None = None,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[Iterator[T]]:
    """Inside, the items as they are given, while it is shown how much of them is done.

    Args:
        items: things to do.
        name: what is done.
        unit: what is counted, in the plural.
        enabled: show it; rank 0 does.
        total: how much there is to do; None for the number of the items, where they have one.
        size: how much an item is.
    """

    def counted(advance: Callable[[int], None]) -> Iterator[T]:
        for item in items:
            yield item
            advance(size(item))

    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with show_progress(total, name, enabled, unit) as advance:
        yield counted(advance)
