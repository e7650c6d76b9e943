"""What describes a run, and what is said when it is resumed with other options."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import load_run_config
from spml_fast.runs.recipe import to_yaml
from spml_fast.runs.write import changed_options, write_description, write_results


@pytest.fixture(scope="module")
def config():
    return parse_config(["--method", "ll_r", "--data.dir", "data/mine"])


def with_options(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_description(config, tmp_path):
    layout = RunLayout(tmp_path)
    assert write_description(layout, config, {"train_batch_size": 4}, ["a b", "ü"]) is None
    assert load_run_config(tmp_path) == config
    assert json.loads(layout.deepspeed.read_text()) == {"train_batch_size": 4}
    assert layout.classes.read_text(encoding="utf-8") == "a b\nü\n"
    assert write_description(layout, config, {}, ["a b", "ü"]) is None
    other = with_options(with_options(config, "train", epochs=3, linear_lr=0.5), "data", hflip=0.0)
    note = "resuming with changed options: data.hflip 0.5 -> 0.0; train.epochs 10 -> 3; train.linear_lr null -> 0.5"
    assert write_description(layout, other, {}, ["a b", "ü"]) == note
    assert load_run_config(tmp_path) == other


def test_another_method_is_one_change(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert changed_options(path, parse_config(["--method", "an", "--data.dir", "data/mine"])) == [
        "method.name ll_r -> an"
    ]
    assert changed_options(path, with_options(config, "method", delta_rel=5.0)) == [
        f"method.delta_rel {config.method.delta_rel} -> 5.0"
    ]


def test_another_head_is_one_change(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    other = parse_config(["--method", "ll_r", "--data.dir", "data/mine", "--model.head", "query2label"])
    assert changed_options(path, other) == [
        "model.head cam -> query2label",
        "model.alpha_train 5.0 -> 1.0",
        "model.alpha_eval 5.0 -> 1.0",
    ]


def test_options_that_a_recipe_lacks_have_their_defaults(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("method: {name: ll_r}\ndata: {dir: data/mine}\n", encoding="utf-8")
    assert changed_options(path, config) == []
    extra = with_options(config, "deepspeed", extra={"wandb": {"enabled": True}})
    assert changed_options(path, extra) == ["deepspeed.extra.wandb.enabled null -> true"]


def test_a_recipe_that_cannot_be_read_is_said_and_written_anew(config, tmp_path):
    layout = RunLayout(tmp_path)
    layout.config.write_text("train: {epochs: 3", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        changed_options(layout.config, config)
    note = write_description(layout, config, {}, [])
    assert note is not None and "are not known" in note and str(layout.config) in note and "\n" not in note
    assert load_run_config(tmp_path) == config


def test_results(tmp_path):
    write_results(RunLayout(tmp_path), {"alpha": {"1": {"map": float("nan")}}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"alpha": {"1": {"map": None}}}
