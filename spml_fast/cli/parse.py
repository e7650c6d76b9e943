"""From the command line and YAML files to a `Config`, and back to YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.runs.recipe import DEFAULT_METHOD, build_parser, check_keys, read_recipe, to_config


def _option_values(argv: list[str], *names: str) -> list[str]:
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


def parse_config(argv: list[str], default_recipe: Path | None = None, prog: str | None = None) -> Config:
    """Parse a command line.

    Args:
        argv: arguments without the program's name. The `--local_rank` that launchers add is accepted and ignored.
        default_recipe: used when neither `--config` nor `--data.dir` is given.

    Raises:
        UserError: an unreadable recipe or an unknown method. Unknown options and wrong types end the program with
            status 2 and a message that names them.
    """
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    for launchers_own in ("--local_rank", "--local-rank"):
        if launchers_own in argv:
            at = argv.index(launchers_own)
            del argv[at : at + 2]
    files = _option_values(argv, "--config")
    if not files and not _option_values(argv, "--data.dir", "--data") and default_recipe is not None:
        files = [str(default_recipe)]
        argv = ["--config", str(default_recipe), *argv]
    argv = [f"--method.name={a.partition('=')[2]}" if a.startswith("--method=") else a for a in argv]
    argv = ["--method.name" if a == "--method" else a for a in argv]
    recipes = [read_recipe(f) for f in files]
    from_files = None
    for recipe, path in zip(recipes, files, strict=True):
        section = recipe.get("method")
        if isinstance(section, str):
            raise UserError(f"recipe {path}: write `method: {{name: {section}}}`")
        if isinstance(section, dict) and "name" in section:
            from_files = str(section["name"])
    chosen = _option_values(argv, "--method.name")
    method = chosen[-1] if chosen else from_files or DEFAULT_METHOD
    for recipe, path in zip(recipes, files, strict=True):
        check_keys(recipe, path, method if from_files == method else None)
    # `train:` with nothing under it is a section of defaults.
    recipes = [{k: v for k, v in recipe.items() if v is not None} for recipe in recipes]
    parser = build_parser(method, prog)
    if from_files is not None and method != from_files:
        # The recipe's method options belong to another method; this one starts from its own defaults.
        recipes = [{k: v for k, v in recipe.items() if k != "method"} for recipe in recipes]
    for recipe, path in zip(recipes, files, strict=True):
        # Each alone first, so that a wrong value is reported with its file.
        parser.source = f"recipe {path}: "
        parser.parse_object(recipe)
    parser.source = ""
    namespace = parser.parse_args(_with_recipes(argv, files, recipes))
    return to_config(parser.instantiate_classes(namespace))


def _with_recipes(argv: list[str], files: list[str], recipes: list[dict[str, Any]]) -> list[str]:
    """The command line with its recipes as text in place of their paths."""
    # JSON is YAML with every string in quotes: a directory called 1e3 stays a name.
    texts = {path: json.dumps(recipe, default=str) for path, recipe in zip(files, recipes, strict=True)}
    out = list(argv)
    for i, word in enumerate(out):
        if word == "--config" and i + 1 < len(out):
            out[i + 1] = texts[out[i + 1]]
        elif word.startswith("--config="):
            out[i] = "--config=" + texts[word.partition("=")[2]]
    return out
