"""The mutation tool itself, on a module of a few lines."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.mutation.baseline import Baseline, Coverage
from tests.mutation.child import AT_IMPORT, Probe, detached
from tests.mutation.host import swap
from tests.mutation.operators import find_mutants, mutated, probed
from tests.mutation.results import Results, read_equivalents
from tests.mutation.run import ROOT, TARGETS, target_modules, within

TOY = '''
"""A docstring with 1 + 1."""

LIMIT = 3


def clipped(value: int, low: int = 0) -> int:
    """Between low and LIMIT."""
    if value < low:
        return low
    return min(value, LIMIT)


def untested(value: int) -> int:
    return value * 2
'''
TOY_TEST = """
from toy.numbers import clipped


def test_middle_and_ends():
    assert [clipped(v) for v in (-5, 1, 3, 9)] == [0, 1, 3, 3]
"""

DETACHED = "__mutation_detached__({})"


def changes(source: str) -> set[tuple[str, str]]:
    return {(m.operator, ast.unparse(mutated(source, m))) for m in find_mutants(source, "toy.py")}


@pytest.mark.parametrize(
    ("line", "operator", "expected"),
    [
        ("a + b", "arithmetic", ["a - b"]),
        ("a * b", "arithmetic", ["a / b"]),
        ("a < b", "comparison", ["a <= b", "a >= b"]),
        ("a == b", "comparison", ["a != b"]),
        ("a and b", "boolean", ["a or b"]),
        ("b if a else c", "boolean", ["c if a else b"]),
        ("-a", "unary", ["a"]),
        ("not a", "unary", ["a"]),
        ("a[1]", "constant", ["a[0]"]),
        ("a[-1]", "constant", ["a[-2]"]),
        ("x(0.5, a)", "constant", ["x(1.0, a)"]),
        ("x(True)", "constant", ["x(False)"]),
        ("x(a, b)", "argument", ["x(b, a)"]),
        ("max(a, b)", "side", ["min(a, b)"]),
        ("a.amin(b)", "side", ["a.amax(b)"]),
        ("a.clamp(min=b)", "side", ["a.clamp(max=b)"]),
        ("a.detach()", "detach", ["a", DETACHED.format("a") + ".detach()"]),
        (
            "a + b",
            "detach",
            [f"__mutation_detached__({e}" for e in ("a + b)", "a) + b")] + ["a + __mutation_detached__(b)"],
        ),
        ("f(a)", "detach", [DETACHED.format("f(a)"), f"f({DETACHED.format('a')})"]),
    ],
)
def test_operators_of_expressions(line, operator, expected):
    source = f"def f(a, b, c, x):\n    return {line}\n"
    found = {text.splitlines()[-1].strip().removeprefix("return ") for o, text in changes(source) if o == operator}
    assert found == set(expected)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [("x += a", "pass"), ("x.add_(a)", "pass"), ("if a:\n        return b", "if a:\n        pass")],
)
def test_operators_of_statements(statement, expected):
    found = {text for o, text in changes(f"def f(a, b, x):\n    {statement}\n") if o == "statement"}
    assert found == {f"def f(a, b, x):\n    {expected}"}


def test_words_types_and_messages_are_left_alone():
    source = '''
"""Doc 1."""
from a import b
__all__ = ["x"][0:1]
def f(a: "x[1]" = None) -> "x[2]":
    """Doc 2."""
    assert a == 1
    logging.info(1 + 1)
    raise ValueError(f"{a + 1}", 1 < 2)
'''
    assert find_mutants(source, "toy.py") == []


def test_every_mutant_of_the_project_compiles_and_differs():
    file = "kernels/spml_kernels/ignore_loss/reference.py"
    source = (ROOT / file).read_text(encoding="utf-8")
    found = find_mutants(source, file)
    trees = [ast.unparse(mutated(source, m)) for m in found]
    assert len(found) > 50 and len({m.key for m in found}) == len(found)
    assert ast.unparse(ast.parse(source)) not in trees
    for tree in trees:
        compile(tree, file, "exec")


def test_only_tensors_with_a_gradient_are_detached():
    source = "def f(a, b):\n    return a * b.detach()\n"
    found = find_mutants(source, "toy.py")
    space = {"__mutation_probe__": Probe(), "__mutation_detached__": detached}
    exec(compile(probed(source, found), "toy.py", "exec"), space)
    a, b = torch.ones(2, requires_grad=True), torch.ones(2)
    assert space["f"](a, b).requires_grad
    probe = space["__mutation_probe__"]
    found = [m for m in found if m.probe]
    carried = {m.change for m in found if f"toy.py:{m.node}" in probe.carried}
    assert carried == {".detach() added to a", ".detach() added to a * b.detach()"}
    floating = {m.change for m in found if f"toy.py:{m.node}" in probe.floating}
    assert ".detach() removed" in floating
    cut = next(m for m in found if m.change == ".detach() added to a")
    exec(compile(mutated(source, cut), "toy.py", "exec"), space)
    assert not space["f"](a, b).requires_grad


EXCHANGED = """
LIMIT = 3


def plain(a, b=2):
    return a + b


class Child(Base):
    size = 4

    def method(self):
        super().__init__()
        return [x + 1 for x in self]
"""


def test_bodies_of_functions_are_exchanged_and_nothing_else_is(tmp_path):
    found = {}
    for mutant in find_mutants(EXCHANGED, "toy.py"):
        pairs = swap(EXCHANGED, tmp_path / "toy.py", mutant)
        found[mutant.line, mutant.operator, mutant.change] = pairs[0][0].co_qualname if pairs else ""
    assert found[6, "arithmetic", "Add -> Sub"] == "plain" and found[14, "constant", "1 -> 0"] == "Child.method"
    # Module and class bodies and defaults run at import; without `super()` the function needs no variable around it.
    for place in ((2, "constant", "3 -> 4"), (5, "constant", "2 -> 3"), (10, "constant", "4 -> 5")):
        assert found[place] == ""
    assert found[13, "statement", "call dropped"] == ""
    # What was exchanged is what the changed module has.
    mutant = next(m for m in find_mutants(EXCHANGED, "toy.py") if m.change == "Add -> Sub")
    (pair, *_) = swap(EXCHANGED, tmp_path / "toy.py", mutant)
    plain = types.FunctionType(pair[0], {}, argdefs=(2,))
    assert plain(5) == 7
    plain.__code__ = pair[1]
    assert plain(5) == 3


def test_kernels_are_told_from_other_functions():
    source = "@jit\ndef f_jit(a):\n    return a + 1\n\n\ndef f(a):\n    return a + 1\n"
    assert {(m.function, m.kernel) for m in find_mutants(source, "toy.py")} == {("f_jit", True), ("f", False)}
    assert not any(m.probe for m in find_mutants(source, "toy.py") if m.kernel)


def test_a_run_kills_reports_and_goes_on(tmp_path):
    for name, text in {"toy/numbers.py": TOY, "toy/__init__.py": "", "tests/toy/test_numbers.py": TOY_TEST}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "tests/mutation").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.mutation.run", "--root", str(tmp_path), "--warm", "pytest", *words]
        command += ["--targets", "toy/numbers.py", "--tests", "tests/toy"]
        # The tool finds its own package in this repository, and the toy in that folder.
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=env)

    first = run("--sample", "3")
    assert "3 chosen, 3 to run" in first.stdout, first.stdout + first.stderr
    whole = run()
    total = int(whole.stdout.split(" mutants, ")[0].splitlines()[-1])
    assert f"{total} chosen, {total - 3} to run" in whole.stdout
    # At the threshold both branches say the same, and nobody tests the other function.
    assert whole.returncode == 1
    survivors = [line for line in (first.stdout + whole.stdout).splitlines() if line.startswith("survived")]
    assert any("[Lt -> LtE] `if value < low:`" in line for line in survivors)
    assert any("no test reaches the line" in line and "`return value * 2`" in line for line in survivors)
    verdicts = [json.loads(line) for line in (tmp_path / "build/mutation/results.jsonl").read_text().splitlines()]
    assert len(verdicts) == total
    killed = {v["key"] for v in verdicts if v["result"] == "killed"}
    assert "toy/numbers.py||constant|3 -> 4|0" in killed
    assert "toy/numbers.py|clipped|side|min -> max|0" in killed
    assert f"{total} chosen, 0 to run" in run().stdout

    entry = '[[equivalent]]\nfile = "toy/numbers.py"\nline = "if value < low:"\noperator = "comparison"\n'
    entry += 'change = "Lt -> LtE"\nreason = "Equal values are the same value."\n'
    (tmp_path / "tests/mutation/equivalent.toml").write_text(entry)
    run("--report")
    table = (tmp_path / "tests/mutation/results.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| all |"))
    assert row.split("|")[2].strip() == str(total) and row.split("|")[6].strip() == "1"
    assert "`if value < low:`" not in table and "`return value * 2`" in table


def test_a_budget_takes_the_first_tests():
    tests = {"near": 1.0, "next": 2.0, "far": 4.0}
    assert list(within(tests, 3.0)) == ["near", "next"] and within(tests, float("inf")) == tests
    assert list(within(tests, 0.5)) == ["near"] and within({}, 1.0) == {}


def test_lines_that_run_at_import_matter_to_all_users_of_a_file():
    """Also where a test was the first to import the file: it is not the only one that may notice them."""
    file, near, slow = "package/toy/numbers.py", "tests/toy/test_a.py::near", "tests/toy/test_a.py::slow"
    lazy = "tests/other/test_b.py::lazy"
    limit, body = (m for m in find_mutants("LIMIT = 3\n\n\ndef f(a):\n    return a + LIMIT\n", file) if not m.probe)
    usual = Baseline({near: 0.5, slow: 2.0}, {AT_IMPORT: {file: [1, 4]}, near: {file: [5]}, slow: {file: [5]}})
    coverage = Coverage([usual, Baseline({lazy: 0.1}, {lazy: {file: [1, 4]}})])
    assert (limit.line, body.line) == (1, 5)
    assert list(coverage.tests(limit)) == [near, slow, lazy] and list(coverage.tests(body)) == [near, slow]


def test_a_changed_function_loses_its_results(tmp_path):
    old = find_mutants("def f(a):\n    return a + 1\n", "toy.py")
    new = find_mutants('def f(a):\n    """Words."""\n    return a + 1\n\n\ndef g(a):\n    return a + 2\n', "toy.py")
    found = Results(tmp_path, [])
    for mutant in old:
        found.add(mutant, "killed", "a test", 0.1)
    again = Results(tmp_path, [])
    assert [again.verdict(m) for m in new if m.function == "f"] == ["killed"] * len(old)
    assert all(again.wanted(m, retry=False) for m in new if m.function == "g")
    changed = find_mutants("def f(a):\n    return a + 3\n", "toy.py")
    assert all(again.wanted(m, retry=False) for m in changed)


def test_every_equivalent_still_speaks_of_a_mutant():
    equivalents = read_equivalents(Path(__file__).with_name("equivalent.toml"))
    files = {e.file for e in equivalents}
    assert files <= set(target_modules(ROOT, TARGETS))
    mutants = [m for f in files for m in find_mutants((ROOT / f).read_text(encoding="utf-8"), f)]
    for entry in equivalents:
        assert entry.reason and any(entry.matches(m) for m in mutants), f"nothing matches {entry}"
