"""Train: `deepspeed launch/train.py [--config RECIPE.yaml] [--section.field value ...]`.

Without arguments it trains on the embedded digit scenes. `--help` explains every option.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from spml_fast.core.errors import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error

DEFAULT_RECIPE = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> None:
    """Parse, join the other ranks, train."""
    from spml_fast.train.cluster import set_environment
    from spml_fast.train.engine import init_distributed, shutdown_distributed

    set_environment()
    from spml_fast.cli.parse import parse_config

    config = parse_config(sys.argv[1:], DEFAULT_RECIPE, prog="train.py")
    device = init_distributed()
    from spml_fast.train.trainer import Trainer

    Trainer(config, device).run()
    shutdown_distributed()


if __name__ == "__main__":
    run_command(main)
