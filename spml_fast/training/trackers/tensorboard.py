"""TensorBoard: events in RUN/tensorboard. The figures of updates and epochs are written by DeepSpeed's monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spml_fast.core.text import markdown_safe
from spml_fast.runs.layout import RunLayout
from spml_fast.training.trackers.base import Started, Summary, TrackedRun, Tracker, register

# Rows of a table of classes that a browser still shows at once.
_MOST_ROWS = 1000


@register("tensorboard")
class TensorBoardTracker(Tracker):
    """Texts, final figures and pictures beside what DeepSpeed writes; `deepspeed.tensorboard` false turns both off."""

    def start(self, run: TrackedRun) -> Started:
        """Write the configuration."""
        self._folder: Path = RunLayout(run.folder).tensorboard
        with self._writer() as writer:
            # An indented block shows what is in it as it is.
            writer.add_text("config", "".join(f"    {line}\n" for line in run.text.splitlines()))
        return Started()

    def finish(self, summary: Summary) -> None:
        """Write final figures, the table of classes and the examples."""
        with self._writer() as writer:
            for name, value in summary.figures.items():
                writer.add_scalar(name, value, summary.images)
            if summary.rows:
                writer.add_text("test/classes", _table(summary), summary.images)
            for number, example in enumerate(summary.examples):
                writer.add_image(f"examples/{number}", example.image, summary.images, dataformats="HWC")
                writer.add_text(f"examples/{number}", markdown_safe(example.caption), summary.images)

    def _writer(self) -> Any:
        """A file of its own, since DeepSpeed's is open as long as its engine."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder))


def _table(summary: Summary) -> str:
    """The table of classes in Markdown."""
    lines = [f"| {' | '.join(summary.columns)} |", f"|{'---|' * len(summary.columns)}"]
    for row in summary.rows[:_MOST_ROWS]:
        cells = ("" if c is None else f"{c:.2f}" if isinstance(c, float) else markdown_safe(str(c)) for c in row)
        lines.append(f"| {' | '.join(cells)} |")
    if len(summary.rows) > _MOST_ROWS:
        lines += ["", f"The first {_MOST_ROWS} of {len(summary.rows)} classes."]
    return "\n".join(lines)
