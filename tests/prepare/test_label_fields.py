"""Labels of an image in one field."""

from __future__ import annotations

import pytest

from spml_fast.core.errors import UserError
from spml_fast.prepare.label_fields import kind_of, parse_field


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["true crime", "annulled", "null"]', ["true crime", "annulled", "null"]),
        ("['true crime', 'dog']", ["true crime", "dog"]),
        ("[true, false, null]", [True, False, None]),
        ("[True, None]", [True, None]),
        ("dog; cat", ["dog", "cat"]),
        ("-1", None),
        (-1, None),
        (None, None),
        ("", []),
        (3, [3]),
    ],
)
def test_a_field_says_what_it_says(value, expected):
    assert parse_field(value, "row 1").values == expected


@pytest.mark.parametrize("value", ["[dog, cat]", "[1, 2", "[true, None]"])
def test_what_is_no_list_is_named(value):
    with pytest.raises(UserError, match="row 7 is not a list"):
        parse_field(value, "row 7")


def test_texts_that_are_numbers_are_numbers_where_the_file_names_them():
    fields = [parse_field(text, "row") for text in ("0", "3;1", "-1")]
    assert kind_of(fields, numbers_named=True) == "numbers"
    assert kind_of(fields, numbers_named=False) == "names"
    assert kind_of([*fields, parse_field("dog", "row")], numbers_named=True) == "names"
