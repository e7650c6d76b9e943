"""Run directories for tests and benchmarks of the report: what a run leaves, without any training."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.cli.parse import parse_config
from spml_fast.data.labels import UNKNOWN, SparseLabels
from spml_fast.evaluation.average_precision import average_precision, average_precision_pairs
from spml_fast.evaluation.class_record import class_record
from spml_fast.evaluation.decisions import DecisionOptions, choose_decisions
from spml_fast.evaluation.evaluate import Scores, known_entries
from spml_fast.runs.evaluation_record import write_evaluation
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.recipe import to_yaml

NAMES = ["cat", "<script>alert(1)</script>", "never there", "$x^2$ & Straße"]


def make_run(
    folder: Path,
    *options: str,
    names: list[str] = NAMES,
    maps: list[float] | None = None,
    losses: list[float | None] | None = None,
    aps: list[float | None] | None = None,
    finished: bool = True,
    epoch: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """A run directory as training leaves it, of a version that kept no record of its evaluation.

    Args:
        folder: to make.
        options: those of the command line.
        names: of the classes.
        maps: validation mAP of every epoch.
        losses: of every epoch.
        aps: of every class.
        finished: whether there are test figures.
        epoch: what else the epoch lines have.
        results: what else the test figures have.
    """
    folder.mkdir(parents=True)
    maps = [50.0, 62.0, 62.4, 62.5] if maps is None else maps
    losses = [1.0 / (i + 1) for i in range(len(maps))] if losses is None else losses
    config = parse_config(["--run.dir", str(folder), "--train.epochs", "4", *options])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    lines = [
        {"kind": "epoch", "phase": "finetune", "epoch": i, "loss": loss, "val_map": value, "lr": 0.1, "seconds": 3.0}
        | (epoch or {})
        for i, (value, loss) in enumerate(zip(maps, losses, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if finished:
        aps = [90.0, 80.0, None, 10.0] if aps is None else aps
        known = [a for a in aps if a is not None]
        metrics: dict[str, Any] = {"map": statistics.mean(known), "OF1": 50.0, "CF1": 40.0, "per_class_ap": aps}
        metrics |= dict.fromkeys(
            ("map_zero", "map_skip_unlabelled", "map_skipping", "map_skip_one_sided"), metrics["map"]
        )
        figures: dict[str, Any] = {
            "best_epoch": 4,
            "best_val_map": max(maps),
            "images_per_second": 100.0,
            "data_wait": 0.02,
        }
        figures |= {
            "train_seconds": 30.0,
            "alpha": {"1": metrics, "5": metrics | {"map": metrics["map"] + 1}},
        } | results
        (folder / "results.json").write_text(json.dumps(figures), encoding="utf-8")
    return folder


def make_scores(images: int, classes: int, seed: int = 0, known: float = 1.0) -> tuple[Scores, SparseLabels]:
    """Scores that know something of the labels, the last class of which has no positive.

    Args:
        images: of the split.
        classes: C.
        seed: of both.
        known: fraction of labels that are known; below 1 scores are of the known pairs alone.
    """
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(0.02, 0.4, classes)
    truth = rng.random((images, classes)) < frequency
    truth[:, -1] = False
    codes = np.where(rng.random(truth.shape) < known, truth, UNKNOWN).astype(np.int8)
    logits = (rng.normal(-1.5, 1.2, truth.shape) + 2.6 * truth).astype(np.float32)
    if known == 1:
        return Scores(logits, logits, np.arange(images)), SparseLabels.from_dense(codes, default=0)
    row, column = np.nonzero(codes != UNKNOWN)
    pairs = logits[row, column]
    scores = Scores(
        pairs, pairs, row.astype(np.int32), column.astype(np.int32), codes[row, column], {5.0: np.ones(len(row), bool)}
    )
    return scores, SparseLabels.from_dense(codes)


def add_record(
    folder: Path,
    names: Sequence[str],
    scores: Scores,
    labels: SparseLabels,
    alpha: float = 5.0,
    paths: Sequence[str] | None = None,
    decided: bool = True,
) -> dict[str, Any]:
    """Give a run the files that its end writes: weights, decisions, the record of its evaluation; returns the record.

    Args:
        folder: of the run.
        names: of the classes.
        scores: of the test split.
        labels: of the test split.
        alpha: of the record.
        paths: of the images; numbers unless given.
        decided: whether the run has thresholds.
    """
    layout = RunLayout(folder)
    layout.weights.write_bytes(b"weights " + folder.name.encode())
    decisions = None
    if decided:
        entries = known_entries(scores, labels, alpha, names)
        decisions, figures = choose_decisions(entries, alpha, DecisionOptions(calibration="temperature"), list(names))
        weights = {"size": layout.weights.stat().st_size, "crc32": _crc(layout.weights)}
        about = {"format": 1, "version": "0", "split": "val", "images": len(labels), "alpha": alpha}
        options = {"thresholds": "f1", "precision": None, "calibration": "temperature", "min_labels": 10}
        layout.decisions.write_text(json.dumps(about | {"options": options, "weights": weights} | figures))
    record = class_record(scores, labels, alpha, 0.5, names, decisions)
    for name in ("false_positives", "misses"):
        record[name] = [[sample, paths[sample] if paths else f"{sample}.jpg", *rest] for sample, *rest in record[name]]
    write_evaluation(layout, {"split": "test", "images": len(labels)} | record)
    return record


def _crc(path: Path) -> str:
    from spml_fast.core.io import file_record

    return file_record(path).crc32


def make_recorded_run(
    folder: Path, *options: str, names: Sequence[str], images: int = 300, seed: int = 0, known: float = 1.0
) -> Path:
    """A run of this version: with curves, thresholds, confusions and mistakes of made-up scores.

    Args:
        folder: to make.
        options: those of the command line.
        names: of the classes.
        images: of the test split.
        seed: of the scores and of the run.
        known: as in `make_scores`.
    """
    scores, labels = make_scores(images, len(names), seed, known)
    codes = labels.rows(np.arange(len(labels)))
    if scores.class_id is None:
        ap = average_precision(scores.mean, codes).ap
    else:
        dense = np.zeros(codes.shape, np.float32)
        dense[scores.index, scores.class_id] = scores.mean
        ap = average_precision(dense, codes).ap
    aps = [None if np.isnan(value) else 100 * float(value) for value in ap]
    chosen = ("--run.seed", str(seed), "--model.alpha_eval", "5", *options)
    epoch = {"images_per_second": 100.0 + seed, "data_wait": 0.05, "validation_seconds": 0.5, "saving_seconds": 0.2}
    epoch |= {"selected_count": 120, "selected_true_count": 80, "hidden_positive_count": 400}
    epoch |= {"selection_precision": 80 / 120, "selection_recall": 0.2}
    seconds = {"thresholds_seconds": 0.3, "test_seconds": 1.1, "saving_seconds": 0.4}
    make_run(folder, *chosen, names=list(names), aps=aps, epoch=epoch, seconds=seconds)
    add_record(folder, names, scores, labels)
    return folder


def make_large_run(folder: Path, *options: str, classes: int, seed: int = 0, known: int = 20) -> float:
    """A run of a large vocabulary, partly annotated; returns the seconds that its record took.

    Args:
        folder: to make.
        options: those of the command line.
        classes: C.
        seed: of the scores.
        known: labels of each class, about.
    """
    rng = np.random.default_rng(seed)
    images = max(200, classes // 2)
    key = np.unique(rng.integers(0, images * classes, known * classes))
    row, column = (key // classes).astype(np.int32), (key % classes).astype(np.int32)
    code = (rng.random(len(key)) < 0.5).astype(np.int8)
    logits = (rng.normal(size=len(key)) + 1.5 * code).astype(np.float32)
    scores = Scores(logits, logits, row, column, code)
    start = np.searchsorted(row, np.arange(images + 1)).astype(np.int64)
    labels = SparseLabels(start, column.astype(np.int16), code, classes, UNKNOWN)
    names = [f"class {i}" for i in range(classes)]
    ap = average_precision_pairs(column, logits, code, classes).ap
    aps = [None if np.isnan(value) else 100 * float(value) for value in ap]
    make_run(folder, "--model.alpha_eval", "5", *options, names=names, aps=aps)
    before = time.perf_counter()
    class_record(scores, labels, 5.0, 0.5, names)
    seconds = time.perf_counter() - before
    add_record(folder, names, scores, labels)
    return seconds
