"""The lines and tables that a run prints."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.precision import autocast_dtype
from spml_fast.core.progress import speed
from spml_fast.core.text import counted, without_controls
from spml_fast.models.classifier import Classifier
from spml_fast.training.checkpoint import CheckpointPosition
from spml_fast.training.logs import Meter, memory_gib
from spml_fast.training.setup import Phase, RunData


def opening_line(config: Config, data: RunData, classifier: Classifier, device: torch.device, run_dir: Path) -> str:
    """What is trained on what, in one line.

    Args:
        config: the run's.
        data: the run's.
        classifier: its parameters are counted.
        device: of this rank.
        run_dir: the run directory.
    """
    model = config.model
    precision = "bf16" if autocast_dtype(config.train.precision, device) else "fp32"
    size = sum(p.numel() for p in classifier.parameters()) / 1e6
    return (
        f"{data.manifest.name}: {len(data.train)} training images, {data.manifest.num_classes} classes | "
        f"{config.method.name}, alpha {model.alpha_train:g} in training, {model.alpha_eval:g} in evaluation | "
        f"{model.backbone} ({size:.1f} M), {config.data.image_size} px | "
        f"{distributed.world_size()} x {device.type} ({precision}) | {run_dir}"
    )


def epoch_name(phase: Phase, epoch: int) -> str:
    """An epoch among those of its phase: `epoch 1/12`, `linear epoch 1/4`."""
    return f"{'linear ' if phase.name == 'linear' else ''}epoch {epoch}/{phase.epochs}"


def resume_line(phase: Phase, position: CheckpointPosition, update: int, folder: Path) -> str:
    """Where a run is resumed.

    Args:
        phase: that of the checkpoint.
        position: the checkpoint's.
        update: updates of the epoch that are done, as they are counted now.
        folder: the checkpoint directory.
    """
    source = f"(from {folder / position.tag})"
    kind = "linear epoch" if phase.name == "linear" else "epoch"
    if position.epoch >= phase.epochs:
        return f"resuming after {kind} {position.epoch}, the last {source}"
    place = f", update {update + 1}" if position.update else ""
    return f"resuming at {kind} {position.epoch + 1}{place} {source}"


def place_name(phase: Phase, position: CheckpointPosition) -> str:
    """Where in training a checkpoint was saved: `epoch 2/10, update 9`, or `epoch 2/10` at its end."""
    if not position.update:
        return epoch_name(phase, position.epoch)
    return f"{epoch_name(phase, position.epoch + 1)}, update {position.update}"


def live_notes(loss: float | None, best: float, meter: Meter, device: torch.device) -> list[str]:
    """What is shown of an epoch that is under way, the most important first; none of it waits for the device.

    Args:
        loss: the last that was read; None before the first.
        best: highest validation mAP; -inf before the first.
        meter: that of the epoch.
        device: whose memory is shown.
    """
    return [
        *([] if loss is None else [f"loss {loss:.4f}"]),
        *([f"best val mAP {best:.2f}"] if math.isfinite(best) else []),
        f"{speed(meter.rate)} images/s",
        f"data wait {meter.wait_fraction:.0%}",
        f"{memory_gib(device):.1f} GiB",
    ]


def epoch_fields(name: str, figures: dict[str, Any], score: float | None, corrects_labels: bool) -> list[str]:
    """What the line of a finished epoch holds, the most important first.

    Args:
        name: from `epoch_name`.
        figures: those of the epoch's line in metrics.jsonl.
        score: validation mAP in percent; None where there was no validation.
        corrects_labels: of the method, what it does with the labels that it selects.
    """
    selection = selection_text(figures, corrects_labels)
    return [
        name,
        f"loss {figures['loss']:.4f}",
        *([] if score is None else [f"val mAP {score:.2f}"]),
        f"{speed(figures['images_per_second'])} images/s",
        f"data wait {figures['data_wait']:.0%}",
        f"{figures['memory_gib']:.1f} GiB",
        f"{figures['seconds']:.1f} s",
        *([selection] if selection else []),
    ]


def selection_text(figures: dict[str, Any], corrects_labels: bool) -> str:
    """How many labels a method rejected or corrected and how right it was; empty without ground truth or selection."""
    if "selection_precision" not in figures or not figures["selected_count"]:
        return ""
    done = "corrected" if corrects_labels else "rejected"
    return (
        f"{figures['selected_count']:.0f} labels {done} ({figures['selection_precision']:.0%} of them hidden "
        f"positives, {figures['selection_recall']:.0%} of all found)"
    )


def alpha_name(alpha: str) -> str:
    """An evaluation's BoostLU factor in words: `plain`, `BoostLU x5`."""
    return "plain" if float(alpha) == 1 else f"BoostLU x{alpha}"


def map_text(map_percent: float) -> str:
    """A mAP as the tables show it."""
    return f"{map_percent:.2f}" if math.isfinite(map_percent) else "not defined (no positive among the known labels)"


def closing_rows(results: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """The rows of the closing table, from what results.json holds."""
    rows = [
        (f"{results['split']} mAP, {alpha_name(alpha)}", map_text(metrics["map"]))
        for alpha, metrics in results.get("alpha", {}).items()
    ]
    for alpha, metrics in results.get("alpha", {}).items():
        if "groups" in metrics:
            maps = ("-" if group["map"] is None else f"{group['map']:.2f}" for group in metrics["groups"])
            rows.append((f"groups of classes, rarest first, {alpha_name(alpha)}", " / ".join(maps)))
    if results["best_val_map"] is not None:
        epoch = f"{'linear ' if results.get('best_phase') == 'linear' else ''}epoch {results['best_epoch']}"
        rows.append(("best validation mAP", f"{map_text(results['best_val_map'])} ({epoch})"))
    return [
        *rows,
        ("training speed", f"{speed(results['images_per_second'])} images/s over {counted(results['ranks'], 'rank')}"),
        ("waiting for data", f"{results['data_wait']:.1%} of the training time"),
        ("training time", f"{results['train_seconds']:.0f} s"),
        ("run directory", os.fspath(run_dir)),
    ]


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A table of two columns on rank 0."""
    if not distributed.is_main():
        return
    table = Table(title=_text(title), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="left", overflow="fold")
    for name, value in rows:
        table.add_row(*map(_text, (name, value)))
    _print(table)


def print_columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on rank 0 whose first column is text and whose others are numbers."""
    if not distributed.is_main():
        return
    table = Table(title=_text(title), title_justify="left")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    _print(table)


def _text(cell: str) -> Text:
    """Names of classes, splits and folders are neither markup nor commands to the terminal."""
    return Text(without_controls(cell))


def _print(table: Table) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
