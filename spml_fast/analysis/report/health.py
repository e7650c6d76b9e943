"""What looks unhealthy about a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from spml_fast.runs.read import Run, number


def health(run: Run) -> list[str]:
    """What deserves a look, in sentences; computed from the run's own figures."""
    out = list(run.notes)
    done, planned = len(run.epochs), run.planned_epochs
    if run.results is None:
        out.append(f"not finished: {done} of {planned} epochs are there, and no test figures")
    elif not run.alphas:
        out.append("there are no test figures: the data set had no test split")
    lost = sum(1 for loss in run.losses if loss is None)
    if lost:
        end = "the run has diverged" if run.losses[-1] is None else "it went on with finite ones"
        out.append(f"the loss was not a finite number in {lost} of {len(run.losses)} log lines: {end}")
    if run.restarts:
        times = "once" if run.restarts == 1 else f"{run.restarts} times"
        out.append(f"it was interrupted and went on: the log goes back {times} to updates that it had before")
    maps = run.validated
    if not maps and run.epochs:
        out.append("there are no validation figures: the weights of the last epoch were kept, not the best ones")
    elif 0 < len(maps) < 3:
        out.append("validation mAP was measured less than three times: too few to say how it moves")
    elif maps:
        best, last = max(maps, key=lambda m: m[0]), maps[-1]
        if best is last and last[0] - maps[-3][0] > 1:
            out.append(
                f"validation mAP was still rising at the end ({maps[-3][0]:.1f} to {last[0]:.1f} in the last epochs): "
                "more epochs, or a higher learning rate, may give more"
            )
        falls = best[1] is not None and last[1] is not None and last[1] < best[1]
        if best[0] - last[0] > 1 and falls:
            out.append(
                f"validation mAP fell from {best[0]:.1f} to {last[0]:.1f} while the training loss went on falling: "
                "it learns labels that are wrong, as methods do late in training that take unknown labels for "
                "negatives; the best weights are kept all the same"
            )
    wait = number(run.figures.get("data_wait"))
    if wait is not None and wait > 0.1:
        out.append(
            f"{100 * wait:.0f}% of the training time went into waiting for data: more data.threads, smaller images "
            "(prepare.py shard --short-side) or a faster disk would help"
        )
    return out
