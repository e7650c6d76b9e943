"""The supported releases: setup.py promises what stacks.toml lists, and what is installed here is within it."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import runpy
import sys
import tomllib
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import spml_fast.training.trackers  # noqa: F401 (registers them)
from spml_fast.training.trackers.base import TRACKERS
from tests.support.paths import ROOT

STACKS = tomllib.loads((ROOT / "stacks.toml").read_text(encoding="utf-8"))


@functools.cache
def setup_arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


def floors() -> dict[str, Version]:
    """Lowest version of every requirement that users or tests install, by name."""
    extras = setup_arguments()["extras_require"]
    found = {}
    for words in [*setup_arguments()["install_requires"], *extras["test"], *extras["onnx"]]:
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


@pytest.mark.parametrize("name", STACKS["optional"])
def test_what_is_optional_has_an_extra(name):
    entry = STACKS["optional"][name]
    assert f"{name}>={entry['oldest']}" in setup_arguments()["extras_require"][entry["extra"]]
    assert Version(entry["oldest"]) <= Version(entry["newest"])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert Version(entry["oldest"]) <= Version(importlib.metadata.version(name))


def test_trackers_name_their_extras():
    trackers = {t.package: t.extra for _, t in TRACKERS.items() if t.package}
    assert trackers == {n: STACKS["optional"][n]["extra"] for n in ("wandb", "mlflow", "trackio")}


def test_python():
    oldest = STACKS["python"]["oldest"]
    assert setup_arguments()["python_requires"] == f">={oldest}"
    assert sys.version_info[:2] >= tuple(int(n) for n in oldest.split("."))


def test_nothing_else_is_required():
    assert set(floors()) == {*STACKS["packages"], *STACKS["extras"]}
