"""What packaged recipes promise beyond what their parsers check."""

from __future__ import annotations

import pytest

from spml_fast.cli.parse import parse_config
from spml_fast.runs.recipes import recipe_names

RELEASED = [
    name
    for name in recipe_names()
    if name.split("_", 1)[0] in ("voc", "coco", "nuswide", "cub")
    and name.split("_", 1)[1] in ("boostlu", "large_loss", "ignore", "ignore_q2l")
]


def test_there_are_such_recipes() -> None:
    assert len(RELEASED) == 16


@pytest.mark.parametrize("name", RELEASED)
def test_recipes_of_releases_compute_as_they_do(name: str) -> None:
    """In fp32 on every device; groups of 16 images; IGNORE's lambdas once for a short last batch too."""
    config = parse_config(["--config", name])
    assert config.train.precision == "fp32" and not config.train.drop_last
    options = config.method
    if "ignore" in name:
        assert options.choice("ema_partial") == "whole" and config.train.batch_size == options.ema_batch  # type: ignore[attr-defined]
    else:
        assert options.batch_semantics == "paper"  # type: ignore[attr-defined]
