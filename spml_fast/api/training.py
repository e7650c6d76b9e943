"""Training from Python: recipes, dictionaries and options become a `Config`, and a trainer runs it in this process."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from spml_fast.api.runs import Run
from spml_fast.cli.parse import default_recipe_for, parse_words
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.lock import release_all
from spml_fast.runs.recipe import read_recipe, to_yaml

Source = Config | Mapping[str, Any] | str | os.PathLike[str] | None
Overrides = Mapping[str, Any] | Sequence[str]


def make_config(source: Source, overrides: Overrides = ()) -> Config:
    """The configuration that `spml_fast.train` runs; its arguments and errors are the same."""
    values, words = _split_overrides(overrides)
    if source is None:
        source = default_recipe_for(_parse([], values, words))
    recipes: list[tuple[str, dict[str, Any]]] = []
    if isinstance(source, Config):
        recipes.append(("(the configuration)", yaml.safe_load(to_yaml(source))))
    elif isinstance(source, Mapping):
        sections, named = _split_overrides(source)
        recipes.append(("(the dictionary)", sections))
        words = [*named, *words]
    elif source is not None:
        recipes.append((os.fspath(source), read_recipe(os.fspath(source))))
    return _parse(recipes, values, words)


def _parse(recipes: list[tuple[str, dict[str, Any]]], values: dict[str, Any], words: Sequence[str]) -> Config:
    """Recipes, then overrides by section, then words of a command line."""
    recipes = [*recipes, ("(the overrides)", values)] if values else recipes
    files = [word for name, _ in recipes for word in ("--config", name)]
    return parse_words([*files, *words], recipes, raises=True)


def _split_overrides(overrides: Overrides) -> tuple[dict[str, Any], list[str]]:
    """(sections, words of a command line); method and head are words, since they decide which options there are."""
    if not isinstance(overrides, Mapping):
        if isinstance(overrides, str):
            raise UserError(f"overrides must be a dictionary or a list of words, not the text {overrides!r}")
        return {}, [word if word.startswith("--") else f"--{word}" for word in overrides]
    sections: dict[str, Any] = {}
    words: list[str] = []
    for key, value in overrides.items():
        if key in ("method", "method.name", "model.head") and isinstance(value, str):
            words.append(f"--{key}={value}")
            continue
        *place, name = key.split(".")
        target = sections
        for part in place:
            target = target.setdefault(part, {})
        if isinstance(value, Mapping) and isinstance(target.get(name), dict):
            target[name] |= dict(value)
        else:
            target[name] = dict(value) if isinstance(value, Mapping) else value
    for section, name in (("method", "name"), ("model", "head")):
        if isinstance(sections.get(section), dict) and name in sections[section]:
            words.append(f"--{section}.{name}={sections[section].pop(name)}")
    return sections, words


def train_run(source: Source, overrides: Overrides) -> Run:
    """See `spml_fast.train`."""
    from spml_fast.training.cluster import set_environment

    set_environment()
    config = make_config(source, overrides)
    from spml_fast.training.engine import init_distributed, shutdown_distributed
    from spml_fast.training.peers import reporting
    from spml_fast.training.trainer import Trainer

    device = init_distributed(config.run.timeout_minutes)
    # DeepSpeed keeps what it made of the first process group, so that another one would be of no use to it.
    atexit.unregister(shutdown_distributed)
    atexit.register(shutdown_distributed)
    try:
        with reporting():
            trainer = Trainer(config, device)
            trainer.run()
    finally:
        # A notebook goes on for long after that.
        release_all()
    return Run(trainer.run_dir)
