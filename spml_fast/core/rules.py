"""Rules of options: each stands beside its field, and is checked whenever its section is made."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from spml_fast.core.errors import UserError

T = TypeVar("T")
# What is wrong with a value, to follow the option's name in a sentence; None where nothing is.
Rule = Callable[[Any], str | None]

_RULES = "rules"


@dataclass(frozen=True)
class Section:
    """Options that belong together. Making one, also by `dataclasses.replace`, checks its rules.

    Attributes:
        section: what stands before a field's name in messages and on the command line.

    Raises:
        UserError: a field's value breaks its rule; the sentence names `section.field`.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, self.section)
        self.check()

    def check(self) -> None:
        """Rules between fields of the section; `UserError` where one is broken."""


def check_fields(options: Any, section: str) -> None:
    """Check every field of a dataclass against the rules beside it; a field that is None has no rules.

    Args:
        options: an instance.
        section: what stands before the fields' names in messages.

    Raises:
        UserError: names `section.field`.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for rule in field.metadata.get(_RULES, ()) if value is not None else ():
            problem = rule(value)
            if problem:
                raise UserError(f"{section}.{field.name} {problem}")


def ruled(default: T, *rules: Rule) -> T:
    """A dataclass field with rules.

    Args:
        default: the field's default; of a list every instance gets a copy.
        *rules: all of them must hold.

    Returns:
        A `dataclasses.Field`, of the type that the field's values have for type checkers, as `dataclasses.field` does.
    """
    metadata = {_RULES: rules}
    if isinstance(default, list):
        made: Any = dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    typed: T = made
    return typed


def positive(default: T) -> T:
    """A number greater than 0."""
    return ruled(default, lambda value: None if value > 0 else f"is {value}; it must be greater than 0")


def not_negative(default: T) -> T:
    """A number that is 0 or more."""
    return ruled(default, lambda value: None if value >= 0 else f"is {value}; it must not be negative")


def fraction(default: T) -> T:
    """A number between 0 and 1, both among them."""
    return ruled(default, lambda value: None if 0 <= value <= 1 else f"is {value}; it must lie between 0 and 1")


def channels(values: Sequence[float]) -> str | None:
    """Rule of a list with a number for each of the three channels."""
    return None if len(values) == 3 else f"needs three numbers, one a channel, not {len(values)}"


def all_positive(values: Sequence[float]) -> str | None:
    """Rule of a list of numbers greater than 0."""
    return None if all(value > 0 for value in values) else f"is {values}; its numbers must be greater than 0"


def all_different(values: Sequence[str]) -> str | None:
    """Rule of a list in which nothing comes twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    return None if twice is None else f"has {twice} twice"


def adam_betas(values: Sequence[float]) -> str | None:
    """Rule of Adam's two rates of decay."""
    fine = len(values) == 2 and all(0 <= beta < 1 for beta in values)
    return None if fine else f"is {values}; it needs two numbers from 0 to below 1"


def crc32_digits(value: str) -> str | None:
    """Rule of a CRC-32 checksum."""
    fine = len(value) == 8 and all(digit in "0123456789abcdef" for digit in value)
    return None if fine else f"is {value!r}; it must be the 8 hexadecimal digits of a CRC-32 checksum"


def cache_place(value: str) -> str | None:
    """Rule of `data.cache`: words that mean no or yes elsewhere are no folder's name."""
    fine = value.lower() not in ("", "off", "no", "false", "null", "on", "yes", "true")
    return None if fine else f"is {value!r}; it must be none, auto or a folder"
