"""The package as somebody has it who installed it: a wheel in an environment of its own, no checkout anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from spml_fast.runs.recipes import recipe_names
from tests.support.paths import ROOT
from tests.support.runs import environment, free_port

pytestmark = pytest.mark.slow

SMALL = {"data.image_size": 32, "train.epochs": 1, "train.batch_size": 16, "deepspeed.tensorboard": "false"}


def run(folder: Path, *words: object, status: int = 0) -> str:
    """What a command prints that runs in `folder`, with nothing of this process's Python path."""
    clean = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(w) for w in words], cwd=folder, env=clean, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_environment(folder: Path) -> Path:
    """A virtual environment that has the packages of this one, less what is installed editable; returns its python."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Of a path that stands in a .pth file, .pth files are not read: editable installs stay out.
    Path(packages, "parent.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return python


def install(python: Path, *words: object) -> None:
    head = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "-q"]
    run(python.parent, *head, *words)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("spml_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("setup.py", "stacks.toml", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(folder, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel."""
    found = make_environment(tmp_path_factory.mktemp("venv"))
    install(found, wheel)
    return found


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"spml_fast/runs/recipes/{name}.yaml" for name in recipe_names()} <= set(names)
    assert {"spml_fast/py.typed", "spml_kernels/py.typed", "spml_fast/analysis/report/report.html"} <= set(names)
    for folder, number in (("review", 6), ("report", 5), ("pages", 2)):
        parts = {p for p in (ROOT / "spml_fast/analysis" / folder).iterdir() if p.suffix in (".html", ".css", ".js")}
        assert len(parts) == number and {str(p.relative_to(ROOT)) for p in parts} <= set(names)
    shells = {f"spml_fast/cli/shells/{p.name}" for p in (ROOT / "spml_fast/cli/shells").iterdir()}
    assert len(shells) == 4 and shells <= set(names)
    packed = {n for n in names if n.endswith(".py") and n.startswith(("spml_fast/", "spml_kernels/"))}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "spml_fast").rglob("*.py")}
    ours |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert packed == ours
    assert {n.split("/")[0].split("-")[0] for n in names} == {"spml_fast", "spml_kernels"}


def test_from_a_wheel_in_an_empty_folder(python: Path, small_digits: Path, tmp_path: Path) -> None:
    command, options = python.with_name("spml-fast"), [f"--{k}={v}" for k, v in SMALL.items()]
    where = run(
        tmp_path, python, "-c", "import spml_fast, spml_kernels; print(spml_fast.__file__, spml_kernels.__file__)"
    )
    assert all(Path(path).is_relative_to(python.parents[1]) for path in where.split())
    assert "train " in run(tmp_path, command)
    data = ["--data.dir", small_digits]
    out = run(tmp_path, command, "train", "--config", "digits", *data, *options, "--run.dir", "run")
    assert "test mAP" in out
    run(tmp_path, command, "evaluate", "--run", "run", "--json", "out.json")
    image = next((small_digits / "images" / "test").iterdir())
    assert str(image) in run(tmp_path, command, "predict", "--run", "run", image)
    assert "timm.create_model" in run(tmp_path, command, "export", "--run", "run", "--format", "safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out.json"}
    said = run(tmp_path, command, "train", "--config", "digitz", status=1)
    assert said.startswith("error: recipe digitz is neither") and "did you mean digits?" in said


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_ranks(python: Path, small_digits: Path, tmp_path: Path, launcher: str) -> None:
    port = ["--master_port", free_port()]
    if launcher == "deepspeed":
        head = [python, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, *port, "--module", "spml_fast"]
    else:
        head = [python, "-m", "torch.distributed.run", "--nproc_per_node", 2, *port, "-m", "spml_fast"]
    options = [f"--{k}={v}" for k, v in SMALL.items()]
    words = ["train", "--config", "digits", "--data.dir", small_digits, *options, "--run.dir", "run"]
    assert "2 x cpu" in run(tmp_path, *head, *words)
    assert (tmp_path / "run" / "results.json").is_file()


def test_an_editable_install(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install(python, "-e", source)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import spml_fast; from spml_fast.runs.recipes import find_recipe as find;"
    code += "print(spml_fast.__file__, find('digits'))"
    where = run(empty, python, "-c", code)
    assert all(Path(path).is_relative_to(source) for path in where.split())
    text = run(empty, python.with_name("spml-fast"), "train", "--config", "digits", "--print_config")
    assert "backbone: test_resnet" in text and not os.listdir(empty)
