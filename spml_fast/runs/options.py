"""The options of a run: one parser made from the dataclasses of the configuration, of a method and of a head.

The only file that imports jsonargparse.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from spml_fast.core import help_text
from spml_fast.core.config import SECTIONS, ModelConfig
from spml_fast.core.errors import UserError, fail
from spml_fast.methods import get_method, method_names
from spml_fast.models.heads import get_head, head_names
from spml_fast.runs.recipes import recipe_names

DEFAULT_METHOD = "ll_r"

# Where an option of that name is most likely meant.
_SECTION_ORDER = ("train", "model", "data", "method", "eval", "run", "deepspeed")


class RunParser(ArgumentParser):
    """Says what is wrong in one sentence instead of printing every option.

    Attributes:
        source: what is being parsed, to begin the sentence with; empty for the command line.
        raises: raise `UserError` instead of ending the program with status 2.
        method: the method whose options stand under `--method.`.
        head: the head whose options stand under `--model.head_options.`.
    """

    source: str = ""
    raises: bool = False
    method: str = DEFAULT_METHOD
    head: str = ModelConfig.head

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line and leave with status 2, or raise it as `UserError`."""
        text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(message).split()))
        text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", text)
        unknown = re.match(r"unrecognized arguments: (-\S+)", text) or re.match(
            r"Group '\w+' does not accept option '([\w.]+)'", text
        )
        hint = option_hint(unknown[1], self.method, self.head) if unknown else ""
        sentence = f"{self.source}{text}{hint}"
        if self.raises:
            raise UserError(sentence)
        fail(f"{sentence} (--help lists every option)", status=2)

    def format_help(self) -> str:
        """Examples, then every option by section; the type stands where the value does."""
        return run_help(self.prog, self.method, self.head)

    def format_usage(self) -> str:
        """One line."""
        return f"usage: {_usage(self.prog)}\n"


def build_parser(method: str = DEFAULT_METHOD, prog: str | None = None, head: str = ModelConfig.head) -> RunParser:
    """The parser for runs with a method and a head.

    Args:
        method: its own options stand under `--method.`.
        prog: the program's name for usage lines.
        head: its own options stand under `--model.head_options.`.

    Raises:
        UserError: no such method or head.
    """
    parser = RunParser(prog=prog, allow_abbrev=False)
    parser.method, parser.head = method, head
    parser.add_argument(
        "--config", action="config", help="YAML recipe; later ones win over earlier ones, and options over recipes"
    )
    for name, cls in SECTIONS.items():
        kind = _model_config(head) if name == "model" else cls
        _resolve_types(kind)
        parser.add_argument(f"--{name}", type=kind, default=kind())
    options = get_method(method).Options
    _resolve_types(options)
    parser.add_argument("--method", type=options, default=options(name=method))
    return parser


def _resolve_types(cls: type) -> None:
    """Replace the text of a dataclass's annotations by the types.

    jsonargparse would do it with all that the class's module imports for type checkers, which takes seconds.
    """
    try:
        types_of = get_type_hints(cls)
    except NameError:
        # A type that is known to type checkers alone.
        return
    initialiser: Any = cls.__init__  # type: ignore[misc]
    initialiser.__annotations__ = {name: types_of.get(name, kind) for name, kind in initialiser.__annotations__.items()}


def _model_config(head: str) -> type[ModelConfig]:
    """`ModelConfig` whose `head_options` are those of `head`."""
    options = get_head(head).Options
    _resolve_types(options)
    if not dataclasses.fields(options):
        # A class without fields makes no options.
        return ModelConfig
    frozen = ModelConfig.__dataclass_params__.frozen  # type: ignore[attr-defined]
    field = ("head_options", options, dataclasses.field(default_factory=options))
    return dataclasses.make_dataclass(
        "ModelConfig", [field], bases=(ModelConfig,), frozen=frozen, namespace={"__doc__": ModelConfig.__doc__}
    )


def plain_model_config(model: ModelConfig) -> ModelConfig:
    """The same section as `ModelConfig` itself."""
    return ModelConfig(**{f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)})


def closest(word: str, words: Iterable[str]) -> str:
    """`; did you mean X?`, or an empty string where nothing is like `word`."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def option_names(head: str) -> list[str]:
    """Names of the options of a head."""
    return _names(get_head(head).Options)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _all_options(method: str, head: str) -> list[str]:
    """Every option as `section.field`, the likelier sections first."""
    sections: dict[str, type] = {**SECTIONS, "method": get_method(method).Options}
    found = [f"{section}.{name}" for section in _SECTION_ORDER for name in _names(sections[section])]
    return [*found, *(f"model.head_options.{name}" for name in _names(get_head(head).Options))]


def owners(name: str, kind: Literal["method", "head"]) -> list[str]:
    """The methods or heads that have an option of that name."""
    if kind == "method":
        return [m for m in method_names() if name in _names(get_method(m).Options)]
    return [h for h in head_names() if name in _names(get_head(h).Options)]


def method_option_hint(name: str, method: str) -> str:
    """What to say of an option that `method` does not have: whose it is, or what is like it."""
    others = owners(name, "method")
    if others:
        return f"; it is an option of {_listed(others)}, not of method {method}"
    return closest(name, _names(get_method(method).Options))


def option_hint(word: str, method: str, head: str) -> str:
    """What to say of an option that does not exist: `; did you mean --X?`, or whose it is.

    Args:
        word: as it was given, such as `--batch-size` or `--method.delta_rel=3`.
        method: the run's method.
        head: the run's head.
    """
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    known = _all_options(method, head)
    if name in known:
        return f"; did you mean --{name}?"
    leaf = name.rpartition(".")[2]
    if name.startswith("method.") and (others := owners(leaf, "method")):
        return f"; it is an option of {_listed(others)}, not of method {method}"
    if name.startswith("model.head_options.") and (others := owners(leaf, "head")):
        return f"; it is an option of {_listed(others, 'head')}, not of head {head}"
    same = [option for option in known if option.rpartition(".")[2] == leaf]
    if same and "." not in name:
        return f"; did you mean --{same[0]}?"
    if "." not in name:
        if others := owners(leaf, "method"):
            return f"; --method.{leaf} is an option of {_listed(others)}, not of method {method}"
        if others := owners(leaf, "head"):
            return f"; --model.head_options.{leaf} is an option of {_listed(others, 'head')}, not of head {head}"
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        leaves = {option.rpartition(".")[2]: option for option in reversed(known)}
        close = [leaves[found] for found in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean --{close[0]}?" if close else ""


def _listed(names: Sequence[str], kind: str = "method") -> str:
    return f"{kind}{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _value_text(kind: Any) -> str:
    """A type as the help shows it in the place of the value."""
    origin = get_origin(kind)
    if origin is Literal:
        return "{" + ",".join(str(a) for a in get_args(kind)) + "}"
    if origin in (Union, types.UnionType):
        parts = ["null" if a is type(None) else _value_text(a) for a in get_args(kind)]
        return "|".join(parts)
    if origin is list or origin is tuple:
        return f"[{_value_text(get_args(kind)[0])},...]" if get_args(kind) else "[...]"
    if kind is dict or origin is dict:
        return "{KEY: VALUE,...}"
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "{true,false}"}.get(kind, "VALUE")


def _default_text(value: Any) -> str:
    """A default as it would stand in YAML."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_default_text(v) for v in value) + "]"
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def _section_help(section: str, cls: type, title: str, defaults: Any, width: int) -> list[str]:
    """The lines of one section."""
    text = docstring_parser.parse(cls.__doc__ or "")
    about = {p.arg_name: " ".join((p.description or "").split()) for p in text.params}
    hints = get_type_hints(cls)
    lines = [title]
    for field in dataclasses.fields(cls):
        value = getattr(defaults, field.name)
        names = {"model.head": head_names, "method.name": method_names}.get(f"{section}.{field.name}")
        if field.name == "head_options":
            shown, default = "{OPTION: VALUE,...}", ""
        elif names is not None:
            shown, default = "{" + ",".join(names()) + "}", f" (default: {value})"
        else:
            shown, default = _value_text(hints[field.name]), f" (default: {_default_text(value)})"
        words = f"{about.get(field.name, '')}{default}".strip()
        lines += _option_lines(f"--{section}.{field.name} {shown}", words, width)
    return [*lines, ""]


def _usage(prog: str) -> str:
    return help_text.usage(f"{prog} [--config RECIPE ...] [--method METHOD] [--SECTION.OPTION VALUE ...]")


def _option_lines(option: str, about: str, width: int) -> list[str]:
    """An option with its value, and below it, indented, what it does."""
    shown = textwrap.wrap(
        # A long list of choices is broken after its commas.
        option if len(option) + 2 <= width else option.replace(",", ", "),
        width,
        initial_indent="  ",
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return shown + textwrap.wrap(about, width, initial_indent=" " * 8, subsequent_indent=" " * 8)


def run_help(prog: str, method: str, head: str) -> str:
    """The help text of `train` for a method and a head."""
    width = help_text.help_width()
    examples = [
        ("", "the embedded digit scenes, in a minute or two"),
        (" --data.dir data/mine --method ll_r", "your own images, made ready by `spml-fast prepare`"),
        (" --config coco_boostlu --run.dir runs/coco", "a published recipe; given again, an interrupted run resumes"),
    ]
    method_options, head_options = get_method(method).Options, get_head(head).Options
    lines = [
        f"usage: {_usage(prog)}",
        "",
        *help_text.example_lines([(f"{prog}{words}", what) for words, what in examples]),
    ]
    lines += ["", "Train a multi-label image classifier from partly labelled images.", "", "sections of options:"]
    titles = {name: (cls.__doc__ or name).strip().splitlines()[0].rstrip(".") for name, cls in SECTIONS.items()}
    lines += help_text.table_lines([(f"--{name}.*", title) for name, title in titles.items()], 14)
    method_text = f"options of the method (shown: {method}; --method X --help shows those of X)"
    lines += help_text.table_lines([("--method.*", method_text)], 14)
    named = {
        "methods": ", ".join(method_names()),
        "heads": f"{', '.join(head_names())} (--model.head X --help shows the options of X)",
        "recipes": ", ".join(recipe_names()),
    }
    for kind, text in named.items():
        lines += textwrap.wrap(f"{kind}: {text}", width, initial_indent="  ", subsequent_indent="      ")
    lines += ["", "general:", "  -h, --help"]
    general = [
        (
            "--config RECIPE",
            "YAML file, or the name of a recipe; of several the later one wins, and any other option over all of them",
        ),
        ("--method METHOD", "short for --method.name METHOD"),
        ("--profile N", "short for --run.profile N"),
        ("--plugins MODULE", "import this module (or FILE.py) first, which registers methods or heads"),
        ("--print_config", "print the configuration that all of this gives, and exit"),
    ]
    for option, about in general:
        lines += _option_lines(option, about, width)
    lines.append("")
    for name, cls in SECTIONS.items():
        lines += _section_help(name, cls, f"{titles[name]} ({name}):", cls(), width)
        if name == "model" and dataclasses.fields(head_options):
            title = f"Options of head {head}:"
            lines += _section_help("model.head_options", head_options, title, head_options(), width)
    title = f"Options of method {method}:"
    lines += _section_help("method", method_options, title, method_options(name=method), width)
    return "\n".join(lines).rstrip() + "\n"
