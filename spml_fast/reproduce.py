"""The papers' comparisons in one go: which runs a preset has, what the papers say of them, tables and plots.

`launch/reproduce.py` starts the runs; everything here works on what they leave behind.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from spml_fast.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One line of a table: a method with its options.

    Attributes:
        name: short name, part of the run directories.
        method: registry name of the method.
        recipe: file in launch/configs.
        options: command line options after the recipe.
        published: published test mAP, for presets of real data sets; alpha -> value.
        note: how its setting differs, for the table.
    """

    name: str
    method: str
    recipe: str
    options: tuple[str, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Statement:
    """What a paper says, as a comparison of means.

    Attributes:
        text: the statement.
        needs: entries it speaks of.
        holds: means by (entry, alpha) -> whether it holds.
    """

    text: str
    needs: tuple[str, ...]
    holds: Callable[[dict[tuple[str, str], float]], bool]


@dataclass(frozen=True)
class Preset:
    """A data set with its entries and statements."""

    name: str
    entries: tuple[Entry, ...]
    statements: tuple[Statement, ...]
    default: tuple[str, ...]
    note: str = ""


PLAIN = ("--model.alpha_train", "1")

DIGITS = (
    Entry("full", "full", "digits.yaml", PLAIN, note="every label known"),
    Entry("an", "an", "digits.yaml", PLAIN),
    Entry("an_boost", "an", "digits.yaml", ("--model.alpha_train", "5"), note="BoostLU in training too"),
    Entry("em", "em", "digits.yaml", PLAIN),
    Entry("ll_r", "ll_r", "digits.yaml", (*PLAIN, "--method.delta_rel", "2"), note="delta_rel 2"),
    Entry(
        "ll_r_boost",
        "ll_r",
        "digits.yaml",
        ("--method.delta_rel", "2"),
        note="delta_rel 2, BoostLU in training too",
    ),
    Entry("ignore", "ignore", "digits_ignore.yaml", note="see launch/configs/digits_ignore.yaml"),
)


def _better(first: tuple[str, str], second: tuple[str, str]) -> Callable[[dict[tuple[str, str], float]], bool]:
    return lambda means: means[first] > means[second]


STATEMENTS = (
    Statement(
        "BoostLU at inference improves a trained assumed-negative model",
        ("an",),
        _better(("an", "5"), ("an", "1")),
    ),
    Statement(
        "training assumed-negative with BoostLU is worse than boosting at inference only",
        ("an", "an_boost"),
        _better(("an", "5"), ("an_boost", "5")),
    ),
    Statement(
        "LL-R + BoostLU beats LL-R and assumed negative",
        ("an", "ll_r", "ll_r_boost"),
        lambda m: m["ll_r_boost", "5"] > max(m["ll_r", "1"], m["an", "1"]),
    ),
    Statement("IGNORE beats assumed negative", ("an", "ignore"), _better(("ignore", "1"), ("an", "1"))),
    Statement(
        "IGNORE gains at least 1.5 points over assumed negative at alpha 1",
        ("an", "ignore"),
        lambda m: m["ignore", "1"] - m["an", "1"] >= 1.5,
    ),
    Statement("EM beats assumed negative", ("an", "em"), _better(("em", "1"), ("an", "1"))),
    Statement(
        "nothing beats full labels",
        ("full",),
        lambda m: m["full", "1"] >= max(value for (name, _), value in m.items() if name != "full"),
    ),
)


def _paper(name: str, table: dict[str, dict[str, float]], recipes: dict[str, str]) -> Preset:
    """A preset with the BoostLU paper's numbers (spec/published_results.md 1.2 and 1.4)."""
    published = table
    boost, large = recipes["boost"], recipes["plain"]
    entries = [
        Entry("full", "full", boost, PLAIN, published.get("full", {})),
        Entry("an", "an", boost, PLAIN, published.get("an", {})),
        Entry("an_ls", "an_ls", boost, PLAIN, published.get("an_ls", {})),
        Entry("em", "em", boost, PLAIN, published.get("em", {})),
    ]
    for scheme in ("ll_r", "ll_ct", "ll_cp"):
        shared = ("--method.ties", "inclusive", "--method.batch_semantics", "paper")
        entries.append(Entry(scheme, scheme, boost, (*PLAIN, *shared), published.get(scheme, {})))
        entries.append(Entry(f"{scheme}_boost", scheme, boost, shared, published.get(f"{scheme}_boost", {})))
    if large:
        entries.append(Entry("ignore", "ignore", large))
    statements = tuple(s for s in STATEMENTS if "1.5 points" not in s.text)
    note = "published: BoostLU's main table (ResNet-50); alpha 5 of `an` from its poster"
    return Preset(name, tuple(entries), statements, tuple(e.name for e in entries), note)


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "digits",
        DIGITS,
        STATEMENTS,
        tuple(e.name for e in DIGITS),
        "digit scenes: learning rate 3e-3, 12 epochs, batch 32, AdamW, one-cycle, test_resnet from random weights; "
        "the papers: 1e-5, 10 epochs, batch 16, Adam, constant, pretrained ResNet-50",
    ),
    "voc": _paper(
        "voc",
        {
            "full": {"1": 89.42},
            "an": {"1": 85.89, "5": 87.31},
            "an_ls": {"1": 87.90},
            "em": {"1": 89.09},
            "ll_r": {"1": 88.27},
            "ll_r_boost": {"5": 89.29},
            "ll_ct": {"1": 87.79},
            "ll_ct_boost": {"5": 88.61},
            "ll_cp": {"1": 87.44},
            "ll_cp_boost": {"5": 87.81},
        },
        {"boost": "voc_boostlu.yaml", "plain": "voc_ignore.yaml"},
    ),
    "coco": _paper(
        "coco",
        {
            "full": {"1": 76.78},
            "an": {"1": 64.92, "5": 66.27},
            "an_ls": {"1": 67.15},
            "em": {"1": 70.70},
            "ll_r": {"1": 70.70},
            "ll_r_boost": {"5": 72.89},
            "ll_ct": {"1": 70.29},
            "ll_ct_boost": {"5": 71.78},
            "ll_cp": {"1": 70.27},
            "ll_cp_boost": {"5": 71.41},
        },
        {"boost": "coco_boostlu.yaml", "plain": "coco_ignore.yaml"},
    ),
}


def get_preset(name: str) -> Preset:
    """The preset called `name`; `UserError` lists those that exist."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def choose_entries(preset: Preset, names: Sequence[str] | None) -> list[Entry]:
    """The entries called `names` (all of the preset's defaults for None), in the preset's order."""
    known = {e.name: e for e in preset.entries}
    for name in names or ():
        if name not in known:
            raise UserError(f"preset {preset.name} has no method {name!r}; it has {', '.join(known)}")
    wanted = names or preset.default
    return [e for e in preset.entries if e.name in wanted]


@dataclass
class Row:
    """Test mAP of an entry at one alpha over seeds."""

    entry: Entry
    head: str
    alpha: str
    values: list[float]
    epoch_seconds: float

    @property
    def mean(self) -> float:
        """Mean mAP, per cent."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"]


def collect(runs: dict[str, list[Path]], entries: Iterable[Entry], heads: dict[str, str]) -> list[Row]:
    """Rows from finished runs: entry name -> run directories, one a seed."""
    rows = []
    for entry in entries:
        found = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs[entry.name]]
        seconds = [e["seconds"] for run in runs[entry.name] for e in read_epochs(run)]
        for alpha in found[0]["alpha"]:
            values = [r["alpha"][alpha]["map"] for r in found]
            rows.append(Row(entry, heads[entry.name], alpha, values, statistics.median(seconds)))
    return rows


def judge(preset: Preset, rows: list[Row]) -> list[dict[str, Any]]:
    """Each statement whose entries were run, and whether the means bear it out."""
    means = {(r.entry.name, r.alpha): r.mean for r in rows}
    present = {r.entry.name for r in rows}
    out = []
    for statement in preset.statements:
        if set(statement.needs) <= present:
            out.append({"text": statement.text, "holds": bool(statement.holds(means))})
    return out


def as_json(rows: list[Row], statements: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine-readable result."""
    keys = ("method", "head", "alpha", "map_mean", "map_std", "seeds", "published", "epoch_seconds", "values")
    cells = [
        (
            r.entry.name,
            r.head,
            float(r.alpha),
            r.mean,
            r.std,
            len(r.values),
            r.entry.published.get(r.alpha),
            r.epoch_seconds,
            r.values,
        )
        for r in rows
    ]
    return {"rows": [dict(zip(keys, c, strict=True)) for c in cells], "statements": statements}


HEADER = ("method", "head", "alpha", "test mAP", "seeds", "published", "s/epoch", "note")


def _cells(row: Row) -> tuple[str, ...]:
    published = row.entry.published.get(row.alpha)
    return (
        row.entry.name,
        row.head,
        row.alpha,
        f"{row.mean:.2f} ± {row.std:.2f}",
        str(len(row.values)),
        "" if published is None else f"{published:.2f}",
        f"{row.epoch_seconds:.1f}",
        row.entry.note,
    )


def as_markdown(preset: Preset, rows: list[Row], statements: list[dict[str, Any]]) -> str:
    """Table, statements and note as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in rows]
    lines += ["", "| statement | holds |", "|---|---|"]
    lines += [f"| {s['text']} | {'yes' if s['holds'] else 'no'} |" for s in statements]
    if preset.note:
        lines += ["", preset.note]
    return "\n".join(lines) + "\n"


def as_table(preset: Preset, rows: list[Row]) -> Table:
    """The table for a terminal."""
    table = Table(title=f"{preset.name}: test mAP, mean ± deviation over seeds", title_justify="left")
    for name in HEADER:
        table.add_column(name)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line an entry and alpha."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "head", "alpha", "map_mean", "map_std", "seeds", "published", "epoch_seconds"])
        for r in rows:
            published = r.entry.published.get(r.alpha, "")
            numbers = (f"{r.mean:.4f}", f"{r.std:.4f}", len(r.values), published, f"{r.epoch_seconds:.2f}")
            writer.writerow([r.entry.name, r.head, r.alpha, *numbers])


def plot(path: Path, rows: list[Row], runs: dict[str, list[Path]]) -> None:
    """Bars of mAP, and precision and recall of what methods rejected or corrected, over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 2), layout="constrained")
    names = list(dict.fromkeys(r.entry.name for r in rows))
    alphas = list(dict.fromkeys(r.alpha for r in rows))
    width = 0.8 / len(alphas)
    for place, alpha in enumerate(alphas):
        chosen = [r for r in rows if r.alpha == alpha]
        at = [names.index(r.entry.name) + (place - (len(alphas) - 1) / 2) * width for r in chosen]
        bars = left.bar(at, [r.mean for r in chosen], width, yerr=[r.std for r in chosen], capsize=3)
        bars.set_label(f"alpha {alpha}")
        left.bar_label(bars, fmt="%.1f", fontsize=7, padding=3)
    lowest = min(r.mean - r.std for r in rows)
    left.set_ylim(max(0, math.floor(lowest / 5) * 5 - 5), 101.5)
    left.set_xticks(range(len(names)), names, rotation=20)
    left.set_ylabel("test mAP (%)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.11), ncols=len(alphas), frameon=False)
    for name in names:
        histories = [read_epochs(run) for run in runs[name]]
        if not all("selection_precision" in e for h in histories for e in h):
            continue
        epochs = [e["epoch"] for e in histories[0]]
        colour = None
        for kind, style in (("selection_precision", "-"), ("selection_recall", "--")):
            curve = [statistics.fmean(h[i][kind] for h in histories) for i in range(len(epochs))]
            (line,) = right.plot(epochs, curve, style, color=colour, label=f"{name} {kind.split('_')[1]}")
            colour = line.get_color()
    right.set_xlabel("epoch")
    right.set_title("rejected or corrected labels against the truth", fontsize=10)
    right.set_ylim(-0.02, 1.02)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
