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
