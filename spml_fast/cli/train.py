"""`spml-fast train [--config RECIPE] [--section.field value ...]`: train, on one process or under a launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spml_fast.core.env import has_launcher
from spml_fast.core.invocation import command_line, next_lines, program

if TYPE_CHECKING:
    from spml_fast.core.config import Config


def recipe_line(recipe: str, config: Config) -> str:
    """Which recipe was taken because none was named, and what names the papers'."""
    if config.data.dir is None:
        return f"recipe: {recipe}"
    return f"recipe: {recipe}, since --config names none (the papers' settings: --config published, coco_boostlu, ...)"


def commands_after(run: str, plugins: Sequence[str] = ()) -> list[str]:
    """What to try next with a finished run.

    Args:
        run: its directory.
        plugins: that it needs.
    """
    more = [word for name in plugins for word in ("--plugins", name)]
    return [
        command_line("evaluate", "--run", run, "--per-class", *more),
        command_line("report", run, "--out", f"{run}/report.html", *more),
        command_line("explain", "--run", run, *more),
        command_line("suggest", "--run", run, *more),
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, train."""
    from spml_fast.training.watch import watch_launchers

    # At once: what follows imports libraries for seconds, in which a launcher may die as well.
    watch_launchers()
    from spml_fast.training.cluster import set_environment

    # Under SLURM the messages below say which rank they are of.
    set_environment()
    from spml_fast.cli.parse import default_recipe_of, parse_config

    words = sys.argv[1:] if argv is None else argv
    recipe = default_recipe_of(words)
    config = parse_config(words, recipe, prog=program("train"))
    from spml_fast.training.engine import init_distributed, shutdown_distributed

    device = init_distributed(config.run.timeout_minutes)
    from spml_fast.core.distributed import is_main
    from spml_fast.core.process import keep_what_exists
    from spml_fast.core.progress import say
    from spml_fast.core.text import in_whole_words
    from spml_fast.training.peers import reporting
    from spml_fast.training.signals import Interrupted
    from spml_fast.training.trainer import Trainer

    if recipe is not None and is_main():
        say(recipe_line(recipe, config))
    status = 0
    try:
        keep_what_exists()
        with reporting():
            results = Trainer(config, device, program=True).run()
        if is_main():
            say(next_lines(commands_after(results["run"], config.run.plugins)), whole=True)
    except Interrupted as stop:
        status = stop.status
        if is_main():
            more = " A launcher's own lines about this status, below, say nothing new." if has_launcher() else ""
            line = f"{stop} (exit status {status}).{more}"
            print(in_whole_words(line, sys.stderr), file=sys.stderr, flush=True)
    shutdown_distributed()
    return status
