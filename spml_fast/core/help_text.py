"""The lines of a command's help that argparse does not lay out, at the terminal's width."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

# Columns between which help is laid out: narrower it falls apart, wider nobody reads it.
_NARROWEST, _WIDEST = 60, 100
_COMMENT = "  # "


def help_width() -> int:
    """Columns that help may take on this terminal, or on 80 where there is none."""
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def paragraphs(text: str) -> str:
    """Text whose paragraphs are separated by an empty line, filled anew to the terminal's width."""
    return "\n\n".join(textwrap.fill(" ".join(p.split()), help_width()) for p in text.strip().split("\n\n"))


def usage(text: str) -> str:
    """A usage line without the word `usage: ` that stands before it, broken where the terminal ends."""
    filled = textwrap.wrap(
        "usage: " + text, help_width(), subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(filled).removeprefix("usage: ")


def example_lines(examples: Sequence[tuple[str, str]]) -> list[str]:
    """Commands with what they do behind them or, where that is too wide for the terminal, above them.

    Args:
        examples: (command line, what it does).

    Returns:
        A heading and the lines, each of which may be copied into a shell.
    """
    width = help_width()
    longest = max(len(command) for command, _ in examples)
    lines = [f"  {command:<{longest}}{_COMMENT}{what}".rstrip() for command, what in examples]
    if max(map(len, lines)) > width:
        lines = []
        for command, what in examples:
            lines += textwrap.wrap(what, width, initial_indent=_COMMENT, subsequent_indent=_COMMENT)
            # A shell reads a line that ends with a backslash together with the next one.
            parts = textwrap.wrap(command, width - 8, break_long_words=False, break_on_hyphens=False)
            lines.append("  " + " \\\n      ".join(parts))
    return ["examples:", *lines]


def table_lines(rows: Iterable[tuple[str, str]], first: int) -> list[str]:
    """Two columns.

    Args:
        rows: (name, text); the text is broken where the terminal ends.
        first: width of the names.
    """
    lines = []
    for name, text in rows:
        lead = f"  {name:<{first}} "
        lines += textwrap.wrap(text, help_width(), initial_indent=lead, subsequent_indent=" " * len(lead))
    return lines
