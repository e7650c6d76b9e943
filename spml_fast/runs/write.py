"""Writes what describes a run (config.yaml, deepspeed.json, classes.txt) and its final figures (results.json)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json, write_text
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.read import default_options, flatten
from spml_fast.runs.recipe import read_recipe, to_yaml


def write_description(
    layout: RunLayout, config: Config, ds_config: dict[str, Any], classes: Sequence[str]
) -> str | None:
    """Write the resolved recipe, DeepSpeed's configuration and the class names.

    Args:
        layout: the run's.
        config: with everything that was decided.
        ds_config: what DeepSpeed gets.
        classes: class names in class-id order.

    Returns:
        A sentence on what differs from the recipe that the run had before; None where nothing does.
    """
    note = _resume_note(layout.config, config) if layout.config.exists() else None
    write_text(layout.config, to_yaml(config))
    write_json(layout.deepspeed, ds_config)
    write_text(layout.classes, "".join(f"{name}\n" for name in classes))
    return note


def _resume_note(path: Path, config: Config) -> str | None:
    try:
        changes = changed_options(path, config)
    except UserError as error:
        # A run that was killed while it wrote the file can still be resumed; the file is written anew.
        return f"note: the options that the run had before are not known: {error}"
    return f"resuming with changed options: {'; '.join(changes)}" if changes else None


def changed_options(path: Path, config: Config) -> list[str]:
    """What a configuration changes of a recipe: `section.option OLD -> NEW`, in the order of the sections.

    Options that the recipe does not name have their defaults. Where the method or head is another one, its own options
    are not compared.

    Raises:
        UserError: the recipe cannot be read.
    """
    recipe = flatten(read_recipe(str(path.absolute())))
    old = default_options(recipe.get("method.name")) | recipe
    new = flatten(dataclasses.asdict(config))
    changed = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
    for owner, options in (("method.name", "method."), ("model.head", "model.head_options.")):
        if owner in changed:
            changed = [name for name in changed if name == owner or not name.startswith(options)]
    return [f"{name} {_text(old.get(name))} -> {_text(new.get(name))}" for name in changed]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_results(layout: RunLayout, results: dict[str, Any]) -> None:
    """Write the final figures, which make the run a finished one."""
    write_json(layout.results, results)
