"""Reads what a run left (config.yaml, metrics.jsonl, results.json, classes.txt), whole or damaged."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spml_fast.core.config import SECTIONS
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, read_text
from spml_fast.core.text import parse_json
from spml_fast.methods import get_method
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.recipe import read_recipe

T = TypeVar("T")


@dataclass
class Run:
    """What a run left.

    Attributes:
        folder: the run directory.
        options: resolved configuration, `section.key` -> value; sections within sections are joined by dots. What an
            older version's file lacks has its default, as in every command that loads a run.
        epochs: epoch lines of metrics.jsonl in order; of an epoch that was repeated the last one.
        losses: loss of every line of metrics.jsonl that has one, None where it was not finite.
        results: results.json, or None.
        engine: deepspeed.json; empty where there is none.
        classes: class names, or None.
        restarts: how often the log goes back to updates or epochs that it had before.
        notes: what is missing or damaged, in sentences.
        name: what a report calls it.
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
    name: str = ""

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
        figures = [(number(e.get("val_map")), number(e.get("loss"))) for e in last]
        return [(score, loss) for score, loss in figures if score is not None]

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
    # A whole number of 400 digits is no float, and NaN is within no limits.
    within = isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max
    return value if within else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots; empty ones are left out."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_classes(path: Path, errors: str = "strict") -> list[str]:
    """Class names of a run in class-id order.

    Args:
        path: the run's list.
        errors: what to do with bytes that are no UTF-8, as in `bytes.decode`.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no UTF-8 text.
    """
    with open_regular(path) as file:
        return re.sub("\r\n?", "\n", file.read().decode("utf-8", errors)).split("\n")[:-1]


@dataclass(frozen=True)
class MetricsLog:
    """A run's metrics.jsonl.

    Attributes:
        lines: the whole lines in order.
        damaged: numbers, from 1, of the lines that are not whole.
    """

    lines: list[dict[str, Any]]
    damaged: list[int]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The epoch lines; the last one of an epoch that was repeated after an interruption."""
        epochs = {(line.get("phase"), line["epoch"]): line for line in self.lines if line["kind"] == "epoch"}
        return list(epochs.values())

    @property
    def losses(self) -> list[float | None]:
        """Loss of every line that has one, None where it was not finite."""
        return [number(line["loss"]) for line in self.lines if "loss" in line]

    @property
    def restarts(self) -> int:
        """How often the log goes back to updates or epochs that it had before."""
        count = 0
        reached: dict[Any, tuple[float, float]] = {}
        for line in self.lines:
            if line["kind"] in ("update", "epoch"):
                phase, position = line.get("phase"), _position(line)
                count += phase in reached and position <= reached[phase]
                reached[phase] = position
        return count


def _position(line: dict[str, Any]) -> tuple[float, float]:
    """(epoch, update) of a line; the line of an epoch comes after those of all its updates."""
    return float(line["epoch"]), float(line["update"]) if line["kind"] == "update" else math.inf


def parse_metrics(text: str) -> MetricsLog:
    """The text of a metrics.jsonl; lines that are not whole are counted and left out."""
    log = MetricsLog([], [])
    for place, line in enumerate(text.splitlines(), 1):
        try:
            entry = parse_json(line)
            if entry["kind"] in ("update", "epoch"):
                _position(entry)
            hash((entry.get("phase"), entry.get("epoch")))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            log.damaged.append(place)
        else:
            log.lines.append(entry)
    return log


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run's metrics.jsonl; the last one of an epoch that was repeated after an interruption.

    Raises:
        UserError: a line is damaged.
    """
    path = RunLayout(run).metrics
    log = parse_metrics(read_text(path, "utf-8"))
    if log.damaged:
        raise UserError(f"{path} line {log.damaged[0]} is damaged; delete that line")
    return log.epochs


def read_results(run: Path) -> dict[str, Any]:
    """The final figures of a finished run. `UserError` where the file is damaged."""
    path = RunLayout(run).results
    try:
        results = parse_json(read_text(path, "utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and resume the run") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} is damaged (it holds no dictionary); delete it and resume the run")
    return results


def read_run(folder: Path) -> Run:
    """Everything that is there of a run.

    Raises:
        UserError: the folder is no run directory, or its config.yaml cannot be read.
    """
    layout = RunLayout(folder).require()
    recipe = read_recipe(str(layout.config.absolute()))
    if not recipe:
        raise UserError(f"{layout.config} holds no configuration; is {folder} a run directory?")
    options = flatten(recipe)
    run = Run(folder, default_options(options.get("method.name")) | options)
    run.results = _read_json(run, layout.results, "there are no test figures")
    if run.results is not None and not _is_well_formed(run.results):
        run.notes.append(f"{layout.results.name} does not hold what a run writes there; there are no test figures")
        run.results = None
    run.engine = _read_json(run, layout.deepspeed, "the precision is shown as it was asked for") or {}
    text = _read(run, layout.metrics, "there are no curves", _lenient_text)
    if text is not None:
        log = parse_metrics(text)
        run.notes += [f"line {place} of {layout.metrics.name} is damaged and left out" for place in log.damaged]
        run.epochs, run.losses, run.restarts = log.epochs, log.losses, log.restarts
    run.classes = _read(run, layout.classes, "classes are shown by number", lambda p: read_classes(p, "replace"))
    return run


def default_options(method: Any) -> dict[str, Any]:
    """Every option at its default, `section.option` -> value; those of a method that is not known are left out."""
    sections: dict[str, Any] = {name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()}
    try:
        sections["method"] = dataclasses.asdict(get_method(str(method)).Options(name=str(method)))
    except UserError:
        # The page shows the options that the run's own file has.
        sections["method"] = {}
    return flatten(sections)


def _lenient_text(path: Path) -> str:
    with open_regular(path) as file:
        return file.read().decode("utf-8", "replace")


def _read(run: Run, path: Path, consequence: str, reader: Callable[[Path], T]) -> T | None:
    """A file of the run; where it is missing or cannot be read, None and a note that says what follows from that."""
    try:
        return reader(path)
    except FileNotFoundError:
        run.notes.append(f"there is no {path.name}; {consequence}")
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read ({error.strerror}); {consequence}")
    return None


def _read_json(run: Run, path: Path, consequence: str) -> dict[str, Any] | None:
    """A file of the run that holds a dictionary; None where it is missing, and with a note where it is damaged."""
    if not path.exists() or (text := _read(run, path, consequence, _lenient_text)) is None:
        return None
    try:
        values = parse_json(text)
    except ValueError as error:
        run.notes.append(f"{path.name} is damaged ({error}); {consequence}")
        return None
    if not isinstance(values, dict):
        run.notes.append(f"{path.name} is damaged (it holds no dictionary); {consequence}")
        return None
    return values


def _is_well_formed(results: dict[str, Any]) -> bool:
    """Whether the test figures have the shape that a run gives them."""
    alphas = results.get("alpha", {})
    try:
        return all(float(alpha) > 0 and isinstance(metrics, dict) for alpha, metrics in alphas.items())
    except (AttributeError, ValueError):
        return False
