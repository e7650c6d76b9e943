"""`spml-fast train [--config RECIPE] [--section.field value ...]`: train, on one process or under a launcher."""

from __future__ import annotations

import sys

from spml_fast.cli.common import program

DEFAULT_RECIPE = "digits"


def main(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, train."""
    from spml_fast.training.watch import watch_launchers

    # At once: what follows imports libraries for seconds, in which a launcher may die as well.
    watch_launchers()
    from spml_fast.training.cluster import set_environment

    # Under SLURM the messages below say which rank they are of.
    set_environment()
    from spml_fast.cli.parse import parse_config

    config = parse_config(sys.argv[1:] if argv is None else argv, DEFAULT_RECIPE, prog=program("train"))
    from spml_fast.training.engine import init_distributed, shutdown_distributed

    device = init_distributed(config.run.timeout_minutes)
    from spml_fast.training.peers import reporting
    from spml_fast.training.trainer import Trainer

    with reporting():
        Trainer(config, device).run()
    shutdown_distributed()
    return 0
