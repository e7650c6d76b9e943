"""Time of average precision at evaluation size, against scikit-learn's per-class loop.

    python benchmarks/bench_evaluation.py [--json OUT] [--repeats 5] [--cases coco voc openimages]

Three made-up evaluations of published size:

    voc         5,823 x 20 logits, fully labelled (VOC 2012 validation)
    coco        40,137 x 80 logits, fully labelled (COCO 2014 validation)
    openimages  125,436 images x 9,668 classes, 2,003,748 annotated pairs (OpenImages V7 test), class sizes after
                Zipf's law; only the pairs exist, nothing of N x C is ever made

Each case first passes a gate: our AP equals scikit-learn's to 1e-12 on every class with a positive. Then both are timed
on the same data, with all classes (nothing is sampled or scaled). scikit-learn's loop is spared what it would need
besides: for the sparse case the pairs are grouped by class before its clock starts. `all metrics` is the whole of
`evaluate_scores` or `evaluate_pairs`: mAP in every convention, threshold metrics, top-3, five groups of classes; the
sparse case's group means must equal means of scikit-learn's too. `held` is what an evaluation keeps of the scores,
`extra` the most memory that `all metrics` takes beside it, `dense` what two means of all N x C would be.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.metrics import average_precision_score

from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.evaluation import average_precision, entries, metrics

TOLERANCE = 1e-12
MEMORY = ("held_bytes", "extra_bytes", "dense_bytes")


def seconds(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median, least and greatest wall time of `repeats` calls, after one call that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        model = (names[0] if names else model) + (", AVX-512" if " avx512f " in text else ", no AVX-512")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "cores": cores,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def extra_memory(function: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once beside what was there."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def loop(columns: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """scikit-learn, one call for each class; NaN without positives. Columns are (codes, scores) of known entries."""
    return np.array([average_precision_score(y, s) if y.any() else np.nan for y, s in columns])


def gate(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over classes; leaves the program when it is above 1e-12 or a class is missing."""
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        sys.exit(f"{name}: the classes with an AP differ from scikit-learn's")
    worst = float(np.nanmax(np.abs(ours - theirs)))
    if not worst <= TOLERANCE:
        sys.exit(f"{name}: AP differs from scikit-learn's by {worst:.3g}")
    return worst


def dense_data(
    num_rows: int, num_classes: int, mean_positives: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Scores float32 [N, C] and codes int8 [N, C]; positives score higher by about two standard deviations.

    Args:
        num_rows: N, images.
        num_classes: C.
        mean_positives: positive labels per image, spread over the classes after Zipf's law.
    """
    rng = np.random.default_rng(0)
    fraction = 1 / np.arange(2, num_classes + 2)
    fraction *= mean_positives / fraction.sum()
    codes = (rng.random((num_rows, num_classes)) < fraction).astype(np.int8)
    return rng.standard_normal(codes.shape, dtype=np.float32) + 2 * codes - np.float32(3), codes


@dataclass(frozen=True)
class Pairs:
    """Annotated pairs in row order, as `Scores` of spml_fast/evaluation/evaluate.py holds them.

    Attributes:
        rows: int32 [P], image of each pair.
        classes: int32 [P].
        codes: int8 [P]; two labels in three are positive.
        scores: float32 [P].
        in_top_k: bool [P].
        groups: int64 [C], five groups of classes, rarest first.
    """

    rows: npt.NDArray[np.int32]
    classes: npt.NDArray[np.int32]
    codes: npt.NDArray[np.int8]
    scores: npt.NDArray[np.float32]
    in_top_k: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.int64]


def pair_data(num_rows: int, num_classes: int, num_pairs: int) -> Pairs:
    """Distinct annotated pairs; class sizes follow Zipf's law.

    Args:
        num_rows: N, images.
        num_classes: C.
        num_pairs: P.
    """
    rng = np.random.default_rng(0)
    fraction = 1 / np.arange(1, num_classes + 1)
    # A pair drawn twice is dropped and drawn anew until there are enough distinct ones.
    keys = np.empty(0, np.int64)
    while len(keys) < num_pairs:
        lacking = num_pairs - len(keys)
        drawn = rng.integers(0, num_rows, lacking) * num_classes
        drawn += rng.choice(num_classes, lacking, p=fraction / fraction.sum())
        keys = np.unique(np.concatenate([keys, drawn]))
    rows, classes = (a.astype(np.int32) for a in np.divmod(keys, num_classes))
    codes = (rng.random(num_pairs) < 0.66).astype(np.int8)
    scores = rng.standard_normal(num_pairs, dtype=np.float32) + codes
    in_top_k = rng.random(num_pairs) < 0.2
    # Training has about thirty times the labels, so its order of the classes is a little different.
    training = rng.poisson(30 * num_pairs * fraction / fraction.sum())
    return Pairs(rows, classes, codes, scores, in_top_k, metrics.groups_by_count(training))


def dense_case(name: str, num_rows: int, num_classes: int, mean_positives: float, repeats: int) -> dict[str, Any]:
    """Fully labelled logits [N, C]; positives score higher by about two standard deviations.

    Args:
        name: of the case.
        num_rows: N, images.
        num_classes: C.
        mean_positives: positive labels per image, spread over the classes after Zipf's law.
        repeats: timed calls of each function; scikit-learn's loop is timed at most three times.

    Returns:
        The row of the table: times in seconds, memory in bytes, and the worst difference of an AP (0..1).
    """
    scores, codes = dense_data(num_rows, num_classes, mean_positives)
    columns = [(codes[:, c], scores[:, c]) for c in range(num_classes)]
    groups = np.arange(num_classes) % 5
    ours = average_precision.average_precision(scores, codes)
    row = {"case": name, "rows": num_rows, "classes": num_classes, "entries": codes.size}
    row["worst_difference"] = gate(name, ours.ap, loop(columns))
    row["sklearn_s"] = seconds(lambda: loop(columns), min(repeats, 3))
    row["ours_s"] = seconds(lambda: average_precision.average_precision(scores, codes), repeats)
    row["ours_rank_s"] = seconds(lambda: average_precision.average_precision(scores, codes, "rank"), repeats)
    row["ours_voc_s"] = seconds(lambda: average_precision.average_precision(scores, codes, "voc"), repeats)
    row["all_metrics_s"] = seconds(lambda: metrics.evaluate_scores(scores, codes, groups=groups), repeats)
    row["held_bytes"], row["dense_bytes"] = 2 * scores.nbytes, 2 * scores.nbytes
    row["extra_bytes"] = extra_memory(lambda: metrics.evaluate_scores(scores, codes, groups=groups))
    return row


def sparse_case(name: str, num_rows: int, num_classes: int, num_pairs: int, repeats: int) -> dict[str, Any]:
    """Annotated pairs in row order, as an evaluation collects them; two labels in three are positive.

    Args:
        name: of the case.
        num_rows: N, images.
        num_classes: C.
        num_pairs: distinct annotated (image, class) pairs; class sizes follow Zipf's law.
        repeats: timed calls of each function; scikit-learn's loop is timed once.

    Returns:
        As `dense_case`, with `groups`: mAP in per cent of five groups of classes, rarest first.
    """
    data = pair_data(num_rows, num_classes, num_pairs)
    rows, classes, codes, scores, in_top_k, groups = (getattr(data, f.name) for f in fields(Pairs))

    order = np.argsort(classes, kind="stable")
    bounds = np.searchsorted(classes[order], np.arange(1, num_classes))
    columns = list(zip(np.split(codes[order], bounds), np.split(scores[order], bounds), strict=True))

    def ours(definition: entries.Definition = "sklearn") -> average_precision.ClassAP:
        return average_precision.average_precision_pairs(classes, scores, codes, num_classes, definition, row=rows)

    def everything() -> dict[str, Any]:
        return metrics.evaluate_pairs(classes, scores, codes, num_classes, row=rows, in_top_k=in_top_k, groups=groups)

    result = ours()
    row = {"case": name, "rows": num_rows, "classes": num_classes, "entries": num_pairs}
    row["classes_with_positives"] = int(result.defined.sum())
    theirs = loop(columns)
    row["worst_difference"] = gate(name, result.ap, theirs)
    means = metrics.group_means(result, groups, "zero")
    row["groups"] = [100 * m for m in means.tolist()]
    gate(f"{name}, groups", means, np.array([np.nan_to_num(theirs[groups == g]).mean() for g in range(5)]))
    # One pass of the loop takes seconds, and the gate has warmed it.
    row["sklearn_s"] = seconds(lambda: loop(columns), 1)
    row["ours_s"] = seconds(ours, repeats)
    row["ours_rank_s"] = seconds(lambda: ours("rank"), repeats)
    row["ours_voc_s"] = seconds(lambda: ours("voc"), repeats)
    row["all_metrics_s"] = seconds(everything, repeats)
    # The second mean has the size of the first.
    row["held_bytes"] = 2 * scores.nbytes + rows.nbytes + classes.nbytes + codes.nbytes + 2 * in_top_k.nbytes
    row["dense_bytes"] = 2 * 4 * num_rows * num_classes
    row["extra_bytes"] = extra_memory(everything)
    return row


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "voc": lambda repeats: dense_case("voc", 5823, 20, 1.5, repeats),
    "coco": lambda repeats: dense_case("coco", 40137, 80, 2.9, repeats),
    "openimages": lambda repeats: sparse_case("openimages", 125436, 9668, 2003748, repeats),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of ours; the median is reported")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    out_file = json_output(args, "bench_evaluation")

    machine_info = machine()
    print(", ".join(f"{key} {value}" for key, value in machine_info.items()))
    print(f"{'case':12}{'entries':>11}{'scikit-learn':>14}{'ours':>10}{'ratio':>8}", end="")
    print(f"{'rank':>10}{'voc':>10}{'all metrics':>13}{'worst difference':>18}", end="")
    print(f"{'held MB':>9}{'extra MB':>10}{'dense MB':>10}   (median seconds)")
    results = []
    for name in args.cases:
        row = CASES[name](args.repeats)
        row["ratio"] = row["sklearn_s"]["median"] / row["ours_s"]["median"]
        results.append(row)
        print(f"{name:12}{row['entries']:11,}{row['sklearn_s']['median']:14.3f}", end="")
        print(f"{row['ours_s']['median']:10.4f}{row['ratio']:8.1f}", end="")
        print(f"{row['ours_rank_s']['median']:10.4f}{row['ours_voc_s']['median']:10.4f}", end="")
        print(f"{row['all_metrics_s']['median']:13.4f}{row['worst_difference']:18.1e}", end="")
        print("".join(f"{row[k] / 1e6:{w}.0f}" for k, w in zip(MEMORY, (9, 10, 10), strict=True)), flush=True)
    if out_file is not None:
        out_file.write_json({"machine": machine_info, "results": results})


if __name__ == "__main__":
    main()
