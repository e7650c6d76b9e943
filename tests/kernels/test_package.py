"""The kernels as a package of their own: its example runs, its parts depend on each other in one direction."""

from __future__ import annotations

import ast
import doctest

import pytest
import spml_kernels

from tests.support.paths import ROOT

SHIPPED = sorted((ROOT / "kernels" / "spml_kernels").rglob("*.py")) + sorted((ROOT / "spml_fast").rglob("*.py"))


def imports(source: str) -> set[str]:
    """Modules that a file imports, within functions too; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_example_of_every_public_function_runs(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "auto")
    result = doctest.testmod(spml_kernels)
    assert result.attempted > 20 and result.failed == 0
    text = spml_kernels.__doc__ or ""
    functions = [name for name in spml_kernels.__all__ if name[0].islower()]
    assert len(functions) > 10 and not [name for name in functions if f"{name}(" not in text]


def test_nothing_shipped_imports_tools_for_developers():
    shipped = [path for path in SHIPPED if "devtools" not in path.parts]
    assert len(shipped) > 100
    for path in shipped:
        modules = imports(path.read_text(encoding="utf-8"))
        assert not [name for name in modules if name.startswith("spml_kernels.devtools")], path


@pytest.mark.parametrize("op", ["cam_mask", "cam_pool", "ignore_loss", "label_loss", "label_rows", "large_loss"])
def test_every_op_has_its_parts(op):
    folder = ROOT / "kernels" / "spml_kernels" / op
    names = {path.name for path in folder.glob("*.py")}
    ops = {"forward.py", "backward.py"} if op == "cam_pool" else {"op.py"}
    assert {"__init__.py", "reference.py", "kernels.py", *ops} <= names
    for name in names - {"kernels.py", "sparse_kernels.py"}:
        assert "@jit" not in (folder / name).read_text(encoding="utf-8"), f"{name} holds a kernel"


def test_the_rule_notices():
    assert "spml_kernels.devtools.aot" in imports("def f():\n    from spml_kernels.devtools import aot\n")
