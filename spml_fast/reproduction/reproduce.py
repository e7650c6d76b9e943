"""The papers' comparisons in one go: which runs a preset has, what the papers say of them, tables and plots.

`spml-fast reproduce` starts the runs; everything here works on what they leave behind.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from spml_fast.core import io
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import writer_name
from spml_fast.reproduction.entries import Entry, Preset
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.read import read_epochs, read_results


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


def check_options(run: Path, options: Sequence[str]) -> None:
    """Raise `UserError` when a run was begun with other options, since its figures would belong to those."""
    path = RunLayout(run).options
    if not RunLayout(run).begun or not path.exists():
        return
    try:
        begun_with = [str(option) for option in json.loads(path.read_text(encoding="utf-8"))["options"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {run} or choose another --out") from error
    if begun_with != list(options):
        raise UserError(
            f"{run} was made with other options ({shlex.join(begun_with)}); delete it or choose another --out"
        )


def note_options(run: Path, options: Sequence[str]) -> None:
    """Write down what `check_options` compares, before a run is begun."""
    run.mkdir(parents=True, exist_ok=True)
    io.write_json(RunLayout(run).options, {"options": list(options)})


def collect(runs: dict[str, list[Path]], entries: Iterable[Entry], heads: dict[str, str]) -> list[Row]:
    """Rows from finished runs: entry name -> run directories, one per seed."""
    rows = []
    for entry in entries:
        results = [read_results(run) for run in runs[entry.name]]
        seconds = [e["seconds"] for run in runs[entry.name] for e in read_epochs(run)]
        for alpha in results[0]["alpha"]:
            values = [r["alpha"][alpha]["map"] for r in results]
            rows.append(Row(entry, heads[entry.name], alpha, values, statistics.median(seconds)))
    return rows


def check_claims(preset: Preset, rows: list[Row]) -> list[dict[str, Any]]:
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
CSV_HEADER = ("method", "head", "alpha", "map_mean", "map_std", "seeds", "published", "epoch_seconds")
MARKDOWN_HEADER = "| " + " | ".join(HEADER) + " |"


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
    lines = [MARKDOWN_HEADER, "|" + "---|" * len(HEADER)]
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
    """One line per entry and alpha."""
    table = []
    for r in rows:
        published = r.entry.published.get(r.alpha, "")
        numbers = (f"{r.mean:.4f}", f"{r.std:.4f}", len(r.values), published, f"{r.epoch_seconds:.2f}")
        table.append((r.entry.name, r.head, r.alpha, *numbers))
    # Line ends of the CSV standard (RFC 4180), which this table has always had.
    io.write_csv(path, CSV_HEADER, table, line_end="\r\n")


def plot(path: Path, rows: list[Row], runs: dict[str, list[Path]]) -> None:
    """Dots of mAP, and precision and recall of what methods rejected or corrected, over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 2), layout="constrained")
    names = list(dict.fromkeys(r.entry.name for r in rows))
    alphas = list(dict.fromkeys(r.alpha for r in rows))
    # Dots: a bar would have to begin at 0, where differences cannot be seen.
    width = 0.64 / len(alphas)
    for place, alpha in enumerate(alphas):
        chosen = [r for r in rows if r.alpha == alpha]
        positions = [names.index(r.entry.name) + (place - (len(alphas) - 1) / 2) * width for r in chosen]
        means, deviations = [r.mean for r in chosen], [r.std for r in chosen]
        label = "plain" if float(alpha) == 1 else f"BoostLU x{alpha}"
        left.errorbar(positions, means, deviations, fmt="o", markersize=6, capsize=4, label=label)
        for position, mean, deviation in zip(positions, means, deviations, strict=True):
            left.annotate(
                f"{mean:.1f}",
                (position, mean + deviation),
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
                fontsize=7,
            )
    left.grid(axis="y", alpha=0.3)
    left.set_xlim(-0.5, len(names) - 0.5)
    left.set_xticks(range(len(names)), names, rotation=20)
    left.set_ylabel("test mAP, mean and deviation over seeds (%)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.11), ncols=len(alphas), frameon=False)
    for name in names:
        histories = [read_epochs(run) for run in runs[name]]
        if not all("selection_precision" in e for h in histories for e in h):
            continue
        # Runs that stopped early are shorter: as far as all of them went.
        epochs = range(1, min(len(h) for h in histories) + 1)
        colour = None
        for kind, style in (("selection_precision", "-"), ("selection_recall", "--")):
            curve = [statistics.fmean(h[i - 1][kind] for h in histories) for i in epochs]
            (line,) = right.plot(epochs, curve, style, color=colour, label=f"{name} {kind.split('_')[1]}")
            colour = line.get_color()
    right.set_xlabel("epoch")
    right.set_title("rejected or corrected labels against the truth", fontsize=10)
    right.set_ylim(-0.02, 1.02)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    with io.atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": writer_name("reproduce")})
    pyplot.close(figure)
