"""Baselines' state in checkpoints, and their options in recipes."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.cli.parse import parse_config
from spml_fast.methods import Method, Progress, get_method
from spml_fast.runs.recipe import build_parser, load_config, to_yaml
from tests.support.formulas import (
    BASELINES,
    batch_of,
    make,
    role_schedule,
    run,
    some_codes,
    some_logits,
)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", BASELINES)
def test_state_survives_a_checkpoint(name: str) -> None:
    """A run that is cut within an epoch goes on bit for bit; the state loads strictly into a fresh method."""
    codes = some_codes(24, 6)
    truth = np.maximum(codes, 0)
    plan = role_schedule(24, 7, 4, 6)
    options: dict[str, Any] = {"em_apl": {"warm_up": 1}, "p_asl": {"prior": "running", "top_k": 1, "eta": 0.5}}.get(
        name, {}
    )

    def go(method: Method, steps: list[tuple[np.ndarray, Tensor, Progress]], starts: bool) -> list[Tensor]:
        losses = []
        for i, (index, logits, progress) in enumerate(steps):
            within = progress.update % progress.updates_per_epoch
            if within == 0 or (i == 0 and starts):
                method.on_epoch_start(progress)
            losses.append(run(method, logits, batch_of(codes, index, truth=truth), progress)[0])
            if within == progress.updates_per_epoch - 1:
                end = replace(progress, update=progress.update + 1)
                if method.needs_train_scores(end):
                    scores = some_logits(24, 6, progress.epoch)
                    method.on_train_scores(torch.arange(24), scores.float())
                method.on_epoch_end(end)
        return losses

    whole = make(name, codes, **options)
    losses = go(whole, plan, True)
    cut = 10
    first = make(name, codes, **options)
    go(first, plan[:cut], True)
    state, shard = copied(first.state_dict()), copied(first.rank_state())
    torch.manual_seed(99)
    second = get_method(name)(first.options, first.store)
    second.load_state_dict(state)
    if shard:
        second.load_rank_state([shard])
    assert go(second, plan[cut:], True) == losses[cut:]
    before, after = whole.state_dict() | whole.rank_state(), second.state_dict() | second.rank_state()
    assert before.keys() == after.keys()
    for key in before:
        if isinstance(before[key], Tensor):
            assert torch.equal(before[key], after[key]), key
    if name == "em_apl":
        assert whole.total == second.total > 20
    if name in ("role", "em_apl", "p_asl"):
        fresh = make(name, codes, **options)
        assert go(fresh, plan[cut:], True) != losses[cut:], "the state makes no difference: the test tells nothing"


@pytest.mark.parametrize("name", BASELINES)
def test_options_have_help_and_travel_through_yaml(name: str, tmp_path: Any) -> None:
    helps = {action.dest: action.help for action in build_parser(name)._actions}
    for field in dataclasses.fields(get_method(name).Options):
        assert helps[f"method.{field.name}"], f"--method.{field.name} has no help"
    config = parse_config(["--method", name, "--data.dir", "x"])
    assert config.method.name == name and type(config.method) is get_method(name).Options
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path).method == config.method
