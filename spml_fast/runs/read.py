"""Reads what a run left (config.yaml, metrics.jsonl, results.json, classes.txt), whole or damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spml_fast.core.config import SECTIONS
from spml_fast.core.errors import UserError
from spml_fast.methods import get_method


@dataclass
class Run:
    """What a run left.

    Attributes:
        folder: the run directory.
        options: resolved configuration, `section.key` -> value; sections within sections go on with dots. What an
            older version's file lacks has its default, as in every command that loads a run.
        epochs: epoch lines of metrics.jsonl in order; of an epoch that was repeated the last one.
        losses: loss of every line of metrics.jsonl that has one, None where it was not finite.
        results: results.json, or None.
        engine: deepspeed.json; empty where there is none.
        classes: class names, or None.
        restarts: how often the log goes back to updates or epochs that it had before.
        notes: what is missing or damaged, in sentences.
    """

    folder: Path
    options: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    results: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    restarts: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def alphas(self) -> dict[str, dict[str, Any]]:
        """Test metrics by alpha; empty where there are none."""
        return dict((self.results or {}).get("alpha") or {})

    @property
    def planned_epochs(self) -> int:
        """Epochs of all phases."""
        return int(self.options.get("train.epochs") or 0) + int(self.options.get("train.linear_epochs") or 0)

    @property
    def validated(self) -> list[tuple[float, float | None]]:
        """(validation mAP, training loss) of the epochs of the last phase that were validated."""
        last = [e for e in self.epochs if e.get("phase") == self.epochs[-1].get("phase")]
        found = [(number(e.get("val_map")), number(e.get("loss"))) for e in last]
        return [(score, loss) for score, loss in found if score is not None]

    @property
    def figures(self) -> dict[str, Any]:
        """Speed, waiting, time and the best validation mAP: of results.json, or of the epochs of an unfinished run."""
        spans = [(number(e.get("seconds")) or 0.0, e) for e in self.epochs]
        total = sum(seconds for seconds, _ in spans)
        out: dict[str, Any] = {}
        if total:
            out["train_seconds"] = total
            for name in ("images_per_second", "data_wait"):
                known = [(seconds, value) for seconds, e in spans if (value := number(e.get(name))) is not None]
                if sum(seconds for seconds, _ in known):
                    out[name] = sum(s * v for s, v in known) / sum(s for s, _ in known)
        memory = [v for e in self.epochs if (v := number(e.get("memory_gib"))) is not None]
        out |= {"memory_gib": max(memory)} if memory else {}
        out |= {"best_val_map": max(score for score, _ in self.validated)} if self.validated else {}
        return out | (self.results or {})

    @property
    def headline(self) -> str | None:
        """The alpha whose figures stand for the run: model.alpha_eval where it was measured, else the first."""
        wanted = f"{float(self.options.get('model.alpha_eval') or 1):g}"
        return wanted if wanted in self.alphas else next(iter(self.alphas), None)


def number(value: Any) -> float | None:
    """A finite number as it is, and None for everything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots; empty ones are left out."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_run(folder: Path) -> Run:
    """Everything that is there of a run.

    Raises:
        UserError: the folder is no run directory, or its config.yaml cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run directory (no config.yaml in it)")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration; is {folder} a run directory?")
    options = flatten(config)
    run = Run(folder, _defaults(options.get("method.name")) | options)
    run.results = _read_json(run, "results.json", "there are no test figures")
    if run.results is not None and not _whole(run.results):
        run.notes.append("results.json does not hold what a run writes there; there are no test figures")
        run.results = None
    run.engine = _read_json(run, "deepspeed.json", "the precision is shown as it was asked for") or {}
    _read_metrics(run)
    names = _read_text(run, "classes.txt", "classes are shown by number")
    run.classes = None if names is None else names.split("\n")[:-1]
    return run


def _defaults(method: Any) -> dict[str, Any]:
    """Every option at its default; those of a method that is not known here are left out."""
    sections: dict[str, Any] = {name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()}
    try:
        sections["method"] = dataclasses.asdict(get_method(str(method)).Options(name=str(method)))
    except UserError:
        # The page shows the options that the run's own file has.
        sections["method"] = {}
    return flatten(sections)


def _read_text(run: Run, name: str, lost: str) -> str | None:
    """A file of the run; where it is missing or cannot be read, None and a note that says what is `lost`."""
    try:
        return (run.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.notes.append(f"there is no {name}; {lost}")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}); {lost}")
    return None


def _read_json(run: Run, name: str, lost: str) -> dict[str, Any] | None:
    """A file of the run that holds a dictionary; None where it is missing, and with a note where it is damaged."""
    if not (run.folder / name).exists() or (text := _read_text(run, name, lost)) is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        run.notes.append(f"{name} is damaged ({error}); {lost}")
        return None
    if not isinstance(found, dict):
        run.notes.append(f"{name} is damaged (it holds no dictionary); {lost}")
        return None
    return found


def _whole(results: dict[str, Any]) -> bool:
    """Whether the test figures have the shape that a run gives them."""
    alphas = results.get("alpha", {})
    try:
        return all(float(alpha) > 0 and isinstance(metrics, dict) for alpha, metrics in alphas.items())
    except (AttributeError, ValueError):
        return False


def _read_metrics(run: Run) -> None:
    text = _read_text(run, "metrics.jsonl", "there are no curves")
    if text is None:
        return
    epochs: dict[tuple[Any, Any], dict[str, Any]] = {}
    reached: dict[Any, tuple[float, float]] = {}
    for place, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            kind, phase = entry["kind"], entry.get("phase")
            if kind in ("update", "epoch"):
                # The line of an epoch comes after those of all its updates.
                at = (float(entry["epoch"]), float(entry["update"]) if kind == "update" else math.inf)
                run.restarts += phase in reached and at <= reached[phase]
                reached[phase] = at
        except (ValueError, KeyError, TypeError, AttributeError):
            run.notes.append(f"line {place} of metrics.jsonl is damaged and left out")
            continue
        if "loss" in entry:
            run.losses.append(number(entry["loss"]))
        if kind == "epoch":
            epochs[phase, entry["epoch"]] = entry
    run.epochs = list(epochs.values())


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run's metrics.jsonl; the last one of an epoch that was repeated after an interruption.

    Raises:
        UserError: a line is damaged.
    """
    path = run / "metrics.jsonl"
    epochs: dict[tuple[Any, Any], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["kind"] == "epoch":
                epochs[entry.get("phase"), entry["epoch"]] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is damaged; delete that line") from error
    return list(epochs.values())
