"""One HTML page about one run or several: figures, curves, classes, and what looks unhealthy.

Everything comes from the files that a run leaves (config.yaml, metrics.jsonl, results.json, classes.txt); what is
missing is said on the page. Runs whose configurations differ in seed and place only are a group: their figures are a
mean and a sample deviation. The page needs nothing beside itself; plots are PNG in the page.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import yaml

from spml_fast import __version__
from spml_fast.cli.parse import SECTIONS
from spml_fast.core.errors import UserError
from spml_fast.data.labels import POSITIVE
from spml_fast.data.manifest import Manifest
from spml_fast.methods import get_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind people tell apart; the ninth group starts again with dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#8F7C00")
DASHES = ("-", "--", ":", "-.")
# Options that say where and from which random numbers a run was made, not what it is.
PLACE = ("run.dir", "run.seed", "run.resume", "run.keep", "run.save_updates")
# Longer values of options are cut in the names of groups.
LABEL_VALUE = 24
# Rows of the tables of classes.
SHOWN = 10
# Epoch figures in the order of their plots; further ones follow by name.
PANELS = ("loss", "val_map", "selection_precision", "selection_recall", "lr", "images_per_second", "data_wait")
TITLES = {
    "loss": "training loss",
    "val_map": "validation mAP, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "share of time waiting for data",
    "memory_gib": "peak memory, GiB",
    "selection_precision": "precision of selected labels",
    "selection_recall": "recall of hidden positives",
    "selected_count": "selected labels",
    "corrected": "labels corrected in the epoch",
    "corrected_total": "labels corrected so far",
    "t_gap": "threshold of the gap",
    "t_avg_mean": "threshold of the average, mean over classes",
}
NOT_PLOTTED = ("epoch", "update", "time", "seconds", "selected_true_count", "hidden_positive_count", "memory_gib")


# --- Runs ----------------------------------------------------------------------------------------------------------


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


# --- Groups --------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs of one configuration that differ in seed and place only.

    Attributes:
        label: for people, different for every group.
        colour, dash: of its curves.
    """

    runs: list[Run]
    label: str = ""
    colour: str = COLOURS[0]
    dash: str = DASHES[0]

    @property
    def options(self) -> dict[str, Any]:
        """What the runs have in common."""
        return {k: v for k, v in self.runs[0].options.items() if k not in PLACE}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, labelled by what tells them apart."""
    found: dict[str, Group] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.options.items() if k not in PLACE}, sort_keys=True, default=str)
        found.setdefault(key, Group([])).runs.append(run)
    groups = list(found.values())
    for place, group in enumerate(groups):
        group.colour = COLOURS[place % len(COLOURS)]
        group.dash = DASHES[place // len(COLOURS) % len(DASHES)]
        group.label = _label(group, groups)
    for more in (lambda g: g.runs[0].folder.name, lambda g: str(groups.index(g) + 1)):
        labels = [g.label for g in groups]
        for group in groups:
            if labels.count(group.label) > 1:
                group.label += f" ({more(group)})"
    return groups


def _label(group: Group, groups: list[Group]) -> str:
    """The method's name, and up to three options by which groups of the same method differ."""
    method = str(group.options.get("method.name", "run"))
    rivals = [g for g in groups if g.options.get("method.name") == group.options.get("method.name")]
    apart = [k for k in differing([g.options for g in rivals]) if k != "method.name"]
    return ", ".join([method, *(f"{k.split('.')[-1]} {_short(shown(group.options.get(k)))}" for k in apart[:3])])


def _short(text: str) -> str:
    """The end of a long text, which says more of a path than its beginning."""
    return text if len(text) <= LABEL_VALUE else "…" + text[1 - LABEL_VALUE :]


def differing(options: Sequence[dict[str, Any]]) -> list[str]:
    """Options whose values are not the same everywhere, in the order in which they come."""
    keys = dict.fromkeys(k for o in options for k in o)
    return [k for k in keys if len({json.dumps(o.get(k, "-"), default=str) for o in options}) > 1]


def option_table(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Options that differ between groups. Those of a method alone say nothing beside another method's."""
    rows = []
    for key in differing([g.options for g in groups]):
        having = [g for g in groups if key in g.options]
        if (
            key.startswith("method.")
            and key != "method.name"
            and not differing([{key: g.options[key]} for g in having])
        ):
            continue
        rows.append((key, [shown(g.options[key]) if key in g.options else "-" for g in groups]))
    return rows


# --- Figures -------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """An option's value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "-"
    return str(value)


def setup(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was trained on what, with what: (name, value) rows; values that differ stand beside each other."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        o = {k: shown(v) for k, v in run.options.items()}
        results = run.results or {}
        pretrained = "pretrained" if run.options.get("model.pretrained") else "not pretrained"
        autocast = run.engine.get("torch_autocast") or {}
        precision = o["train.precision"]
        if "enabled" in autocast:
            precision = "bf16 under autocast" if autocast["enabled"] else "fp32"
        ranks = f" over {results['ranks']} rank(s)" if "ranks" in results else ""
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


def mean_text(values: Iterable[float | None], form: str = ".2f") -> str:
    """Mean, with the sample deviation where there are several; a dash where there is nothing."""
    known = [v for value in values if (v := number(value)) is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):{form}}"


def summary(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table that comes first, a row a group."""
    alphas = sorted({a for g in groups for r in g.runs for a in r.alphas}, key=float)
    head = ["", "runs", *(f"test mAP, alpha {a}" for a in alphas), "OF1", "CF1", "best validation mAP", "epochs"]
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


def conventions(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]] | None:
    """The same mAP in every convention, where they are not all one number."""
    rows, apart = [], False
    for group in groups:
        for alpha in sorted({a for r in group.runs for a in r.alphas}, key=float):
            metrics = [r.alphas.get(alpha, {}) for r in group.runs]
            values = [[m.get(name) for m in metrics] for name in CONVENTIONS]
            apart |= any(v != values[0] for v in values[:-1])
            rows.append([f"{group.label}, alpha {alpha}", *(mean_text(v) for v in values)])
    return (["", *CONVENTIONS.values()], rows) if apart else None


def class_groups(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]] | None:
    """mAP of groups of classes, rarest first, where the runs were measured with any."""
    rows, number = [], 0
    for group in groups:
        found = [r.alphas.get(r.headline or "", {}).get("groups") or [] for r in group.runs]
        count = max(map(len, found))
        if count:
            number = max(number, count)
            maps = ([f[i]["map"] for f in found if i < len(f)] for i in range(count))
            rows.append([group.label, *(mean_text(m) for m in maps)])
    if not rows:
        return None
    head = ["", *("rarest" if i == 0 else "most frequent" if i == number - 1 else str(i + 1) for i in range(number))]
    return head, [row + ["-"] * (len(head) - len(row)) for row in rows]


# --- Classes -------------------------------------------------------------------------------------------------------


def class_ap(group: Group) -> np.ndarray | None:
    """AP of every class in per cent, mean over the runs, NaN where it is not defined; None without test figures."""
    found = [r.alphas.get(r.headline or "", {}).get("per_class_ap") for r in group.runs]
    lists = [np.array(f, np.float64) for f in found if f]
    if not lists or len({len(x) for x in lists}) > 1:
        return None
    return np.asarray(np.mean(lists, axis=0))


def training_counts(groups: Sequence[Group]) -> list[np.ndarray | None]:
    """Observed positives of every class in each group's training split, int64 [C]; None where it is not there."""
    found: dict[tuple[str, ...], np.ndarray | None] = {}
    keys = []
    for run in (g.runs[0] for g in groups):
        keys.append(tuple(str(run.options.get(f"data.{name}")) for name in ("dir", "image_root", "train_split")))
        if keys[-1] not in found:
            found[keys[-1]] = _counts(run)
    return [found[key] for key in keys]


def _counts(run: Run) -> np.ndarray | None:
    folder = run.options.get("data.dir")
    if folder is None or not Path(folder, "manifest.json").is_file():
        return None
    try:
        manifest = Manifest(folder, run.options.get("data.image_root"))
        name = str(run.options.get("data.train_split", "train"))
        return np.asarray(manifest.split(name).observed.class_counts(POSITIVE))
    except UserError as error:
        run.notes.append(f"labels of the training split are not shown: {error}")
        return None


ClassRow = tuple[str, list[str]]


def class_tables(groups: Sequence[Group], names: Sequence[str]) -> list[tuple[str, list[str], list[ClassRow]]]:
    """Tables of a few classes: the best and the worst of a group, or where the first and the last group differ most."""
    having = [(g, ap) for g in groups if (ap := class_ap(g)) is not None and len(ap) == len(names)]
    if not having:
        return []
    first, last = having[0][1], having[-1][1]
    score = last - first if len(having) > 1 else first
    order = [int(i) for i in np.argsort(-score, kind="stable") if not np.isnan(score[i])]
    head = [g.label for g, _ in having]
    if len(having) == 1:
        titles = ("Best classes", "Worst classes")
    else:
        titles = (f"{head[-1]} against {head[0]}: where it does best", "Where it does worst")

    def rows(chosen: Iterable[int]) -> list[ClassRow]:
        return [(names[c], ["-" if np.isnan(ap[c]) else f"{ap[c]:.1f}" for _, ap in having]) for c in chosen]

    count = min(SHOWN, (len(order) + 1) // 2)
    tables = [(titles[0], head, rows(order[:count]))]
    if len(order) > count:
        tables.append((titles[1], head, rows(order[: -count - 1 : -1][: len(order) - count])))
    return tables


# --- Health --------------------------------------------------------------------------------------------------------


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
            f"{100 * wait:.0f}% of the training time went into waiting for data: more data.threads, smaller pictures "
            "(prepare.py shard --short-side) or a faster disk would help"
        )
    return out


# --- Plots ---------------------------------------------------------------------------------------------------------


def _figure(across: str) -> tuple[Figure, Axes]:
    """A plot with whole numbers of `across` on its x axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axis = pyplot.subplots(figsize=(4.6, 2.9), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(across)
    return figure, axis


def _png(figure: Figure) -> str:
    """A figure as the address of a picture within the page; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panels(runs: Sequence[Run]) -> list[str]:
    """Names of the epoch figures that are numbers, the usual ones first."""
    names = {k for r in runs for e in r.epochs for k, v in e.items() if isinstance(v, int | float)}
    names -= set(NOT_PLOTTED)
    # Counts of what never happened say nothing.
    names = {n for n in names if any(e.get(n) for r in runs for e in r.epochs)}
    return [n for n in PANELS if n in names] + sorted(names - set(PANELS))


def _plotted(epoch: dict[str, Any], name: str) -> float | None:
    """A figure of an epoch; the precision of nothing is not defined, though the log has 0 for it."""
    if name == "selection_precision" and not epoch.get("selected_count"):
        return None
    return number(epoch.get(name))


def curve_plots(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(title, picture) of every figure over epochs; seeds are thin, their mean is thick."""
    out = []
    for name in _panels([r for g in groups for r in g.runs]):
        figure, axis = _figure("epoch")
        for group in groups:
            series = [[_plotted(e, name) for e in r.epochs] for r in group.runs]
            known = [np.array([np.nan if v is None else v for v in s], np.float64) for s in series if s]
            style: dict[str, Any] = {"color": group.colour, "linestyle": group.dash}
            # One epoch is a point, which a line does not show.
            marker = "o" if all(len(s) == 1 for s in known) else None
            for s in known:
                thin = len(known) > 1
                axis.plot(
                    np.arange(1, len(s) + 1), s, linewidth=0.7 if thin else 1.6, alpha=0.45 if thin else 1, **style
                )
            if known and (len(known) > 1 or marker):
                shortest = min(map(len, known))
                mean = np.mean([s[:shortest] for s in known], axis=0)
                axis.plot(np.arange(1, shortest + 1), mean, linewidth=1.8, marker=marker, **style)
        out.append((TITLES.get(name, name.replace("_", " ")), _png(figure)))
    return out


def class_plots(groups: Sequence[Group], counts: Sequence[np.ndarray | None]) -> list[tuple[str, str]]:
    """AP of all classes, sorted, and against the number of positives that training saw, `counts` of each group."""
    having = [(g, ap) for g in groups if (ap := class_ap(g)) is not None]
    paired = [
        (g, ap, count)
        for g, count in zip(groups, counts, strict=True)
        if (ap := class_ap(g)) is not None and count is not None and len(ap) == len(count)
    ]
    if not having:
        return []
    figure, axis = _figure("classes, the best first")
    for group, ap in having:
        known = np.sort(ap[~np.isnan(ap)])[::-1]
        axis.plot(np.arange(1, len(known) + 1), known, color=group.colour, linestyle=group.dash, linewidth=1.4)
    out = [("AP of every class, %", _png(figure))]
    if paired:
        figure, axis = _figure("observed positives in training")
        for group, ap, count in paired:
            size = 20 if len(count) <= 200 else 3
            axis.scatter(np.maximum(count, 0.5), ap, s=size, color=group.colour, alpha=0.6, linewidths=0)
        if max(c.max() for *_, c in paired) > 20 * max(min(c.min() for *_, c in paired), 1):
            axis.set_xscale("log")
        out.append(("AP against labels, %", _png(figure)))
    return out


# --- The page ------------------------------------------------------------------------------------------------------


def make_page(folders: Sequence[Path]) -> str:
    """The page about these run directories, in their order.

    Raises:
        UserError: none given, one given twice, or one that is no run directory.
    """
    if not folders:
        raise UserError("no run given; name one run directory or more")
    seen: dict[str, Path] = {}
    for folder in folders:
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(f"{folder} is given twice")
        seen[real] = folder
    runs = [read_run(folder) for folder in folders]
    groups = group_runs(runs)
    names = next((r.classes for r in runs if r.classes is not None), None)
    widths = {len(ap) for g in groups if (ap := class_ap(g)) is not None}
    same_classes = len(widths) == 1 and len({tuple(r.classes) for r in runs if r.classes is not None}) <= 1
    if names is None or widths != {len(names)}:
        names = [str(i) for i in range(next(iter(widths), 0))]
    counts = training_counts(groups) if same_classes else [None] * len(groups)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spml_fast.analysis", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    compared = len(groups) > 1
    title = f"{len(runs)} runs" if len(runs) > 1 else f"{groups[0].label}: {runs[0].folder.name}"
    return environment.get_template("report.html").render(
        title=title,
        version=__version__,
        groups=groups,
        compared=compared,
        summary=summary(groups),
        setup=setup(runs),
        averaged=any(len(g.runs) > 1 for g in groups),
        conventions=conventions(groups),
        options=option_table(groups) if compared else [],
        all_options=[] if compared else [(k, shown(v)) for k, v in runs[0].options.items()],
        curves=curve_plots(groups),
        classes=class_plots(groups, counts) if same_classes else [],
        class_tables=class_tables(groups, names) if same_classes else [],
        class_groups=class_groups(groups),
        other_classes=bool(widths) and not same_classes,
        no_counts=same_classes and any(c is None for c in counts),
        health=[(str(r.folder), health(r)) for r in runs],
        places=[(g.label, str(r.folder), shown(r.options.get("run.seed")), _best(r)) for g in groups for r in g.runs],
    )


def _best(run: Run) -> str:
    """Test mAP of one run at every alpha, and its best epoch."""
    maps = ", ".join(f"alpha {a}: {m['map']:.2f}" for a, m in run.alphas.items() if m.get("map") is not None)
    epoch = (run.results or {}).get("best_epoch")
    return (maps or "-") + ("" if epoch is None else f" (epoch {epoch})")
