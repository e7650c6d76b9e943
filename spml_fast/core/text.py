"""Text from files and names that a terminal shows, and a spreadsheet opens, without obeying it."""

from __future__ import annotations

import json
import os
import re
import textwrap
from typing import Any, TextIO

# What a terminal obeys or turns about: C0 and C1 controls but for tab and line end, marks of direction, and halves of
# surrogate pairs, which no encoding of a terminal has.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What Markdown, HTML and their extensions may take for more than text.
_MARKUP = re.compile(r"(?<![^\W_])_|_(?![^\W_])|(?<!\d)\.|\.(?!\d)|[^\w ,/;%+()'.-]")
# Characters of a message, beyond which nobody reads it.
_LONGEST = 4000
# Spreadsheets take a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """A path or name for people: characters that a terminal cannot show, or would obey, are escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def without_controls(text: str) -> str:
    """A message as a terminal may show it: control characters that its names brought along are escaped."""
    return _UNSAFE.sub(lambda match: repr(match.group())[1:-1], text)


def in_whole_words(text: str, stream: TextIO) -> str:
    """A message in lines of whole words where the stream is a terminal; as it is elsewhere.

    A word that is longer than the line, such as a path, stays one word, which people can select.
    """
    if not stream.isatty():
        return text
    columns = os.get_terminal_size(stream.fileno()).columns or 80
    lines = (textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join(lines)


def counted(number: int, one: str) -> str:
    """A number and what it counts, such as `1 image` and `12 images`; `one` is a noun whose plural ends with s."""
    return f"1 {one}" if number == 1 else f"{number:,} {one}s"


def shortened(text: str) -> str:
    """A message without the middle of what is too long to be read, such as a name of a million characters."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def has_surrogates(text: str) -> bool:
    """Whether a text holds lone halves of surrogate pairs, which no UTF-8 file can hold."""
    return _SURROGATE.search(text) is not None


def markdown_safe(text: str) -> str:
    """A name as Markdown and HTML show it on one line, without its meaning there.

    Letters, digits, spaces and a few marks stay, as do _ and . within words and numbers. All else becomes a numeric
    character reference, which every reader of Markdown takes for text and not for markup, a link, a formula or the edge
    of a table's cell.
    """
    return _MARKUP.sub(lambda match: f"&#{ord(match.group())};", printable(text))


def formula_safe(text: str) -> str:
    """The text of a CSV cell, with an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def formula_safe_path(path: str) -> str:
    """A path as the text of a CSV cell: `./` before it, which names the same file, where it looks like a formula."""
    return f"./{path}" if path.startswith(_FORMULA) else path


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises `ValueError` for whatever is wrong with it, nesting without an end included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
