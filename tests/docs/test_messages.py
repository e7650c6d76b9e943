"""The messages that docs/operations.md explains are those that the program says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "operations.md"
# In the table's first column: what is quoted.
QUOTED = re.compile(r"`([^`]+)`")


@cache
def said() -> str:
    """Every text in the package, without the values that are put into it."""
    texts = []
    for path in sorted((ROOT / "spml_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def explained(page: Path) -> list[str]:
    """Pieces of messages in the first column of "What to do when"."""
    section = page.read_text(encoding="utf-8").split("## What to do when")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [piece for row in rows for piece in QUOTED.findall(row.split(" | ")[0])]


@pytest.mark.parametrize("piece", explained(PAGE))
def test_the_program_says_it(piece: str) -> None:
    assert piece in said()


def test_there_are_messages() -> None:
    assert len(explained(PAGE)) > 20 and "no such words" not in said()
