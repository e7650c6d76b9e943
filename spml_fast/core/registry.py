"""Names for classes: methods, heads and data sets register themselves here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

from spml_fast.core.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: what they are, for messages: `method`, `head`.
        option: the option that names one, for messages; empty where the name is a word of the command line itself.
    """

    def __init__(self, kind: str, option: str = "") -> None:
        self._kind, self._option = kind, option
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: make a class known by `name`. ValueError if another has that name."""

        def add(cls: C) -> C:
            if name in self._classes:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class called `name`; `UserError` lists the names that exist, and the closest one."""
        if name not in self._classes:
            close = difflib.get_close_matches(str(name), self.names(), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            where = f"{self._option}: " if self._option else ""
            names = ", ".join(self.names())
            raise UserError(f"{where}there is no {self._kind} {name!r}; choose one of {names}{hint}")
        return self._classes[name]

    def copy(self) -> Registry[T]:
        """Another registry with the same classes, to which more can be added."""
        other: Registry[T] = Registry(self._kind, self._option)
        other._classes.update(self._classes)
        return other

    def items(self) -> list[tuple[str, type[T]]]:
        """(name, class) pairs in alphabetical order."""
        return sorted(self._classes.items())
