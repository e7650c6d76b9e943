"""trackio: figures in a local dashboard, or in a Hugging Face Space."""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Mapping
from typing import Any

from spml_fast.training.trackers.base import PROJECT, Ended, Started, Summary, TrackedRun, Tracker, register


@register("trackio")
class TrackioTracker(Tracker):
    """A run of trackio. Options are those of `trackio.init`, such as project, space_id, private."""

    package = "trackio"
    extra = "trackio"

    def start(self, run: TrackedRun) -> Started:
        """Begin a run, or continue it; its name has a part of its own, as trackio tells runs apart by name."""
        import trackio

        given: dict[str, Any] = {"project": PROJECT, "embed": False} | self.options
        given |= {
            "name": run.known or f"{run.name}-{uuid.uuid4().hex[:6]}",
            "resume": "never" if run.known is None else "allow",
            "config": dict(run.options),
        }
        # It prints several lines.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(**given)
        # Or trackio would end the run a second time when the process does.
        trackio.context_vars.current_run.set(None)
        place = given.get("space_id") or f"trackio show --project {given['project']}"
        return Started(given["name"], str(place))

    def log(self, figures: Mapping[str, float], images: int) -> None:
        """Metrics at a step, the number of samples seen."""
        self._run.log(dict(figures), step=images)

    def finish(self, summary: Summary) -> None:
        """Final figures, classes as a table, examples as images."""
        import trackio

        shown: dict[str, Any] = {}
        if summary.rows:
            shown["test/classes"] = trackio.Table(columns=list(summary.columns), data=[list(r) for r in summary.rows])
        for number, example in enumerate(summary.examples):
            shown[f"examples/{number}"] = trackio.Image(example.image, caption=example.caption)
        self._run.log({**summary.figures, **shown}, step=summary.images)

    def close(self, ended: Ended) -> None:
        """Send what is left."""
        self._run.finish()
