"""For mkdocstrings: examples in docstrings (`>>> ...`) become code blocks; Markdown would take them for quotations."""

from __future__ import annotations

from typing import Any

import griffe


def fence(text: str) -> str:
    """A docstring with every paragraph that is an example in a fence."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(f"```pycon\n{p.strip()}\n```" if p.strip().startswith(">>>") else p for p in paragraphs)


class FenceDoctests(griffe.Extension):
    """Applied to every docstring of a package."""

    def on_package(self, *, pkg: griffe.Module, **others: Any) -> None:
        """Change the docstrings before they are parsed."""
        todo: list[Any] = [pkg]
        while todo:
            item = todo.pop()
            if item.docstring is not None:
                item.docstring.value = fence(item.docstring.value)
            todo += [member for member in item.members.values() if not member.is_alias]
