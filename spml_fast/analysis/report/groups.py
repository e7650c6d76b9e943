"""Groups of runs that differ in their seed alone, and the tables about them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.core.io import printable
from spml_fast.core.text import counted
from spml_fast.runs.read import Run, number

# Colours of the page's style, after Okabe and Ito's, which most colour-blind people tell apart; the ninth group starts
# again with dashes.
COLOURS = tuple(f"g{k}" for k in range(8))
DASHES = ("", "7 4", "2 3", "8 3 2 3")

# Options of the directory, the seed and resuming: runs that differ in these alone are repetitions of each other.
REPETITION = ("run.dir", "run.seed", "run.resume", "run.keep", "run.save_updates")

# Longer values of options are cut in the names of groups.
LABEL_VALUE = 24


@dataclass
class RunGroup:
    """Runs of one configuration that differ in `REPETITION` only.

    Attributes:
        runs: at least one.
        label: for people, different for every group.
        colour: class of its marks in the page's style.
        dash: of its lines, as SVG has it.
    """

    runs: list[Run]
    label: str = ""
    colour: str = COLOURS[0]
    dash: str = DASHES[0]

    @property
    def options(self) -> dict[str, Any]:
        """The options that all runs have in common."""
        return {k: v for k, v in self.runs[0].options.items() if k not in REPETITION}


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Groups in the order of their first runs, labelled by the options in which they differ."""
    by_options: dict[str, RunGroup] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.options.items() if k not in REPETITION}, sort_keys=True, default=str)
        by_options.setdefault(key, RunGroup([])).runs.append(run)
    groups = list(by_options.values())
    for place, group in enumerate(groups):
        group.colour = COLOURS[place % len(COLOURS)]
        group.dash = DASHES[place // len(COLOURS) % len(DASHES)]
        group.label = printable(_label(group, groups))
    for suffix in (lambda g: printable(g.runs[0].folder.name), lambda g: str(groups.index(g) + 1)):
        labels = [g.label for g in groups]
        for group in groups:
            if labels.count(group.label) > 1:
                group.label += f" ({suffix(group)})"
    _name_runs(groups)
    return groups


def _name_runs(groups: Sequence[RunGroup]) -> None:
    """What every run is called everywhere: its setting's label, and where that has several runs the seed."""
    for group in groups:
        for run in group.runs:
            run.name = group.label
            if len(group.runs) > 1:
                run.name += f", seed {option_text(run.options.get('run.seed'))}"
    runs = [run for group in groups for run in group.runs]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name += f" ({printable(str(run.folder))})"


def _label(group: RunGroup, groups: list[RunGroup]) -> str:
    """The method's name, and up to three options by which groups of the same method differ."""
    method = str(group.options.get("method.name", "run"))
    rivals = [g for g in groups if g.options.get("method.name") == group.options.get("method.name")]
    keys = [k for k in differing([g.options for g in rivals]) if k != "method.name"][:3]
    return ", ".join([method, *(f"{k.split('.')[-1]} {_short(option_text(group.options.get(k)))}" for k in keys)])


def _short(text: str) -> str:
    """The end of a long text: of a path it tells more than the beginning."""
    return text if len(text) <= LABEL_VALUE else "…" + text[1 - LABEL_VALUE :]


def differing(options: Sequence[dict[str, Any]]) -> list[str]:
    """Options whose values are not the same everywhere, in the order in which they come."""
    keys = dict.fromkeys(k for o in options for k in o)
    return [k for k in keys if len({json.dumps(o.get(k, "-"), default=str) for o in options}) > 1]


def option_table(groups: Sequence[RunGroup]) -> list[tuple[str, list[str]]]:
    """Options that differ between groups; options that only one method has are left out."""
    rows = []
    for key in differing([g.options for g in groups]):
        having = [g for g in groups if key in g.options]
        if (
            key.startswith("method.")
            and key != "method.name"
            and not differing([{key: g.options[key]} for g in having])
        ):
            continue
        rows.append((key, [option_text(g.options[key]) if key in g.options else "-" for g in groups]))
    return rows


def option_text(value: Any) -> str:
    """An option's value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(option_text, value)) or "-"
    return str(value)


def setup_rows(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Data, model and training of the runs: (name, value) rows; values that differ follow each other in a cell."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        o = {k: option_text(v) for k, v in run.options.items()}
        results = run.results or {}
        pretrained = "pretrained" if run.options.get("model.pretrained") else "not pretrained"
        autocast = run.engine.get("torch_autocast") or {}
        precision = o["train.precision"]
        if "enabled" in autocast:
            precision = "bf16 under autocast" if autocast["enabled"] else "fp32"
        ranks = f" over {counted(results['ranks'], 'rank')}" if "ranks" in results else ""
        steps = run.options["train.accumulation"]
        linear = run.options["train.linear_epochs"]
        texts = {
            "data set": f"{Path(o['data.dir']).name}, {len(run.classes or [])} classes, {o['data.image_size']} px",
            "method": str(run.options.get("method.name", "-")),
            "backbone": f"{o['model.backbone']}, {pretrained}",
            "head": o["model.head"],
            "alpha in training / evaluation": f"{o['model.alpha_train']} / {o['model.alpha_eval']}",
            "epochs": o["train.epochs"] + (f" after {linear} of the head alone" if linear else ""),
            "batch": o["train.batch_size"] + (f" in {steps} steps" if steps != 1 else "") + ranks,
            "optimizer": f"{o['train.optimizer']}, learning rate {o['train.lr']}, {o['train.schedule']}",
            "precision": precision,
            "device": str(results.get("device", "-")),
            "seed": o["run.seed"],
        }
        for name, text in texts.items():
            rows.setdefault(name, []).append(text)
    return [(name, "; ".join(dict.fromkeys(texts))) for name, texts in rows.items()]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of those that are numbers; None where there is none."""
    known = [v for value in values if (v := number(value)) is not None]
    return statistics.fmean(known) if known else None


def mean_text(values: Iterable[float | None], form: str = ".2f") -> str:
    """Mean, with the sample deviation where there are several; a dash where there is nothing."""
    known = [v for value in values if (v := number(value)) is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):{form}}"


def alpha_text(alpha: str) -> str:
    """BoostLU's factor for people: `plain` for 1, else such as `BoostLU x5`."""
    return "plain" if float(alpha) == 1 else f"BoostLU x{alpha}"


def summary(groups: Sequence[RunGroup]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table that comes first, one row per group."""
    alphas = sorted({a for g in groups for r in g.runs for a in r.alphas}, key=float)
    head = ["", "runs", *(f"test mAP, {alpha_text(a)}" for a in alphas), "OF1", "CF1", "best validation mAP", "epochs"]
    head += ["images/s", "waiting for data", "training time", "peak memory"]
    rows = []
    for group in groups:
        figures = [r.figures for r in group.runs]
        headline = [r.alphas.get(r.headline or "", {}) for r in group.runs]
        row = [group.label, str(len(group.runs))]
        row += [mean_text(r.alphas.get(a, {}).get("map") for r in group.runs) for a in alphas]
        row += [mean_text(m.get(name) for m in headline) for name in ("OF1", "CF1")]
        row.append(mean_text(f.get("best_val_map") for f in figures))
        planned = group.runs[0].planned_epochs
        row.append("/".join(dict.fromkeys(str(len(r.epochs)) for r in group.runs)) + f" of {planned}")
        units = (
            ("images_per_second", 1, ".0f", ""),
            ("data_wait", 100, ".1f", "%"),
            ("train_seconds", 1, ".0f", " s"),
            ("memory_gib", 1, ".1f", " GiB"),
        )
        for name, factor, form, unit in units:
            values = [factor * v for f in figures if (v := number(f.get(name))) is not None]
            row.append(mean_text(values, form) + (unit if values else ""))
        rows.append(row)
    return head, rows


CONVENTIONS = {
    "map_zero": "classes without a positive count 0",
    "map_skip_unlabelled": "classes without a label left out",
    "map_skipping": "classes without a positive left out",
    "map_skip_one_sided": "classes without a positive or a negative left out",
    "map_weighted": "weighted by positives",
}


def conventions(groups: Sequence[RunGroup]) -> tuple[list[str], list[list[str]]] | None:
    """The same mAP in every convention, where they are not all one number."""
    rows, differ = [], False
    for group in groups:
        for alpha in sorted({a for r in group.runs for a in r.alphas}, key=float):
            metrics = [r.alphas.get(alpha, {}) for r in group.runs]
            values = [[m.get(name) for m in metrics] for name in CONVENTIONS]
            differ |= any(v != values[0] for v in values[:-1])
            rows.append([f"{group.label}, {alpha_text(alpha)}", *(mean_text(v) for v in values)])
    return (["", *CONVENTIONS.values()], rows) if differ else None


def class_groups(groups: Sequence[RunGroup]) -> tuple[list[str], list[list[str]]] | None:
    """mAP of groups of classes, rarest first, where the runs were measured with any."""
    rows, most = [], 0
    for group in groups:
        per_run = [r.alphas.get(r.headline or "", {}).get("groups") or [] for r in group.runs]
        count = max(map(len, per_run))
        if count:
            most = max(most, count)
            maps = ([f[i]["map"] for f in per_run if i < len(f)] for i in range(count))
            rows.append([group.label, *(mean_text(m) for m in maps)])
    if not rows:
        return None
    head = ["", *("rarest" if i == 0 else "most frequent" if i == most - 1 else str(i + 1) for i in range(most))]
    return head, [row + ["-"] * (len(head) - len(row)) for row in rows]


def class_ap(group: RunGroup) -> np.ndarray | None:
    """AP of every class in per cent, mean over the runs, NaN where it is not defined; None without test figures."""
    per_run = [r.alphas.get(r.headline or "", {}).get("per_class_ap") for r in group.runs]
    lists = [np.array(f, np.float64) for f in per_run if f]
    if not lists or len({len(x) for x in lists}) > 1:
        return None
    return np.asarray(np.mean(lists, axis=0))
