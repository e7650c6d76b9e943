"""Recipes: from YAML and options to a `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from spml_fast.core.config import (
    SECTIONS,
    Config,
    ModelConfig,
)
from spml_fast.core.errors import UserError, fail
from spml_fast.methods import get_method
from spml_fast.models.heads import get_head
from spml_fast.models.heads.base import head_options

DEFAULT_METHOD = "ll_r"


class RunParser(ArgumentParser):
    """Says what is wrong in one sentence instead of printing every option; exit status 2.

    Attributes:
        source: what is being parsed, to begin the sentence with; empty for the command line.
    """

    source: str = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line and leave."""
        text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(message).split()))
        text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", text)
        unknown = re.match(r"unrecognized arguments: (--[\w.]+)", text)
        hint = _closest(unknown[1], self._option_string_actions) if unknown else ""
        fail(f"{self.source}{text}{hint} (--help lists every option)", status=2)


def build_parser(method: str = DEFAULT_METHOD, prog: str | None = None) -> RunParser:
    """The parser for runs with `method`, whose own options stand under `--method.`."""
    parser = RunParser(
        prog=prog,
        allow_abbrev=False,
        description="Train a multi-label image classifier from partly labelled images.",
        epilog="--method X is short for --method.name X; --help shows the options of that method.",
    )
    parser.add_argument("--config", action="config", help="YAML recipe; later options and files win over earlier ones")
    for name, cls in SECTIONS.items():
        parser.add_argument(f"--{name}", type=cls, default=cls())
    options = get_method(method).Options
    parser.add_argument("--method", type=options, default=options(name=method))
    return parser


def read_recipe(path: str) -> dict[str, Any]:
    """A YAML recipe as a dictionary; `UserError` names the file and, for bad YAML, the line."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is no UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {path} is not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must have sections such as data: and train:, not a single value")
    return recipe


def check_keys(recipe: dict[str, Any], path: str, method: str | None) -> None:
    """Raise `UserError` naming file, section and key for a key that no option has.

    Args:
        method: check the `method` section against this method's options; None leaves it to the parser.
    """
    sections: dict[str, type | None] = {**SECTIONS, "method": get_method(method).Options if method else None}
    for section, values in recipe.items():
        if section not in sections:
            raise UserError(f"recipe {path} has no section {section!r}{_closest(section, sections)}")
        cls = sections[section]
        if cls is None or values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"recipe {path}: section {section} must hold options, not {values!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"recipe {path}: section {section} has no option {key!r}{_closest(str(key), known)}")


def _closest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def to_config(namespace: Namespace) -> Config:
    config = Config(method=namespace.method, **{name: getattr(namespace, name) for name in SECTIONS})
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise `UserError` for values that have the right type but no meaning; names the option."""
    resolve_head_alpha(config)
    positive = {
        "data.image_size": config.data.image_size,
        "data.prefetch": config.data.prefetch,
        "data.shuffle_block": config.data.shuffle_block,
        "data.read_threads": config.data.read_threads,
        "train.batch_size": config.train.batch_size,
        "train.accumulation": config.train.accumulation,
        "train.epochs": config.train.epochs,
        "train.lr": config.train.lr,
        "train.log_every": config.train.log_every,
        "train.head_lr_multiplier": config.train.head_lr_multiplier,
        "eval.batch_size": config.eval.batch_size,
        "eval.every": config.eval.every,
        "run.keep": config.run.keep,
        "model.alpha_train": config.model.alpha_train,
        "model.alpha_eval": config.model.alpha_eval,
    }
    for alpha in config.eval.alphas or []:
        if not alpha > 0:
            raise UserError(f"eval.alphas has {alpha}; every alpha must be greater than 0")
    if config.train.linear_lr is not None:
        positive["train.linear_lr"] = config.train.linear_lr
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; it must be greater than 0")
    if config.data.shuffle_window < config.data.shuffle_block:
        raise UserError(
            f"data.shuffle_window is {config.data.shuffle_window}; it must be data.shuffle_block "
            f"({config.data.shuffle_block}) or more"
        )
    shares = {
        "data.hflip": config.data.hflip,
        "data.crop_scale": config.data.crop_scale,
        "train.warmup_share": config.train.warmup_share,
        "eval.threshold": config.eval.threshold,
        "train.ema_decay": config.train.ema_decay,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share}; it must lie between 0 and 1")
    if len(config.train.betas) != 2 or not all(0 <= beta < 1 for beta in config.train.betas):
        raise UserError(f"train.betas is {config.train.betas}; it needs two numbers from 0 to below 1")
    for name, values in {"data.mean": config.data.mean, "data.std": config.data.std}.items():
        if values is not None and len(values) != 3:
            raise UserError(f"{name} needs three numbers, one a channel, not {len(values)}")
    if config.data.std is not None and not all(value > 0 for value in config.data.std):
        raise UserError(f"data.std is {config.data.std}; its numbers must be greater than 0")
    if not 0 <= config.run.seed < 2**63:
        raise UserError(f"run.seed is {config.run.seed}; it must lie between 0 and 2^63 - 1")
    if config.train.ema_decay and config.deepspeed.zero_stage == 3:
        raise UserError("train.ema_decay does not work with deepspeed.zero_stage 3 (no rank holds whole weights)")
    not_negative = {
        "data.threads": config.data.threads,
        "train.linear_epochs": config.train.linear_epochs,
        "train.weight_decay": config.train.weight_decay,
        "train.momentum": config.train.momentum,
        "train.clip": config.train.clip,
        "train.stop_after_drop": config.train.stop_after_drop,
        "run.save_updates": config.run.save_updates,
        "eval.groups": config.eval.groups or 0,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{name} is {value}; it must not be negative")


def resolve_head_alpha(config: Config) -> None:
    """Check head and head options; alpha becomes 1 for a head that BoostLU has no meaning for.

    Raises:
        UserError: no such head or option, or another alpha than 1 or the default was asked for with such a head.
    """
    model = config.model
    head_options(model.head, model.head_options)
    if get_head(model.head).supports_boostlu:
        return
    why = f"but head {model.head} has no class activation map to boost; leave it out or set it to 1"
    for name in ("alpha_train", "alpha_eval"):
        value = getattr(model, name)
        if value not in (1, getattr(ModelConfig, name)):
            raise UserError(f"model.{name} is {value:g}, {why}")
        setattr(model, name, 1.0)
    if any(alpha != 1 for alpha in config.eval.alphas or []):
        raise UserError(f"eval.alphas is {config.eval.alphas}, {why}")


def to_yaml(config: Config) -> str:
    """A recipe that repeats the run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> Config:
    """Read a run's resolved recipe. Raises `UserError` when it is missing or from another version."""
    recipe = read_recipe(str(path))
    section = recipe.get("method")
    name = str(section.get("name", DEFAULT_METHOD)) if isinstance(section, dict) else DEFAULT_METHOD
    check_keys(recipe, str(path), name)
    parser = build_parser(name, prog=Path(sys.argv[0]).name)
    parser.source = f"recipe {path}: "
    return to_config(
        parser.instantiate_classes(parser.parse_object({k: v for k, v in recipe.items() if v is not None}))
    )
