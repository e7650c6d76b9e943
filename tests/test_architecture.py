"""Which package may import which (docs and design: the direction of imports)."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OURS = sorted((ROOT / "spml_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "spml_kernels").rglob("*.py"))
PROGRAMS = sorted(p for folder in ("launch", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module a file imports at run time, within functions too; `from a import b` counts as a and a.b."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                keep = len(package) - node.level + (path.name == "__init__.py")
                parent = ".".join([*package[:keep], *([parent] if parent else [])])
            names.add(parent)
            names.update(f"{parent}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "importlib.import_module", "import_module") and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    names.add(str(first.value))
        if is_type_checking(node):
            for part in node.orelse:
                visit(part)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def relative(paths: list[Path]) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in paths}


def test_there_is_something_to_look_at():
    assert len(OURS) > 20 and len(KERNELS) > 8 and len(PROGRAMS) >= 3
    assert uses(ROOT / "spml_fast" / "classifier.py", "timm")
    assert uses(ROOT / "spml_fast" / "engine.py", "deepspeed"), "an import within a function counts"
    assert not uses(ROOT / "spml_fast" / "methods" / "base.py", "spml_fast.models.classifier"), (
        "one for types alone does not"
    )
    assert module_name(KERNELS[0]).startswith("spml_kernels")


def test_kernels_need_torch_and_triton_only():
    for path in KERNELS:
        allowed = {"torch", "triton", "spml_kernels", *sys.stdlib_module_names}
        found = {name.split(".")[0] for name in imported(path)}
        assert found <= allowed, f"{path.relative_to(ROOT)} imports {found - allowed}"


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("nvidia.dali", {"spml_fast/data/loader.py"}),
        ("deepspeed", {"spml_fast/train/engine.py"}),
        ("timm.models", {"spml_fast/models/classifier.py"}),
        ("jsonargparse", {"spml_fast/cli/parse.py"}),
    ],
)
def test_a_library_has_one_owner(package, owners):
    assert relative([p for p in OURS if uses(p, package)]) <= owners


def test_timm_makes_models_in_one_file():
    """The trainer may use timm's helpers for moving averages and BatchNorm; nothing else touches timm."""
    users = {str(p.relative_to(ROOT)): imported(p) for p in OURS if uses(p, "timm")}
    assert set(users) <= {"spml_fast/models/classifier.py", "spml_fast/train/trainer.py"}
    helpers = {n for n in users.get("spml_fast/train/trainer.py", set()) if n.split(".")[0] == "timm"}
    assert all(n.startswith(("timm.utils", "timm.layers")) for n in helpers)


# Each layer may import from itself and from those before it.
LAYERS = [
    ["errors", "config", "distributed", "batch", "verify"],
    ["labels", "manifest", "metrics", "observe", "order", "shards"],
    ["datasets", "foreign_tars", "pack", "pipeline", "heads", "classifier", "methods"],
    ["cli", "engine", "optim", "checkpoint", "logs"],
    ["trainer", "evaluate", "explain", "report", "export", "predict", "suggest"],
]


def layer(name: str) -> int | None:
    """Place of `spml_fast.<part>...` in LAYERS; None for parts that are in no layer."""
    parts = name.split(".")
    if parts[0] != "spml_fast" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT / "spml_fast")))
def test_imports_point_down(path):
    own = layer(module_name(path))
    if own is None:
        return
    for name in imported(path):
        place = layer(name)
        assert place is None or place <= own, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize(
    "part", ["datasets", "pipeline", "classifier", "heads", "methods", "labels", "metrics", "order"]
)
def test_building_blocks_know_nothing_of_the_trainer(part):
    paths = [p for p in OURS if module_name(p).split(".")[1:2] == [part]]
    assert paths
    for path in paths:
        for above in ("trainer", "evaluate", "engine", "cli", "explain", "report"):
            assert not uses(path, f"spml_fast.{above}"), f"{path.relative_to(ROOT)} imports {above}"


def test_libraries_import_no_programs_and_no_tests():
    for path in OURS + KERNELS:
        assert not any(uses(path, p) for p in ("launch", "benchmarks", "tests", "pytest")), path


def test_programs_go_through_the_packages():
    for path in PROGRAMS:
        if path.parts[-2] == "launch":
            assert not any(uses(path, p) for p in ("nvidia", "deepspeed", "timm")), path
