"""The supported releases: setup.py promises what stacks.toml lists, and what is installed here is within it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.paths import ROOT

STACKS = tomllib.loads((ROOT / "stacks.toml").read_text(encoding="utf-8"))


def floors() -> dict[str, Version]:
    """Lowest version of every requirement in setup.py, by name."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = {}
    for words in re.findall(r'"([A-Za-z][\w-]*(?:\s*[<>=!~]=?[^"]*)?)"', text):
        if re.match(r"[\w-]+\s*>=", words):
            requirement = Requirement(words)
            (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
            found[requirement.name] = Version(lowest)
    return found


@pytest.mark.parametrize("name", [*STACKS["packages"], *STACKS["extras"]])
def test_the_floor_is_the_oldest_release_that_was_tried(name):
    oldest = {**STACKS["packages"], **STACKS["extras"]}[name]["oldest"]
    assert floors().get(name) == Version(oldest), f"setup.py must say {name}>={oldest}, as stacks.toml does"


@pytest.mark.parametrize("name", [*STACKS["packages"], *STACKS["extras"]])
def test_what_is_installed_is_not_older(name):
    entry = {**STACKS["packages"], **STACKS["extras"]}[name]
    assert Version(entry["oldest"]) <= Version(importlib.metadata.version(name))
    assert Version(entry["oldest"]) <= Version(entry["newest"])


def test_python():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    oldest = STACKS["python"]["oldest"]
    assert f'python_requires=">={oldest}"' in text
    assert sys.version_info[:2] >= tuple(int(n) for n in oldest.split("."))
