"""One table of the goals of docs/performance.md: what is measured, on which machine, and what is not.

    python benchmarks/summary.py              prints it
    python benchmarks/summary.py --write      puts it into docs/performance.md, between its marks

Figures come from the tables in benchmarks/results that the benchmarks write with `--results`; a goal without a row in
them is not measured.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.page_tables import Marks

RESULTS = Path(__file__).resolve().parent / "results"
MARKS = Marks("<!-- goals: begin; python benchmarks/summary.py --write -->", "<!-- goals: end -->")
HEADS = ("what", "goal", "rival", "measured", "ratio", "met", "machine", "when")

Row = dict[str, str]


@dataclass(frozen=True)
class Found:
    """One measurement of a goal.

    Attributes:
        measured: in words.
        ratio: to the rival, where there is one.
        met: whether the goal is.
        machine: that it was measured on.
        when: date, or commit where the table has none.
    """

    measured: str
    ratio: str
    met: bool
    machine: str
    when: str


@dataclass(frozen=True)
class Goal:
    """A goal, and what finds its measurements in a folder of tables."""

    what: str
    goal: str
    rival: str
    find: Callable[[Path], Iterator[Found]]


def read(path: Path) -> list[Row]:
    """Rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def place(row: Row) -> tuple[str, str]:
    """Machine and time of a row."""
    gpu = row.get("gpu", "")
    machine = gpu if gpu and gpu != "none" else f"{row.get('cpu', 'CPU')}, {row.get('cores', '?')} cores"
    return machine, row.get("date") or row.get("commit", "")


def amount(value: str, figure: str) -> str:
    """A value of a table as text."""
    return f"{float(value) / 1e6:,.0f} MB" if "bytes" in figure else f"{float(value):.4g}"


def against_timm(part: str, case: str, figure: str) -> Callable[[Path], Iterator[Found]]:
    """What finds a figure in vs_timm.csv.

    Args:
        part: `step` or `metric`.
        case: beginning of the case's name.
        figure: name of the figure.
    """

    def find(results: Path) -> Iterator[Found]:
        for row in read(results / "vs_timm.csv"):
            if row["part"] == part and row["case"].startswith(case) and row["figure"] == figure and row["ratio"]:
                measured = f"{amount(row['spml_fast'], figure)} against {amount(row['timm'], figure)}"
                measured += f" ({row['case']})" if part == "step" else ""
                yield Found(measured, f"{float(row['ratio']):.2f}", row["reached"] == "True", *place(row))

    return find


def labels(column: str) -> Callable[[Path], Iterator[Found]]:
    """What finds the time or the memory of preparing label files: `ratio` or `peak_bytes`."""

    def find(results: Path) -> Iterator[Found]:
        from benchmarks.label_import import GOAL_BYTES, GOAL_RATIO

        for row in read(results / "label_import.csv"):
            rows, value = f"{int(row['rows']):,} rows", float(row[column])
            if column == "ratio":
                measured = f"{float(row['prepare_s']):.1f} s against {float(row['read_s']):.1f} s, {rows}"
                yield Found(measured, f"{value:.2f}", value <= GOAL_RATIO, *place(row))
            else:
                yield Found(f"{value / 1e9:.2f} GB, {rows}", "", value <= GOAL_BYTES, *place(row))

    return find


def steps(method: str, rival: str, goal: float, on: str = "") -> Callable[[Path], Iterator[Found]]:
    """What finds a method's images/s of whole steps in tables of `bench_step.py`, against another way to train.

    Args:
        method: its name.
        rival: the way.
        goal: how many times as fast at least.
        on: part of the processor's name.
    """

    wanted = (method, "files deepspeed")

    def find(results: Path) -> Iterator[Found]:
        for path in sorted(results.glob("*_steps.csv")):
            found = [row for row in read(path) if (row["shape"].split()[0], row["mode"]) == wanted]
            rivals = {(row["shape"], *place(row)): row for row in found if row["provider"] == rival}
            for row in found:
                other = rivals.get((row["shape"], *place(row)))
                if row["provider"] == "spml_fast" and other is not None and on in row.get("cpu", ""):
                    ratio = 1 / float(other["ratio"])
                    rates = f"{float(row['images_per_second']):.1f} against {float(other['images_per_second']):.1f}"
                    precisions = " / ".join(dict.fromkeys((row["precision"], other["precision"])))
                    measured = f"{rates} images/s, {row['shape'].partition(' ')[2]}, {precisions}"
                    yield Found(measured, f"{ratio:.2f}", ratio >= goal, *place(row))

    return find


def quick_start(precision: str) -> Callable[[Path], Iterator[Found]]:
    """What finds rows of `bench_quick_start.py` in quick_start.csv.

    Args:
        precision: of the newer version.
    """

    def find(results: Path) -> Iterator[Found]:
        from benchmarks.bench_quick_start import GOALS

        for row in read(results / "quick_start.csv"):
            if row["precision"] == precision:
                ratio = float(row["ratio"])
                measured = f"{float(row['seconds']):.1f} s against {float(row['seconds_against']):.1f} s"
                measured += f", test mAP {float(row['map']):.2f} and {float(row['map_against']):.2f}"
                yield Found(measured, f"{ratio:.2f}", ratio >= GOALS[precision], *place(row))

    return find


def slowest_tests(results: Path) -> Iterator[Found]:
    """Rows of `bench_tests.py` in tests.csv: all of the tests that it compared."""
    from benchmarks.bench_tests import ALL, GOAL

    for row in read(results / "tests.csv"):
        if row["test"] == ALL:
            measured = f"{float(row['seconds']):.0f} s against {float(row['seconds_against']):.0f} s, "
            measured += f"{row['found']} of {row['slowest']} still there"
            yield Found(measured, f"{float(row['ratio']):.2f}", float(row["ratio"]) >= GOAL, *place(row))


def never(results: Path) -> Iterator[Found]:
    """Of a goal that only a machine can tell which nobody has had so far."""
    yield from ()


def loading(view: str, goal: float) -> Callable[[Path], Iterator[Found]]:
    """What finds images/s of the loader in input.csv: a row of `bench_input.py`, how many times Pillow's at least."""

    def find(results: Path) -> Iterator[Found]:
        found = [row for row in read(results / "input.csv") if row["row"] == view]
        rivals = {(row["images"], row["image_size"], *place(row)): row for row in found if row["loader"] == "pil"}
        for row in found:
            other = rivals.get((row["images"], row["image_size"], *place(row)))
            if row["loader"] == "spml_fast" and other is not None:
                ratio = float(row["speed_over_pil"])
                rates = f"{float(row['images_per_second']):,.0f} against {float(other['images_per_second']):,.0f}"
                measured = f"{rates} images/s, {row['images']} to {row['image_size']} px"
                yield Found(measured, f"{ratio:.2f}", ratio >= goal, *place(row))

    return find


def kernels(pattern: str) -> Callable[[Path], Iterator[Found]]:
    """What finds verdicts on the kernels of every card, by a pattern whose first group is the ratio."""

    def find(results: Path) -> Iterator[Found]:
        for table in sorted(results.glob("*_kernels.csv")):
            timed = [row for row in read(table) if row.get("status") == "ok"]
            if not timed:
                continue
            from benchmarks.kernel_report import judge
            from benchmarks.session_report import numbers

            rows = [numbers(dict(row)) for row in timed]
            said = judge(rows)
            said += [
                f"{row['op']} {row['mode']}: {verdict}"
                for row in rows
                for verdict in str(row.get("goal") or "").split("; ")
                if row["provider"] == "fused"
            ]
            for sentence in dict.fromkeys(said):
                if match := re.search(pattern, sentence):
                    met = "MISSED" not in sentence and not re.match(r"slower than torch.compile in [1-9]", sentence)
                    yield Found(sentence.strip(), match[1], met, *place(timed[0]))

    return find


GOALS = (
    Goal("forward and backward of the ops", "2 times", "eager PyTorch", kernels(r"best of eager PyTorch.*: ([\d.]+)x")),
    Goal("the same", "1.2 times", "torch.compile", kernels(r"best of torch.compile.*: ([\d.]+)x")),
    Goal(
        "every op, every shape", "never slower", "torch.compile", kernels(r"^slower than torch.compile in (\d+ of \d+)")
    ),
    Goal("cam_pool forward", "at most 1.15", "bare product", kernels(r"^cam_pool fwd at .* ([\d.]+)x the bare")),
    Goal("cam_pool step", "at most 1.30", "bare products", kernels(r"^cam_pool step at .* ([\d.]+)x the bare")),
    Goal("cam_pool's extra memory", "at most a tenth", "the map", kernels(r"extra memory ([\d.]+) of a bf16 map")),
    Goal("cam_mask", "85% at least", "a copy", kernels(r"(\d+%) of copy")),
    Goal("step of AN", "1.75 times", "released code's loop", steps("an", "plain", 1.75)),
    Goal("step of LL-R", "1.75 times", "released code's loop", steps("ll_r", "plain", 1.75)),
    Goal("step of IGNORE", "1.85 times", "released code's loop", steps("ignore", "plain", 1.85)),
    Goal("step of AN", "1.1 times", "a bf16 loop", steps("an", "bf16", 1.1)),
    Goal("step of LL-R", "1.1 times", "a bf16 loop", steps("ll_r", "bf16", 1.1)),
    Goal("step of IGNORE", "1.1 times", "a bf16 loop", steps("ignore", "bf16", 1.1)),
    Goal("step of AN, AMX", "4 times", "released code's loop", steps("an", "plain", 4, "AMX")),
    Goal("step of LL-R, AMX", "4 times", "released code's loop", steps("ll_r", "plain", 4, "AMX")),
    Goal("step of IGNORE, AMX", "4 times", "released code's loop", steps("ignore", "plain", 4, "AMX")),
    Goal("DeepSpeed's engine, AN", "0.98 times at least", "ours without it", steps("an", "bare", 0.98)),
    Goal("DeepSpeed's engine, IGNORE", "0.98 times at least", "ours without it", steps("ignore", "bare", 0.98)),
    Goal("loading: eval", "1.05 times", "Pillow's loader", loading("eval", 1.05)),
    Goal("loading: weak", "1.05 times", "Pillow's loader", loading("weak", 1.05)),
    Goal("loading: weak + strong", "1.0 times", "Pillow's loader", loading("weak+strong", 1.0)),
    Goal("the same, `data.strong_from resized`", "1.4 times", "Pillow's loader", loading("weak+strong resized", 1.4)),
    Goal("loading: eval, `data.decode reduced`", "1.3 times", "Pillow's loader", loading("eval reduced", 1.3)),
    Goal("loading: weak, `data.decode reduced`", "1.3 times", "Pillow's loader", loading("weak reduced", 1.3)),
    Goal("loading on a GPU", "twice", "what IGNORE's ResNet-50 takes at 448 px", never),
    Goal("host waits in a step on a GPU", "0", "", never),
    Goal("quick start, fp32", "1.15 times", "the first version compared", quick_start("fp32")),
    Goal("quick start, bf16", "1.4 times, where bf16 pays", "the first version compared, in fp32", quick_start("bf16")),
    Goal("the ten slowest tests", "half", "the first version compared", slowest_tests),
    Goal("images/s of training", "1.2 times", "timm", against_timm("step", "", "images/s")),
    Goal("memory of training", "half", "timm", against_timm("step", "", "memory bytes")),
    Goal("metrics of 40,137 x 80", "5 times", "timm", against_timm("metric", "40137 x 80", "evaluation s")),
    Goal("their memory", "half", "timm", against_timm("metric", "40137 x 80", "memory bytes")),
    Goal(
        "AP of 1,799,883 annotated pairs", "100 times", "timm", against_timm("metric", "125436 x 9605", "evaluation s")
    ),
    Goal("their memory", "half", "timm", against_timm("metric", "125436 x 9605", "memory bytes")),
    Goal("preparing label files", "at most 3", "pyarrow's reading", labels("ratio")),
    Goal("its memory", "at most 2 GB", "", labels("peak_bytes")),
)


def table(results: Path) -> str:
    """The table in Markdown, a line for each goal and machine."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for goal in GOALS:
        start = [goal.what, goal.goal, goal.rival]
        found = list(goal.find(results))
        for one in found:
            cells = [*start, one.measured, one.ratio, "yes" if one.met else "**no**", one.machine, one.when]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        if not found:
            lines.append("| " + " | ".join([*start, "not measured", "", "", "", ""]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    text = table(options.results)
    MARKS.show(text, options.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
