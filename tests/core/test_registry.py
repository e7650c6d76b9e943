"""Names for classes."""

from __future__ import annotations

import pytest

from spml_fast.core.errors import UserError
from spml_fast.core.registry import Registry


def fruits() -> Registry[object]:
    registry: Registry[object] = Registry("fruit", "model.fruit")
    for name in ("pear", "apple"):
        registry.register(name)(type(name, (), {}))
    return registry


def test_names_are_sorted_and_lead_to_their_classes():
    registry = fruits()
    assert registry.names() == ["apple", "pear"] == [name for name, _ in registry.items()]
    assert registry.get("pear").__name__ == "pear"


def test_the_decorator_gives_the_class_back():
    registry = fruits()

    class Plum:
        pass

    assert registry.register("plum")(Plum) is Plum is registry.get("plum")


def test_a_name_is_taken_once():
    registry = fruits()
    with pytest.raises(ValueError, match="fruit 'pear' is registered twice"):
        registry.register("pear")(int)
    assert registry.get("pear") is not int


@pytest.mark.parametrize(
    ("registry", "name", "message"),
    [
        (fruits(), "aple", "model.fruit: there is no fruit 'aple'; choose one of apple, pear (did you mean apple?)"),
        (fruits(), "xyz", "model.fruit: there is no fruit 'xyz'; choose one of apple, pear"),
        (Registry("method"), "x", "there is no method 'x'; choose one of "),
    ],
)
def test_an_unknown_name(registry, name, message):
    with pytest.raises(UserError) as error:
        registry.get(name)
    assert str(error.value) == message


def test_a_copy_grows_alone():
    registry = fruits()
    other = registry.copy()
    other.register("plum")(int)
    assert other.names() == ["apple", "pear", "plum"] and registry.names() == ["apple", "pear"]
