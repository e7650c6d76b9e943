"""Labels of an image in one field: names, class numbers, or multi-hot vectors; which of them a table has.

A list of integers may be numbers ([0, 3]) or multi-hot ([1, 0, 0, 1]). What it is follows from the type (lists of
truth values or fractions are multi-hot), from what the file says of its classes, or from all lists together; where it
follows from nothing, the user has to say it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spml_fast.core.errors import UserError
from spml_fast.core.text import parse_json
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN
from spml_fast.prepare.image_table import class_text, shown_value

Kind = Literal["names", "numbers", "multihot"]
KINDS: tuple[Kind, ...] = ("names", "numbers", "multihot")
# How a class is called of which only the number is known.
UNNAMED = "class {}"


@dataclass(frozen=True)
class Field:
    """The labels of one image as a file has them.

    Attributes:
        where: file and line or row.
        values: texts or numbers; None where nobody has looked at the image.
    """

    where: str
    values: list[Any] | None


def parse_field(value: Any, where: str) -> Field:
    """A value of JSON, Parquet or a CSV field as a list; -1 alone, as in Hugging Face's hidden labels, is none.

    Raises:
        UserError: it is neither a text, a number, nor a list of them.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            value = _list_of(text, where)
        elif text == "-1":
            return Field(where, None)
        else:
            return Field(where, [name for name in (part.strip() for part in text.split(";")) if name])
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == -1):
        return Field(where, None)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for entry in values:
        if entry is not None and not isinstance(entry, (str, int, float)):
            raise UserError(f"{where} must be a list of names or numbers, not {shown_value(value)}")
    return Field(where, values)


def _list_of(text: str, where: str) -> Any:
    """A list as JSON or as Python writes it."""
    try:
        return parse_json(text)
    except ValueError:
        # Pandas writes lists as Python does: ['a', 'b'].
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(f"{where} is not a list such as [0, 3], but {text[:60]!r}") from error


def kind_of(fields: Sequence[Field], numbers_named: bool) -> Kind:
    """Which kind of labels all fields have.

    Args:
        fields: of all images.
        numbers_named: the file says what the numbers of classes mean, so that integers are numbers.

    Raises:
        UserError: they differ, or it cannot be told.
    """
    lists = [field for field in fields if field.values]
    entries = [(field, v) for field in lists for v in field.values or () if v is not None]
    texts = next((field for field, v in entries if isinstance(v, str)), None)
    others = next((field for field, v in entries if not isinstance(v, str)), None)
    if texts is not None and others is not None:
        raise UserError(f"{texts.where} has texts, but {others.where} numbers; labels must be the one or the other")
    if texts is not None:
        # A field of CSV is a text: where all of them are numbers, and the file says what they mean, they are.
        numbers = numbers_named and all(isinstance(v, str) and v.isascii() and v.isdigit() for _, v in entries)
        return "numbers" if numbers else "names"
    if any(isinstance(v, (bool, float)) for _, v in entries):
        return "multihot"
    if numbers_named:
        return "numbers"
    lengths = {len(field.values or ()) for field in lists}
    if len(lengths) != 1 or lengths == {1} or not all(v in (-1, 0, 1) for _, v in entries):
        return "numbers"
    repeated = any(len(set(field.values or ())) < len(field.values or ()) for field in lists)
    if repeated:
        return "multihot"
    first = lists[0]
    raise UserError(
        f"{first.where} is {shown_value(first.values)}: two class numbers, or zeros and ones for two classes; "
        "say which with --label-kind"
    )


def codes_of(field: Field, kind: Kind, classes: Sequence[str] | None) -> Mapping[str, int]:
    """Class name -> code of what a field lists; nothing for an image without labels.

    Args:
        field: of the image.
        kind: of the labels.
        classes: names by number; None where names are those in the fields.

    Raises:
        UserError: naming file and line of a value that the kind does not have.
    """
    values = field.values or []
    if kind == "names":
        return {class_text(v, field.where): POSITIVE for v in values if v is not None}
    assert classes is not None
    if kind == "multihot":
        if field.values is not None and len(values) != len(classes):
            raise UserError(f"{field.where}: {len(values)} values for {len(classes)} classes")
        return {name: hot_code(v, field.where) for name, v in zip(classes, values, strict=False)}
    return {classes[number_of(v, len(classes), field.where)]: POSITIVE for v in values if v is not None}


def hot_code(value: Any, where: str) -> int:
    """Code of a multi-hot value: 1 and true positive, 0 and false negative, -1, nothing and NaN unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return UNKNOWN
    # A field of CSV is a text.
    text = {"1": 1, "0": 0, "-1": -1, "1.0": 1, "0.0": 0, "true": 1, "false": 0}.get(str(value).strip().lower())
    if text is None:
        raise UserError(f"{where}: {shown_value(value)} is not 1, 0 or -1")
    return {1: POSITIVE, 0: NEGATIVE, -1: UNKNOWN}[text]


def number_of(value: Any, count: int | None, where: str) -> int:
    """A class number, which CSV may have as a text. Raises `UserError` where there is no such class."""
    text = str(value).strip()
    fine = text.isascii() and text.isdigit() and len(text) <= 9 and not isinstance(value, bool)
    if not fine or (count is not None and int(text) >= count):
        last = "" if count is None else f" from 0 to {count - 1}"
        raise UserError(f"{where}: {shown_value(value)} is no class number{last}")
    return int(text)


def unnamed_classes(fields: Sequence[Field], kind: Kind) -> list[str]:
    """Names for classes of which only numbers are known, as many as are used. Raises `UserError` for what is none."""
    if kind == "multihot":
        count = max((len(field.values or ()) for field in fields), default=0)
    else:
        numbers = (number_of(v, None, f.where) for f in fields for v in f.values or () if v is not None)
        count = max(numbers, default=-1) + 1
        if count > MAX_UNNAMED:
            raise UserError(f"class number {count - 1} is used, but no class has a name; name them with --classes")
    return [UNNAMED.format(number) for number in range(count)]


# More classes than that are a mistake in the table, unless somebody names them.
MAX_UNNAMED = 100_000
