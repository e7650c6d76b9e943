"""Recipes and command lines: what is accepted, what wins, and what is said about mistakes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spml_fast.cli.parse import default_recipe_of, parse_config
from spml_fast.core.config import SECTIONS, Config, DataConfig, EvalConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.methods import get_method, method_names
from spml_fast.runs.options import build_parser
from spml_fast.runs.recipe import check_keys, load_config, to_yaml
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and give its path."""

    def write(content: str | dict[str, Any], name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def refused(capsys, *argv: str) -> str:
    """What is said when the parser leaves with status 2."""
    with pytest.raises(SystemExit) as left:
        parse_config(list(argv))
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_defaults():
    config = parse_config([])
    assert config.method == get_method("ll_r").Options(name="ll_r")
    assert config.data == DataConfig() and config.train == TrainConfig() and config.eval == EvalConfig()


def test_command_line_wins_over_recipe_and_later_recipe_over_earlier(recipe):
    first = recipe({"train": {"lr": 0.5, "epochs": 3}, "data": {"image_size": 64}}, "a.yaml")
    second = recipe({"train": {"lr": 0.25}}, "b.yaml")
    config = parse_config(["--config", first, "--config", second, "--train.epochs", "7"])
    assert (config.train.lr, config.train.epochs, config.data.image_size) == (0.25, 7, 64)
    config = parse_config([f"--config={second}", f"--config={first}", "--train.epochs=7"])
    assert (config.train.lr, config.train.epochs) == (0.5, 7)
    # Wherever it stands: the recipe of the digit scenes names their data.
    for words in (["--config", first], [f"--config={first}"], ["--config", second, "--config", first]):
        config = parse_config(["--train.lr", "0.125", *words])
        assert (config.train.lr, config.train.epochs) == (0.125, 3)
    assert parse_config(["--data.dir", "mine", "--config", "digits"]).data.dir == "mine"


def test_values_of_every_kind():
    words = "--train.betas [0.8,0.9] --data.val_split null --eval.alphas [1,2.5] --model.pretrained false"
    config = parse_config([*words.split(), "--deepspeed.extra", "{wandb: {enabled: true}}", "--deepspeed.zero_stage=2"])
    assert config.train.betas == [0.8, 0.9] and config.data.val_split is None and config.eval.alphas == [1.0, 2.5]
    assert config.model.pretrained is False
    assert config.deepspeed.extra == {"wandb": {"enabled": True}} and config.deepspeed.zero_stage == 2


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_as_people_write_them_in_yaml(recipe, number):
    assert parse_config(["--config", recipe(f"train: {{lr: {number}}}")]).train.lr == 1e-4


@pytest.mark.parametrize("content", ["", "# nothing\n", "train:\n", "{}"])
def test_empty_recipes_and_sections(recipe, content):
    assert parse_config(["--config", recipe(content)]).train == TrainConfig()


def test_default_recipe_only_without_recipe(recipe):
    default = Path(recipe({"train": {"epochs": 99}}, "default.yaml"))
    assert parse_config(["--train.lr", "1"], default).train.epochs == 99
    assert parse_config(["--train.epochs", "98"], default).train.epochs == 98
    other = recipe({"train": {"lr": 1.0}}, "other.yaml")
    assert parse_config(["--config", other], default).train.epochs == 10


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "digits"),
        (["--method", "an", "--train.lr", "1"], "digits"),
        (["--data.dir", "x"], "finetune"),
        (["--data.dir=x", "--model.pretrained=true", "--run.dir", "nowhere"], "finetune"),
        (["--data.dir", "x", "--model.pretrained", "false"], "scratch"),
        (["--data.dir", "x", "--model.pretrained", "false", "--model.weights", "w.safetensors"], "finetune"),
        (["--config", "coco_boostlu", "--data.dir", "x"], None),
        (["--config=coco_boostlu"], None),
        (["--data", '{"dir": "x"}'], "finetune"),
        (["--data", '{"image_size": 64}'], "digits"),
        (["--data.dir", "null"], "digits"),
        (["--data.dir", "~"], "digits"),
        (["--data.dir", "x", "--model.pretrained", "off"], "scratch"),
        (["--data.dir", "x", "--model", '{"pretrained": false}'], "scratch"),
        (["--data.dir", "x", "--model.weights", "null", "--model.pretrained", "false"], "scratch"),
        (["--data.dir", "x", "--help"], "digits"),
    ],
)
def test_which_recipe_a_command_line_without_one_takes(argv, name):
    assert default_recipe_of(["--local_rank=0", *argv]) == name


def test_own_images_have_a_recipe_of_their_own():
    config = parse_config(["--data.dir", "x", "--train.batch_size", "32"], "finetune")
    assert config.model.freeze_bn and config.train.best_of == "run" and config.data.image_size == 224
    assert (config.train.epochs, config.train.linear_epochs, config.train.batch_size) == (None, None, 32)
    published = parse_config(["--data.dir", "x"], "published")
    assert published == parse_config(["--data.dir", "x"]), "the options' own defaults are the papers'"


def test_a_run_of_an_older_version_keeps_what_its_command_line_meant(tmp_path):
    words = ["--data.dir", "x", "--run.dir", str(tmp_path)]
    config = parse_config(words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert default_recipe_of(words) == "finetune"
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("  best_of: finetune\n", ""))
    assert default_recipe_of(words) == "published"
    (tmp_path / "config.yaml").write_text("train: [")
    assert default_recipe_of(words) == "finetune"


@pytest.mark.parametrize("words", [["--method", "ll_cp"], ["--method=ll_cp"], ["--method.name", "ll_cp"]])
def test_method_shorthand(words):
    config = parse_config([*words, "--method.delta_rel", "0.3"])
    assert config.method == get_method("ll_cp").Options(name="ll_cp", delta_rel=0.3)


def test_method_from_a_recipe(recipe):
    path = recipe({"method": {"name": "ll_ct", "delta_rel": 3}})
    assert parse_config(["--config", path]).method == get_method("ll_ct").Options(delta_rel=3.0)
    assert parse_config(["--config", path, "--method", "ll_ct"]).method.delta_rel == 3.0
    assert parse_config(["--config", path, "--method.delta_rel", "4"]).method.delta_rel == 4.0


def test_another_method_on_the_command_line_drops_the_recipes_method_options(recipe):
    path = recipe({"method": {"name": "ll_ct", "delta_rel": 3}, "train": {"epochs": 4}})
    config = parse_config(["--config", path, "--method", "ll_r"])
    assert config.method == get_method("ll_r").Options(name="ll_r") and config.method.delta_rel == 0.5
    assert config.train.epochs == 4
    assert parse_config(["--config", path, "--method", "an"]).method == get_method("an").Options(name="an")
    assert parse_config([f"--config={path}", "--method=an", "--train.epochs", "5"]).train.epochs == 5


def test_an_option_that_the_method_does_not_have(recipe, capsys):
    said = refused(capsys, "--method", "an", "--method.delta_rel", "3")
    assert "--method.delta_rel" in said
    with pytest.raises(UserError, match="section method has no option 'delta_rel'"):
        parse_config(["--config", recipe({"method": {"name": "an", "delta_rel": 3}})])
    path = recipe({"method": {"delta_rel": 3}})
    assert parse_config(["--config", path]).method.delta_rel == 3
    said = refused(capsys, "--config", path, "--method", "an")
    assert path in said and "delta_rel" in said


def test_an_unknown_method(recipe):
    for argv in (["--method", "ll_x"], ["--config", recipe({"method": {"name": "ll_x"}})]):
        with pytest.raises(UserError, match="no method 'll_x'; choose one of an, "):
            parse_config(argv)
    with pytest.raises(UserError, match=re.escape("write `method: {name: ll_ct}`")):
        parse_config(["--config", recipe("method: ll_ct")])


def test_unknown_keys_name_file_section_and_key(recipe):
    path = recipe({"train": {"batchsize": 3}})
    with pytest.raises(UserError) as error:
        parse_config(["--config", path])
    assert str(error.value) == f"recipe {path}: section train has no option 'batchsize'; did you mean batch_size?"
    with pytest.raises(UserError, match="has no section 'trian'; did you mean train"):
        parse_config(["--config", recipe({"trian": {}})])
    with pytest.raises(UserError, match="section method has no option 'delta'"):
        parse_config(["--config", recipe({"method": {"name": "ll_r", "delta": 1}})])
    with pytest.raises(UserError, match="section train must hold options, not 3"):
        parse_config(["--config", recipe("train: 3")])
    check_keys({"method": {"anything": 1}, "train": None}, "x", None)


def test_unknown_options_get_a_suggestion(capsys):
    assert "--train.bach_size 3; did you mean --train.batch_size?" in refused(capsys, "--train.bach_size", "3")
    assert "extra" in refused(capsys, "extra")


@pytest.mark.parametrize("word", ["--train.epoch", "--train.batch", "--data.di", "--conf"])
def test_abbreviations_are_refused(capsys, word):
    assert word in refused(capsys, word, "3")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train.epochs", "2.5"),
        ("train.epochs", "many"),
        ("train.lr", "fast"),
        ("train.schedule", "linear"),
        ("model.pretrained", "perhaps"),
        ("train.betas", "0.9"),
        ("deepspeed.zero_stage", "4"),
        ("method.ties", "loose"),
        ("deepspeed.extra", "3"),
    ],
)
def test_wrong_types(capsys, recipe, option, value):
    said = refused(capsys, f"--{option}", value)
    assert f'"{option}"' in said and "typing" not in said and "class" not in said
    section, key = option.split(".")
    path = recipe(f"{section}: {{{key}: {value}}}")
    said = refused(capsys, "--config", path)
    assert f"recipe {path}: " in said and f'"{option}"' in said


def test_a_missing_value(capsys):
    for word in ("--train.lr", "--config", "--method"):
        assert "expected one argument" in refused(capsys, word)


def test_unreadable_recipes(recipe, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"recipe {tmp_path}/none.yaml cannot be read: No such file")):
        parse_config(["--config", f"{tmp_path}/none.yaml"])
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        parse_config(["--config", str(tmp_path)])
    with pytest.raises(UserError, match="not valid YAML in line 3"):
        parse_config(["--config", recipe("train:\n  lr: 1\n bad: [\n")])
    with pytest.raises(UserError, match="must have sections"):
        parse_config(["--config", recipe("[1, 2]")])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((f"train.{name}", "0") for name in ("batch_size", "accumulation", "epochs", "log_every")),
        ("train.lr", "0"),
        ("train.lr", ".nan"),
        ("train.linear_lr", "0"),
        ("train.head_lr_multiplier", "-1"),
        ("train.warmup_share", "1.5"),
        ("train.ema_decay", "-0.1"),
        ("train.betas", "[0.9]"),
        ("train.betas", "[0.9,1.0]"),
        ("train.weight_decay", "-1"),
        ("train.momentum", "-1"),
        ("train.clip", "-1"),
        ("train.linear_epochs", "-1"),
        ("train.stop_after_drop", "-1"),
        ("data.image_size", "0"),
        ("data.hflip", "2"),
        ("data.crop_scale", "-0.5"),
        ("data.prefetch", "0"),
        ("data.threads", "-1"),
        ("data.mean", "[0.5]"),
        ("data.std", "[0.5,0.5,0]"),
        ("eval.alphas", "[1,0]"),
        ("eval.alphas", "[1,.nan]"),
        ("eval.batch_size", "0"),
        ("eval.every", "0"),
        ("eval.threshold", "1.1"),
        ("model.alpha_train", "0"),
        ("model.alpha_eval", "-2"),
        ("run.keep", "0"),
        ("run.save_updates", "-1"),
        ("run.seed", "-1"),
        ("run.seed", str(2**63)),
    ],
)
def test_values_without_meaning_name_the_option(option, value):
    section, key = option.split(".")
    default = SECTIONS[section]()
    with pytest.raises(UserError, match=re.escape(option)) as error:
        dataclasses.replace(default, **{key: yaml.safe_load(value)})
    assert "\n" not in str(error.value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(default, key, getattr(default, key))


def test_parsing_validates():
    with pytest.raises(UserError, match=r"train.epochs is -1; it must be greater than 0"):
        parse_config(["--train.epochs=-1"])


def test_ema_needs_whole_weights():
    with pytest.raises(UserError, match="zero_stage 3"):
        parse_config(["--train.ema_decay", "0.99", "--deepspeed.zero_stage", "3"])
    parse_config(["--train.ema_decay", "0.99", "--deepspeed.zero_stage", "2"])


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local_rank", "3"], []])
def test_the_launchers_local_rank_is_passed_over(words):
    for argv in ([*words, "--train.lr", "0.5"], ["--train.lr", "0.5", *words]):
        assert parse_config(argv).train.lr == 0.5


@pytest.mark.parametrize("method", method_names())
def test_resolved_recipe_round_trip(tmp_path, method):
    words = ["--method", method, "--train.lr", "3e-5", "--eval.alphas", "[1,5]", "--data.mean", "[0.1,0.2,0.3]"]
    words += ["--deepspeed.extra", "{wandb: {enabled: true}}", "--data.dir", "päth/with: colon", "--run.dir", "1e3"]
    config = parse_config(words)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config and type(again.method) is type(config.method) is get_method(method).Options
    if method in ("an", "ll_r"):
        assert parse_config(["--config", str(path)]) == config
    assert to_yaml(again) == to_yaml(config)


def test_a_recipe_of_another_version(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path)
    for content in ("train: {steps: 3}", "method: {name: gone}", "oven: {heat: 3}"):
        path.write_text(content)
        with pytest.raises(UserError):
            load_config(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_published_recipes_parse(path):
    config = parse_config(["--config", str(path)])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in written.items():
        for key, value in values.items():
            found = getattr(getattr(config, section), key)
            if key == "head_options":
                found = {name: getattr(found, name) for name in value}
            assert found == value or float(found) == float(value), f"{section}.{key}"
    for method in ("an", "ll_r"):
        assert parse_config(["--config", str(path), "--method", method]).method.name == method


def documented_fields(cls: type) -> set[str]:
    """Fields with a text under `Attributes:` in the class's docstring."""
    _, _, attributes = (cls.__doc__ or "").partition("Attributes:")
    return {name for name, text in re.findall(r"^ {8}(\w+): *(\S.*)$", attributes, re.M) if text.strip()}


@pytest.mark.parametrize("cls", [*SECTIONS.values(), *(get_method(m).Options for m in method_names())])
def test_every_field_has_a_help_text(cls):
    assert documented_fields(cls) == {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("method", method_names())
def test_help_lists_every_field(capsys, monkeypatch, method):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as left:
        parse_config(["--method", method, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    sections = {**SECTIONS, "method": get_method(method).Options}
    assert set(sections) == {f.name for f in dataclasses.fields(Config)}
    for section, cls in sections.items():
        for field in dataclasses.fields(cls):
            line = re.search(rf"^ +--{section}\.{field.name} .*?(?=^ +--|^\S|\Z)", text, re.M | re.S)
            assert line, f"--{section}.{field.name}"
            # The option, its placeholder, then words; jsonargparse adds type and default by itself.
            words = re.sub(r"\((required, )?type: .*", "", line[0], flags=re.S).split()
            assert len(words) > 3, line[0]


def test_help_does_not_show_what_launchers_add():
    assert "local_rank" not in build_parser().format_help()
