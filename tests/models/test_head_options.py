"""Options of heads as a configuration gives them: what fits an annotation, and what is said where nothing does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from spml_fast.core.errors import UserError
from spml_fast.models.heads import base
from spml_fast.models.heads.base import Head, HeadOptions, head_options


@dataclass(frozen=True)
class EveryKind(HeadOptions):
    """One option of every kind that annotations may have."""

    whole: int = 1
    real: float = 0.5
    switch: bool = False
    word: str = "x"
    maybe: int | None = None
    choice: Literal["a", "b"] = "a"
    either: Literal["auto"] | float | None = "auto"


@pytest.fixture(autouse=True)
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head with these options, and one without any, in a registry of their own."""
    monkeypatch.setattr(base, "HEADS", base.HEADS.copy())

    @base.register("every_kind")
    class Every(Head):
        Options: ClassVar[type[HeadOptions]] = EveryKind


FITTING: dict[str, list[Any]] = {
    "whole": [0, -3],
    "real": [0.0, 2, -1.5],
    "switch": [True, False],
    "word": ["", "y"],
    "maybe": [None, 4],
    "choice": ["a", "b"],
    "either": ["auto", 0.5, 3, None],
}
UNFIT: dict[str, list[Any]] = {
    "whole": [True, 1.0, "1", None],
    "real": [False, "0.5", None],
    "switch": [1, 0.0, "true", None],
    "word": [1, None, True],
    "maybe": [True, 4.0, "4"],
    "choice": ["c", None, 0],
    "either": ["always", True, [0.5]],
}
KINDS = {
    "whole": "int",
    "real": "float",
    "switch": "bool",
    "word": "str",
    "maybe": "int | None",
    "choice": "Literal['a', 'b']",
    "either": "Union[Literal['auto'], float, NoneType]",
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in FITTING.items() for v in values])
def test_a_value_that_fits_is_taken_as_it_is(name: str, value: Any) -> None:
    options = head_options("every_kind", {name: value})
    assert options == EveryKind(**{name: value}) and type(getattr(options, name)) is type(value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in UNFIT.items() for v in values])
def test_a_value_that_does_not_is_refused_by_kind(name: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        head_options("every_kind", {name: value})
    assert str(error.value) == f"model.head_options.{name} is {value!r}; it must be {KINDS[name]}"


@pytest.mark.parametrize(
    ("head", "key", "hint"),
    [
        ("every_kind", "hole", "did you mean whole?"),
        ("every_kind", "zzzz", "it has whole, real, switch, word, maybe, choice, either"),
        ("cam", "whole", "it has none"),
    ],
)
def test_an_option_that_does_not_exist(head: str, key: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        head_options(head, {key: 1})
    assert str(error.value) == f"model.head_options: head {head} has no option {key!r}; {hint}"


def test_options_that_are_made_already() -> None:
    made = EveryKind(whole=7)
    assert head_options("every_kind", made) is made
    with pytest.raises(UserError, match=r"those of another head than cam \(EveryKind\)"):
        head_options("cam", made)
