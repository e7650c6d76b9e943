"""Signs of trouble in a run's figures."""

from __future__ import annotations

from spml_fast.runs.read import Run, number


def health(run: Run) -> list[str]:
    """Signs of trouble, one sentence each, computed from the run's own figures."""
    out = list(run.notes)
    done, planned = len(run.epochs), run.planned_epochs
    if run.results is None:
        out.append(f"not finished: {done} of {planned} epochs, no test figures yet")
    elif not run.alphas:
        out.append("no test figures: the data set has no test split")
    not_finite = sum(1 for loss in run.losses if loss is None)
    if not_finite:
        end = "the run has diverged" if run.losses[-1] is None else "later values are finite"
        out.append(f"the loss was not a finite number in {not_finite} of {len(run.losses)} log lines: {end}")
    if run.restarts:
        times = "once" if run.restarts == 1 else f"{run.restarts} times"
        out.append(f"interrupted and resumed: the log goes back {times} to updates that it had before")
    maps = run.validated
    if not maps and run.epochs:
        out.append("no validation figures: the weights of the last epoch were kept, not the best ones")
    elif 0 < len(maps) < 3:
        out.append("validation mAP was measured less than three times: too few to see a trend")
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
                f"validation mAP fell from {best[0]:.1f} to {last[0]:.1f} while the training loss kept falling: "
                "the model memorises wrong labels, as happens late in training with methods that take unknown "
                "labels for negatives; the best weights were kept"
            )
    wait = number(run.figures.get("data_wait"))
    if wait is not None and wait > 0.1:
        out.append(
            f"{100 * wait:.0f}% of the training time went into waiting for data: more data.threads, decoded images "
            "in memory (data.keep_decoded, without a GPU), smaller ones (`spml-fast prepare shard --short-side`) or a "
            "faster disk would help"
        )
    return out
