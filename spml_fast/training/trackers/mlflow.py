"""MLflow."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.io import csv_writer
from spml_fast.runs.read import flatten
from spml_fast.training.trackers.base import PROJECT, Ended, Started, Summary, TrackedRun, Tracker, register

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Limits of a request, and of a value, in MLflow's REST interface.
_PARAMS, _METRICS, _CHARACTERS = 100, 1000, 500
_KNOWN = ("tracking_uri", "experiment", "tags")


@register("mlflow")
class MlflowTracker(Tracker):
    """A run of MLflow. Options: tracking_uri (MLflow's own default otherwise), experiment, tags."""

    package = "mlflow"
    extra = "mlflow"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        unknown = sorted(set(options) - set(_KNOWN))
        if unknown:
            raise UserError(f"run.tracker_options.mlflow has no {', '.join(unknown)}; it has {', '.join(_KNOWN)}")

    def start(self, run: TrackedRun) -> Started:
        """Begin a run of MLflow, or continue it: parameters, and the configuration as a file."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # A client of its own: mlflow's functions share one run for the whole process.
        self._client = client = MlflowClient(self.options.get("tracking_uri"))
        name = str(self.options.get("experiment", PROJECT))
        if run.known is None:
            experiment = client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment is not None else client.create_experiment(name)
            made = client.create_run(number, run_name=run.name, tags=dict(self.options.get("tags") or {}))
        else:
            client.update_run(run.known, status="RUNNING")
            made = client.get_run(run.known)
        self._id: str = made.info.run_id
        # A parameter cannot be changed; what a resumed run changes is in config.yaml.
        options = {k: str(v)[:_CHARACTERS] for k, v in flatten(dict(run.options)).items() if k not in made.data.params}
        params = [Param(key, value) for key, value in options.items()]
        for start in range(0, len(params), _PARAMS):
            client.log_batch(self._id, params=params[start : start + _PARAMS])
        client.log_text(self._id, run.text, "options.yaml")
        return Started(self._id, f"experiment {name}, run {self._id}")

    def log(self, figures: Mapping[str, float], images: int) -> None:
        """Metrics at a step, the number of samples seen."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, images) for name, value in figures.items()]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS])

    def finish(self, summary: Summary) -> None:
        """Final figures as metrics; classes, and what was predicted for the examples, as CSV files; images."""
        self.log(summary.figures, summary.images)
        if summary.rows:
            self._client.log_text(self._id, _csv([summary.columns, *summary.rows]), "test/classes.csv")
        for number, example in enumerate(summary.examples):
            self._client.log_image(self._id, example.image, artifact_file=f"examples/{number}.png")
        if summary.examples:
            lines: list[Any] = [(f"{number}.png", e.caption) for number, e in enumerate(summary.examples)]
            self._client.log_text(self._id, _csv([("image", "predictions"), *lines]), "examples/predictions.csv")

    def close(self, ended: Ended) -> None:
        """End the run with its status."""
        self._client.set_terminated(self._id, _STATUS[ended])


def _csv(rows: list[Any]) -> str:
    file = io.StringIO()
    write = csv_writer(file)
    for row in rows:
        write(["" if cell is None else cell for cell in row])
    return file.getvalue()
