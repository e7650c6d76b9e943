"""Writing files whole or not at all, and text that a terminal shows safely."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def printable(path: str) -> str:
    """A path for people: characters that a terminal cannot show, or would obey, are escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


def finite(value: Any) -> Any:
    """A JSON value with null in the place of numbers that are not finite, which strict readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(finite(values), indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
