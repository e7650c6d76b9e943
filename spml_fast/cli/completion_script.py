"""The tables behind `spml-fast completion`, made from the parsers of the commands, and the scripts that hold them.

A script has three parts: the tables, a shell function that finds what can stand at the cursor (`shells/engine.sh`,
POSIX sh), and what ties it to a shell. Nothing of Python runs when somebody presses Tab.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from spml_fast import __version__
from spml_fast.cli.common import parser_of
from spml_fast.cli.main import COMMANDS
from spml_fast.core.config import SECTIONS, ModelConfig
from spml_fast.methods import get_method, method_names
from spml_fast.models.heads import get_head, head_names
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.options import DEFAULT_METHOD
from spml_fast.runs.recipes import recipe_names

SHELLS = Path(__file__).parent / "shells"
# A value: one of some words, or @KIND for names of files, @any for what cannot be guessed, @flag where there is none.
Values = Sequence[str]
Tables = dict[str, list[str]]

ANY, FLAG, FILE, FOLDER, RUN, MANIFEST = "@any", "@flag", "@file", "@folder", "@run", "@manifest"
# What options of that name take, whatever their type.
BY_NAME: Mapping[str, Values] = {
    "run": [RUN],
    "runs": [RUN],
    "against": [RUN],
    "manifest": [MANIFEST],
    "data": [MANIFEST],
    "plugins": [FILE],
    "root": [FOLDER],
    "images": [FILE],
}
BY_OPTION: Mapping[str, Values] = {
    "data.dir": [MANIFEST],
    "data.image_root": [FOLDER],
    "model.weights": [FILE],
    "run.dir": [FOLDER],
    "run.resume": ["auto", "never", FILE],
}
WORDS_OF_HELP = 80


def first_sentence(text: str) -> str:
    """What a shell shows beside a candidate: the beginning of a help text, without what a script could stumble over."""
    text = " ".join(text.replace("%%", "%").split())
    text = re.split(r"[;:.] |\. ?$|; | \(default|, default| default ", text)[0]
    text = re.sub(r"[^\x20-\x7e]", "", text).strip(" ;:.")
    return text if len(text) <= WORDS_OF_HELP else text[:WORDS_OF_HELP].rsplit(" ", 1)[0] + " ..."


def described(name: str, text: str) -> str:
    """A line of a table: a candidate, a tab, what it is."""
    about = first_sentence(text)
    return f"{name}\t{about}" if about else name


def argument_values(action: argparse.Action) -> Values:
    """What may follow an option, or stand for an argument, of an argparse parser."""
    if action.nargs == 0:
        return [FLAG]
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest in BY_NAME and action.type not in (int, float):
        return BY_NAME[action.dest]
    metavar = str(action.metavar or "")
    if metavar.startswith(("DIR", "FOLDER")):
        return [FOLDER]
    return [FILE] if action.type is Path or metavar.startswith(("FILE", "OUT")) else [ANY]


def add_parser(tables: Tables, context: str, parser: argparse.ArgumentParser) -> None:
    """Enter an argparse parser.

    Args:
        tables: to enter it in.
        context: the command, or `prepare/DATASET`.
        parser: what reads its command line.
    """
    options = tables.setdefault(f"{context} options", [])
    arguments = tables.setdefault(f"{context} arguments", [])
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help or "" for choice in action._choices_actions}
            arguments += [described(name, about.get(name, "")) for name in action.choices]
            for name, inner in action.choices.items():
                add_parser(tables, f"{context}/{name}", inner)
            continue
        values = argument_values(action)
        if not action.option_strings:
            arguments += [value for value in values if value not in arguments]
        for name in (name for name in action.option_strings if name.startswith("--")):
            options.append(described(name, action.help or ""))
            tables[f"{context} {name}"] = list(values)


def field_values(kind: Any) -> Values:
    """What may follow the option of a dataclass field of that type."""
    origin = get_origin(kind)
    if origin is Literal:
        return [str(value) for value in get_args(kind)]
    if origin in (Union, types.UnionType):
        parts = [["null"] if part is type(None) else list(field_values(part)) for part in get_args(kind)]
        known = [value for part in parts for value in part if value != ANY]
        return known if len(known) > 1 else [ANY]
    return ["true", "false"] if kind is bool else [ANY]


def add_section(tables: Tables, context: str, prefix: str, cls: type) -> None:
    """Enter the options of a dataclass of the configuration.

    Args:
        tables: to enter them in.
        context: `train`, `method/NAME` or `head/NAME`.
        prefix: before the field in the option, such as `train`.
        cls: the dataclass; its docstring describes the fields.
    """
    about = {p.arg_name: p.description or "" for p in docstring_parser.parse(cls.__doc__ or "").params}
    hints = get_type_hints(cls)
    options = tables.setdefault(f"{context} options", [])
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}"
        if name in ("method.name", "model.head_options"):
            continue
        options.append(described(f"--{name}", about.get(field.name, "")))
        tables[f"{context} --{name}"] = list(BY_OPTION.get(name) or field_values(hints[field.name]))


def add_train(tables: Tables) -> None:
    """Enter `train`, whose options depend on the method and the head that are named."""
    options = tables.setdefault("train options", [])
    for name, values, text in (
        ("--help", [FLAG], "the options"),
        ("--config", [*recipe_names(), FILE], "a recipe"),
        ("--method", method_names(), "the loss"),
        ("--method.name", method_names(), "the loss"),
        ("--profile", [], "measure where the time of so many updates goes"),
        ("--plugins", [FILE], "import this module or file first"),
        ("--print_config", [FLAG], "print the configuration and exit"),
    ):
        options.append(described(name, text))
        tables[f"train {name}"] = list(values)
    for section, cls in SECTIONS.items():
        add_section(tables, "train", section, cls)
    tables["train --model.head"] = list(head_names())
    for method in method_names():
        add_section(tables, f"method/{method}", "method", get_method(method).Options)
    for head in head_names():
        add_section(tables, f"head/{head}", "model.head_options", get_head(head).Options)


def make_tables() -> Tables:
    """Candidates by place: `COMMAND options`, `COMMAND arguments`, `COMMAND --OPTION`; the commands under ``."""
    tables: Tables = {"": [described(name, text) for name, text in COMMANDS.items()]}
    tables[""] += [described("--help", "the commands"), described("--version", "print the version")]
    for command in COMMANDS:
        if command == "train":
            add_train(tables)
        else:
            add_parser(tables, command, parser_of(command))
    return {place: lines for place, lines in tables.items() if lines}


def table_function(tables: Tables) -> str:
    """The tables as a function of POSIX sh that prints the one whose name it is given."""
    lines = ["_spml_fast_table() {", "    case $1 in"]
    for place, candidates in tables.items():
        words = " ".join(shlex.quote(line) for line in candidates)
        lines.append(f"    {shlex.quote(place)}) printf '%s\\n' {words} ;;")
    return "\n".join([*lines, "    esac", "}"])


def settings() -> Iterable[str]:
    """Variables of the engine."""
    yield f"_spml_fast_method={DEFAULT_METHOD} _spml_fast_head={ModelConfig.head}"
    yield f"_spml_fast_run_mark={RunLayout(Path()).config.name} _spml_fast_manifest_mark=manifest.json"


def script(shell: str) -> str:
    """The completion script for `bash`, `zsh` or `fish`."""
    engine = (SHELLS / "engine.sh").read_text(encoding="utf-8")
    program = "\n".join([table_function(make_tables()), *settings(), engine])
    about = f"# Completion of spml-fast {__version__} for {shell}; made by `spml-fast completion {shell}`."
    if shell != "fish":
        head = "#compdef spml-fast\n" if shell == "zsh" else ""
        return f"{head}{about}\n{program}\n{(SHELLS / f'{shell}.sh').read_text(encoding='utf-8')}"
    quoted = "'" + f'{program}\n_spml_fast "$@"\n'.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{about}\nset -g __spml_fast_program {quoted}\n{(SHELLS / 'fish.fish').read_text(encoding='utf-8')}"
