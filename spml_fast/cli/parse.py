"""From the command line and YAML files to a `Config`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spml_fast.cli.common import split_plugins, without_launcher_words
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.heads.base import head_options
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.options import DEFAULT_METHOD, build_parser, option_names
from spml_fast.runs.plugins import load_plugins, require_plugins
from spml_fast.runs.recipe import check_keys, chosen_head, chosen_method, named_plugins, read_recipe, to_config
from spml_fast.runs.recipes import default_recipe

Recipe = dict[str, Any]


def _option_values(argv: Sequence[str], *names: str) -> list[str]:
    """Values given to options on the command line, in order."""
    values = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            if equals:
                values.append(value)
            elif i + 1 < len(argv):
                values.append(argv[i + 1])
    return values


# Short for others.
SHORT = {"--method": "--method.name", "--profile": "--run.profile"}
HELP = {"-h", "--help"}


def default_recipe_of(argv: Sequence[str]) -> str | None:
    """The packaged recipe that a command line of `train` without `--config` takes; None where it names its own.

    A run that a version before 0.2.0 began is resumed with what its command line meant then.
    """
    argv = without_launcher_words(argv)
    if _option_values(argv, "--config"):
        return None
    if HELP.intersection(argv):
        return default_recipe(False, False)
    return default_recipe_for(parse_config(argv))


def default_recipe_for(config: Config) -> str:
    """The packaged recipe for options that were parsed without one: by their values, however they were written."""
    own_data = config.data.dir is not None
    if own_data and config.run.dir is not None and _begun_before_recipes(Path(config.run.dir)):
        return "published"
    return default_recipe(own_data, not config.model.pretrained and config.model.weights is None)


def _begun_before_recipes(run: Path) -> bool:
    path = RunLayout(run).config
    try:
        train = read_recipe(str(path.absolute())).get("train") if path.is_file() else None
    except UserError:
        return False
    return isinstance(train, dict) and "best_of" not in train


def parse_config(argv: Sequence[str], recipe: Path | str | None = None, prog: str | None = None) -> Config:
    """Parse a command line.

    Args:
        argv: arguments without the program's name. The `--local_rank` that launchers add is accepted and ignored.
        recipe: used when no `--config` is given: a path, or the name of a packaged one.
        prog: the program's name for usage lines.

    Raises:
        UserError: an unreadable recipe, an unknown method or head, or a plugin that cannot be imported. Unknown options
            and wrong types end the program with status 2 and a message that names them.
    """
    argv = without_launcher_words(argv)
    files = _option_values(argv, "--config")
    if not files and recipe is not None:
        files = [str(recipe)]
        argv = ["--config", str(recipe), *argv]
    return parse_words(argv, [(path, read_recipe(path)) for path in files], prog)


def parse_words(
    argv: Sequence[str], recipes: Sequence[tuple[str, Recipe]], prog: str | None = None, raises: bool = False
) -> Config:
    """Parse a command line whose recipes have been read.

    Args:
        argv: the words; each `--config NAME` stands for the recipe called NAME. Other options win over recipes,
            wherever they stand.
        recipes: (name, content).
        prog: the program's name for usage lines.
        raises: raise `UserError` for unknown options and wrong types too, instead of ending the program.

    Raises:
        UserError: as `parse_config`.
    """
    argv, given = split_plugins(argv)
    for value in _option_values(argv, "--run.plugins"):
        names = yaml.safe_load(value)
        given += [str(name) for name in names] if isinstance(names, list) else [value]
    argv = [SHORT.get(name, name) + equals + value for name, equals, value in (a.partition("=") for a in argv)]
    plugins = load_plugins(given)
    for path, recipe in recipes:
        plugins += require_plugins(named_plugins(recipe), f"recipe {path}")
    from_files = next((m for path, r in reversed(recipes) if (m := chosen_method(r, path)) is not None), None)
    chosen = _option_values(argv, "--method.name")
    method = chosen[-1] if chosen else from_files or DEFAULT_METHOD
    head_from_files = next((h for _, r in reversed(recipes) if (h := chosen_head(r)) is not None), None)
    heads = _option_values(argv, "--model.head")
    head = heads[-1] if heads else head_from_files or ModelConfig.head
    contents: list[Recipe] = []
    for path, recipe in recipes:
        check_keys(recipe, path, method if from_files == method else None)
        # `train:` with nothing under it is a section of defaults.
        content = {k: v for k, v in recipe.items() if v is not None}
        if from_files is not None and method != from_files:
            # The recipe's method options belong to another method; this one starts from its own defaults.
            content.pop("method", None)
        if head_from_files is not None and head != head_from_files and "model" in content:
            content["model"] = {k: v for k, v in content["model"].items() if k != "head_options"}
        contents.append(content)
    parser = build_parser(method, prog, head)
    parser.raises = raises
    for (path, _), content in zip(recipes, contents, strict=True):
        # Each alone first, so that a wrong value is reported with its file.
        parser.source = f"recipe {path}: "
        parser.parse_object(content)
    parser.source = ""
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--model.head_options.") and name.rpartition(".")[2] not in option_names(head):
            parser.error(f"unrecognized arguments: {word}")
    for value in _option_values(argv, "--model.head_options"):
        options = yaml.safe_load(value)
        if isinstance(options, dict):
            head_options(head, options)
    names = [path for path, _ in recipes]
    words = _with_recipes(argv, dict(zip(names, contents, strict=True)))
    if plugins:
        words.append("--run.plugins=" + json.dumps(list(dict.fromkeys(plugins))))
    return to_config(parser, parser.parse_args(words))


def _with_recipes(argv: Sequence[str], recipes: dict[str, Recipe]) -> list[str]:
    """The command line with its recipes first, as text in place of their paths.

    The parser takes what comes later. An option that somebody typed wins over recipes wherever it stands: behind
    `--data.dir mine` the recipe of the digit scenes would train on those, and say nothing.
    """
    # JSON is YAML with every string in quotes: a directory called 1e3 stays a name.
    texts = {path: json.dumps(recipe, default=str) for path, recipe in recipes.items()}
    first, others, rest = [], [], iter(argv)
    for word in rest:
        if word == "--config" and (path := next(rest, None)) is not None:
            first.append("--config=" + texts[path])
        elif word.startswith("--config="):
            first.append("--config=" + texts[word.partition("=")[2]])
        else:
            others.append(word)
    return first + others
