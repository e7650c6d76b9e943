"""Progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spml_fast.core.text import without_controls


@contextmanager
def show_progress(total: int, description: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a plain line every ten seconds."""
    description = without_controls(description)
    if not enabled:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.0f}/s" if speed else "")

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(escape(description), total=total)
            yield lambda n: bar.advance(task, n)
        return
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = done / (now - started)
            remaining = (total - done) / rate
            print(
                f"{description}: {done:,} of {total:,}, {rate:,.0f} a second, {remaining:,.0f} s left", file=sys.stderr
            )

    yield advance
