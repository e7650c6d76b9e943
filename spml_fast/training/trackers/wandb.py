"""Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from spml_fast.runs.layout import RunLayout
from spml_fast.training.trackers.base import PROJECT, Ended, Started, Summary, TrackedRun, Tracker, register

# The axis of all figures.
_AXIS = "images"


@register("wandb")
class WandbTracker(Tracker):
    """A run of W&B. Options are those of `wandb.init`, such as project, entity, tags, mode; the key is W&B's matter."""

    package = "wandb"
    extra = "wandb"

    def start(self, run: TrackedRun) -> Started:
        """Begin a run of W&B, or continue it; its files go to RUN/trackers."""
        import wandb

        # It prints several lines, and would catch what the terminal shows.
        settings = {"silent": True, "console": "off"} | dict(self.options.get("settings") or {})
        given = {"project": PROJECT, "name": run.name, "dir": str(RunLayout(run.folder).trackers)} | self.options
        given |= {"id": run.known or uuid.uuid4().hex[:12], "resume": "allow", "settings": wandb.Settings(**settings)}
        self._run = wandb.init(**given)
        # A resumed run may have changed options.
        self._run.config.update(dict(run.options), allow_val_change=True)
        self._run.define_metric("*", step_metric=_AXIS)
        place = self._run.url or f"offline; wandb sync {self._run.dir.removesuffix('/files')} sends it"
        return Started(str(self._run.id), place)

    def log(self, figures: Mapping[str, float], images: int) -> None:
        """One step of W&B; the axis is a figure, so that a resumed run may repeat a part of it."""
        self._run.log({_AXIS: images, **figures})

    def finish(self, summary: Summary) -> None:
        """Final figures into the run's summary, classes as a table, examples as images."""
        import wandb

        shown: dict[str, Any] = {}
        if summary.rows:
            shown["test/classes"] = wandb.Table(columns=list(summary.columns), data=[list(r) for r in summary.rows])
        if summary.examples:
            shown["examples"] = [wandb.Image(e.image, caption=e.caption) for e in summary.examples]
        self._run.log({_AXIS: summary.images, **summary.figures, **shown})
        self._run.summary.update(summary.figures)

    def close(self, ended: Ended) -> None:
        """Send what is left; a run that was stopped or failed is marked so."""
        self._run.finish(exit_code=0 if ended == "finished" else 1)
