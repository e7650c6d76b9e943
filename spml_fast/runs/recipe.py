"""Recipes: from YAML and options to a `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

from spml_fast.core.config import SECTIONS, Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, printable
from spml_fast.methods import get_method
from spml_fast.models.heads import get_head
from spml_fast.models.heads.base import head_options
from spml_fast.runs.options import (
    DEFAULT_METHOD,
    RunParser,
    build_parser,
    closest,
    method_option_hint,
    plain_model_config,
)
from spml_fast.runs.plugins import require_plugins, used_plugins
from spml_fast.runs.recipes import find_recipe
from spml_fast.runs.yaml_file import parse_yaml


def read_recipe(path: str) -> dict[str, Any]:
    """A YAML recipe as a dictionary; `UserError` names the file and, for bad YAML, the line.

    Args:
        path: of a file, or the name of a packaged recipe.
    """
    try:
        with open_regular(find_recipe(path)) as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        # A null byte in the name.
        raise UserError(f"recipe {printable(path)} cannot be read: {error}") from error
    recipe = parse_yaml(text, f"recipe {path}")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must have sections such as data: and train:, not a single value")
    return recipe


def check_keys(recipe: dict[str, Any], path: str, method: str | None) -> None:
    """Raise `UserError` naming file, section and key for a key that no option has.

    Args:
        recipe: section -> option -> value, as read from YAML.
        path: name of its file, for messages.
        method: check the `method` section against this method's options; None leaves it to the parser.
    """
    sections: dict[str, type | None] = {**SECTIONS, "method": get_method(method).Options if method else None}
    for section, values in recipe.items():
        if section not in sections:
            raise UserError(f"recipe {path} has no section {section!r}{closest(str(section), sections)}")
        cls = sections[section]
        if cls is None or values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"recipe {path}: section {section} must hold options, not {values!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                of_method = section == "method" and method is not None
                hint = method_option_hint(str(key), str(method)) if of_method else closest(str(key), known)
                raise UserError(f"recipe {path}: section {section} has no option {key!r}{hint}")


def chosen_method(recipe: dict[str, Any], path: str) -> str | None:
    """The method that a recipe names. `UserError` for one that stands where the section belongs."""
    section = recipe.get("method")
    if isinstance(section, str):
        raise UserError(f"recipe {path}: write `method: {{name: {section}}}`")
    return str(section["name"]) if isinstance(section, dict) and "name" in section else None


def chosen_head(recipe: dict[str, Any]) -> str | None:
    """The head that a recipe names."""
    section = recipe.get("model")
    return str(section["head"]) if isinstance(section, dict) and "head" in section else None


def named_plugins(recipe: dict[str, Any]) -> list[str]:
    """The modules that a recipe needs."""
    section = recipe.get("run")
    names = section.get("plugins") if isinstance(section, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def to_config(parser: RunParser, namespace: Any) -> Config:
    """What was parsed as a configuration.

    Raises:
        UserError: values that have the right type but no meaning.
    """
    # The older of the supported releases have the second name alone.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    sections = instantiate(namespace)
    values = {name: getattr(sections, name) for name in SECTIONS}
    values["model"] = plain_model_config(values["model"])
    config = resolve_head_alpha(Config(method=sections.method, **values))
    uses = (get_method(config.method.name), get_head(config.model.head))
    plugins = used_plugins(config.run.plugins, uses)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, plugins=plugins))


def resolve_head_alpha(config: Config) -> Config:
    """The configuration with the head's options as its dataclass, and alpha 1 for a head without a map to boost.

    Raises:
        UserError: no such head or option, or another alpha than 1 or the default was asked for with such a head.
    """
    model = config.model
    model = dataclasses.replace(model, head_options=head_options(model.head, model.head_options))
    if not get_head(model.head).supports_boostlu:
        why = f"but head {model.head} has no class activation map to boost; leave it out or set it to 1"
        for name in ("alpha_train", "alpha_eval"):
            value = getattr(model, name)
            if value not in (1, getattr(ModelConfig, name)):
                raise UserError(f"model.{name} is {value:g}, {why}")
        if any(alpha != 1 for alpha in config.eval.alphas or []):
            raise UserError(f"eval.alphas is {config.eval.alphas}, {why}")
        model = dataclasses.replace(model, alpha_train=1.0, alpha_eval=1.0)
    return dataclasses.replace(config, model=model)


def to_yaml(config: Config) -> str:
    """A recipe that repeats the run."""
    values = dataclasses.asdict(config)
    # Most runs have neither, and older versions do not know the options.
    if not values["run"]["plugins"]:
        del values["run"]["plugins"]
    if values["model"]["weights_crc32"] is None:
        del values["model"]["weights_crc32"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> Config:
    """Read a run's resolved recipe.

    Raises:
        UserError: it is missing or from another version, or needs a plugin that was not imported.
    """
    recipe = read_recipe(str(path.absolute()))
    require_plugins(named_plugins(recipe), f"the run of {path}")
    name = chosen_method(recipe, str(path)) or DEFAULT_METHOD
    check_keys(recipe, str(path), name)
    parser = build_parser(name, Path(sys.argv[0]).name, chosen_head(recipe) or ModelConfig.head)
    parser.source = f"recipe {path}: "
    return to_config(parser, parser.parse_object({k: v for k, v in recipe.items() if v is not None}))
