"""`spml-fast reproduce [--preset P] [--seeds 3] ...`: the papers' comparison, and which statements hold."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_text
from spml_fast.core.outputs import OutputFile, writer_name
from spml_fast.core.progress import BETWEEN, Task, say, under_way
from spml_fast.core.text import without_controls
from spml_fast.core.urls import is_url
from spml_fast.runs.layout import RunLayout

if TYPE_CHECKING:
    from spml_fast.reproduction.entries import Entry, Preset

DESCRIPTION = """Train the papers' comparison and say which of their statements hold. Finished runs are kept and not
repeated, so the command can be stopped and started again; with other options it wants another --out.

Any other option, such as --train.epochs 2, goes to every training run."""
EXAMPLES = [
    ("", "seven settings, three seeds each, on digit scenes"),
    ("--methods an,ll_r --seeds 1", "two of them, once"),
    ("--preset voc --data data/voc --ranks 8", "published numbers beside measured ones"),
    ("--preset photos --data.dir data/photos", "the same statements on your own photographs"),
]


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is handed on to `train`."""
    parser = common.command_parser("reproduce", "[OPTIONS] [OPTIONS OF train]", DESCRIPTION, EXAMPLES)
    presets = "digits, photos, voc, coco, nuswide or cub"
    parser.add_argument("--preset", default="digits", help=f"{presets} (default: %(default)s)")
    parser.add_argument("--methods", help="comma-separated entries of the preset; default all")
    parser.add_argument("--seeds", type=int, default=3, help="runs an entry, seeds 0 to N-1 (default: %(default)s)")
    where = "Manifest directory, when it is not where the preset's recipes look; photos needs one"
    parser.add_argument("--data", "--data.dir", help=where)
    parser.add_argument("--out", type=Path, help="folder of runs and tables (default: runs/reproduce-PRESET)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks a run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write rows and statements to this file")
    common.add_overwrite(parser)
    args, more = parser.parse_known_args(argv)
    common.load_named_plugins(args)
    return args, [*(word for name in args.plugins for word in ("--plugins", name)), *more]


def train(entry_dir: Path, words: list[str], ranks: int, show: Callable[[str], None]) -> None:
    """One run, its output in train.log; `UserError` with the last line when it fails.

    Args:
        entry_dir: of the run.
        words: of `spml-fast train`.
        ranks: of the run.
        show: called with every line of its output.
    """
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks), "--module"]
    head = [*([sys.executable, "-m"] if ranks == 1 else launcher), "spml_fast", "train"]
    entry_dir.mkdir(parents=True, exist_ok=True)
    log = entry_dir / "train.log"
    lines = list[str]()
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        subprocess.Popen([*head, *words], errors="replace", **output) as run,
    ):
        assert run.stdout is not None
        try:
            for line in run.stdout:
                file.write(line)
                if line.strip():
                    lines.append(line.strip())
                    show(lines[-1])
        except BaseException:
            run.kill()
            raise
    if run.returncode:
        errors = [line for line in lines if "error:" in line]
        last = (errors or lines or ["no output"])[-1]
        raise UserError(f"a run failed ({last}); all of its output is in {log}")


def show_line(task: Task, line: str) -> None:
    """A line of a run's output as what is known of the task, which is shown now and then."""
    task.change(task.name, task.done, line.split(BETWEEN), task.left)


def check_arguments(args: argparse.Namespace, preset: Preset) -> None:
    """Raise `UserError` for no seeds, or a preset without the data set that it needs."""
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; it must be at least 1")
    if preset.needs_data and args.data is None:
        raise UserError(f"preset {preset.name} needs --data.dir: {preset.needs_data}")


def train_all(args: argparse.Namespace, entries: Sequence[Entry], runs: dict[str, list[Path]], more: list[str]) -> None:
    """Train what is missing, a seed of every entry before the next.

    Args:
        args: the command line.
        entries: of the preset.
        runs: entry name -> run directories, one per seed.
        more: options for every run.

    Raises:
        UserError: a run failed, or one that is there has other options.
    """
    from spml_fast.reproduction.reproduce import check_options, note_options

    data = [] if args.data is None else ["--data.dir", args.data if is_url(args.data) else os.path.abspath(args.data)]
    # What decides a run's figures, but for its seed, which is part of its folder's name.
    chosen = {e.name: ["--recipe", e.recipe, "--method", e.method, *e.options, *data, *more] for e in entries}
    for entry in entries:
        for run in runs[entry.name]:
            check_options(run, chosen[entry.name])
    todo = [(e, s) for s in range(args.seeds) for e in entries if not RunLayout(runs[e.name][s]).results.exists()]
    start = time.monotonic()
    for done, (entry, seed) in enumerate(todo):
        left = (time.monotonic() - start) / done * (len(todo) - done) if done else None
        name = f"run {done + 1} of {len(todo)}: {entry.name}, seed {seed}"
        say(name if left is None else f"{name}, about {left / 60:.0f} min left")
        run = runs[entry.name][seed]
        words = ["--config", entry.recipe, "--method", entry.method, *entry.options]
        words += ["--run.seed", str(seed), "--run.dir", str(run), "--eval.alphas", json.dumps(entry.alphas)]
        words += (["--data.dir", args.data] if args.data else []) + more
        note_options(run, chosen[entry.name])
        with under_way(Task(name, len(todo), "", done, (), left)) as task:
            train(run, words, args.ranks, partial(show_line, task))


def table_files(out: Path, overwrite: bool) -> list[OutputFile]:
    """The tables in the folder of runs, checked."""
    from spml_fast.reproduction.reproduce import CSV_HEADER, MARKDOWN_HEADER

    files = [
        OutputFile(out / "table.md", "table", MARKDOWN_HEADER, "--out", overwrite),
        OutputFile(out / "table.csv", "csv", ",".join(CSV_HEADER), "--out", overwrite),
        OutputFile(out / "table.png", "png", writer_name("reproduce"), "--out", overwrite),
    ]
    for file in files:
        file.check(parent=False)
    return files


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then show and write the table."""
    args, more = parse(argv)
    from rich.console import Console

    from spml_fast.reproduction.presets import choose_entries, get_preset
    from spml_fast.reproduction.reproduce import (
        as_json,
        as_markdown,
        as_table,
        check_claims,
        collect,
        plot,
        write_csv,
    )
    from spml_fast.runs.recipe import load_config

    preset = get_preset(args.preset)
    entries = choose_entries(preset, args.methods.split(",") if args.methods else None)
    check_arguments(args, preset)
    out = args.out or Path("runs") / f"reproduce-{preset.name}"
    files = table_files(out, args.overwrite)
    json_out = common.output_file(args, "json", "json", writer_name("reproduce"))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    runs = {e.name: [out / f"{e.name}-s{seed}" for seed in range(args.seeds)] for e in entries}
    train_all(args, entries, runs, more)
    heads = {e.name: load_config(RunLayout(runs[e.name][0]).config).model.head for e in entries}
    rows = collect(runs, entries, heads)
    statements = check_claims(preset, rows)
    console.print(as_table(preset, rows))
    for statement in statements:
        console.print(f"{'holds   ' if statement['holds'] else 'FAILS   '} {statement['text']}")
    for file in files:
        file.check()
    write_text(out / "table.md", as_markdown(preset, rows, statements))
    write_csv(out / "table.csv", rows)
    plot(out / "table.png", rows, runs)
    if json_out is not None:
        json_out.write_json(as_json(rows, statements))
    files_text = f"table and plot: {out / 'table.md'}, {out / 'table.csv'}, {out / 'table.png'}"
    console.print(without_controls(files_text), markup=False)
    return 0
