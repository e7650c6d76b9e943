"""A process that has imported and collected everything once and tries mutants of functions in forks of itself.

A fork gives the function of the mutant its changed code and runs the chosen tests: nothing is imported again, so that
a mutant costs little more than its tests. What runs at import (module and class bodies, decorators, defaults, functions
that are called while tests are collected) cannot be changed that way and is left to forks that import the changed
module anew.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.child import Session, run_tests
from tests.mutation.forks import Events, Fork, run_all
from tests.mutation.operators import Mutant, mutated
from tests.mutation.results import Results

# What a test of a kernel takes in the interpreter, at most; a limit for mutants that hang follows from it.
KERNEL_SECONDS = 2.0
Place = tuple[str, str, int]
# Code before and after the change, the outermost function first.
Pairs = list[tuple[types.CodeType, types.CodeType]]


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [c for c in code.co_consts if isinstance(c, types.CodeType)]


def changed_functions(old: types.CodeType, new: types.CodeType) -> Pairs:
    """Functions that differ between two versions of a module; empty where anything else differs too.

    Args:
        old: code of the module.
        new: the same of the changed module.
    """
    if old == new:
        return []
    inside = [p for a, b in zip(_inner(old), _inner(new), strict=False) for p in changed_functions(a, b)]
    if old.co_flags & inspect.CO_OPTIMIZED:
        return [(old, new), *inside]
    own = [
        (c.co_code, c.co_names, [k for k in c.co_consts if not isinstance(k, types.CodeType)], len(_inner(c)))
        for c in (old, new)
    ]
    return inside if own[0] == own[1] else []


def swap(source: str, path: Path, mutant: Mutant) -> Pairs:
    """What of a module's functions a mutant changes; empty where importing the module again is the only way.

    Args:
        source: of the module.
        path: its file.
        mutant: of that module.
    """
    old = compile(ast.parse(source), str(path), "exec", dont_inherit=True)
    new = compile(mutated(source, mutant), str(path), "exec", dont_inherit=True)
    pairs = changed_functions(old, new)
    # A function's code may be exchanged only for one with as many variables of the scopes around it.
    return pairs if all(len(a.co_freevars) == len(b.co_freevars) for a, b in pairs) else []


def _place(code: types.CodeType) -> Place:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _functions(files: set[str]) -> dict[Place, list[types.FunctionType]]:
    """Every function of some files that exists now."""
    found = defaultdict(list)
    for thing in gc.get_objects():
        # `isinstance` asks lazy modules for their class, which some answer with a warning.
        if type(thing) is types.FunctionType and thing.__code__.co_filename in files:
            found[_place(thing.__code__)].append(thing)
    return found


class Host(Session):
    """A pytest plugin that, in place of running the collected tests, lets forks run some of them for every mutant.

    Args:
        root: the repository.
        mutants: those to try, with the tests that reach each and their seconds, nearest first.
        found: where results go.
        jobs: forks at a time.
        end: start none after that (of `time.monotonic`).
        within: what of a mutant's tests is run.
    """

    def __init__(
        self,
        root: Path,
        mutants: Sequence[tuple[Mutant, Mapping[str, float]]],
        found: Results,
        jobs: int,
        end: float,
        within: Callable[[dict[str, float]], dict[str, float]],
    ) -> None:
        super().__init__(report=-1)
        self.root, self.mutants, self.found, self.jobs, self.end, self.within = root, mutants, found, jobs, end, within
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[Place, list[types.FunctionType]] = {}
        # Tests that killed mutants of a function, the last one first: likely to kill its others.
        self.killers: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.parent = os.getpid()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        # What was imported before the collection of garbage was told to leave it alone counts as well.
        gc.unfreeze()
        self.functions = _functions({str(self.root / m.file) for m, _ in self.mutants})
        gc.collect()
        gc.freeze()
        run_all(self._forks(), self.jobs)
        return True

    def _forks(self) -> Iterator[Fork]:
        for mutant, tests in self.mutants:
            if time.monotonic() > self.end or os.getppid() != self.parent:
                return
            if not tests:
                self.found.add(mutant, "survived", "no test reaches the line", 0.0)
                continue
            change = self.change(mutant)
            if change is not None:
                order = [t for t in self.killers[mutant.file, mutant.function] if t in tests]
                chosen = self.within({t: tests[t] for t in (*order, *tests) if t in self.items})
                yield self._fork(mutant, change, chosen)

    def change(self, mutant: Mutant) -> Callable[[], None] | None:
        """What puts a mutant in place in a fork, None where that cannot be done."""
        path = self.root / mutant.file
        pairs = swap(path.read_text(encoding="utf-8"), path, mutant)
        if not pairs or _place(pairs[0][0]) not in self.functions:
            return None

        def exchange() -> None:
            for old, new in pairs:
                for function in self.functions.get(_place(old), []):
                    function.__code__ = new

        return exchange

    def _fork(self, mutant: Mutant, change: Callable[[], None], tests: dict[str, float]) -> Fork:
        start = time.monotonic()
        limits = {test: 10 * seconds + 5 for test, seconds in tests.items()}

        def child(report: int, scratch: Path) -> None:
            # Where pytest makes its temporary folders, once a test asks for one.
            scratch.mkdir()
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(scratch)
            change()
            self.report, self.chosen, self.stop = report, limits, True
            items = [self.items[test] for test in limits]
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.say(result="survived" if self.ran else "error", by="" if self.ran else "no test could be run")

        def done(events: Events, late: bool) -> None:
            result, by = verdict(events, late)
            self.found.add(mutant, result, by, time.monotonic() - start)
            if result == "killed" and by in self.items:
                killers = self.killers[mutant.file, mutant.function]
                killers[:] = [by, *(k for k in killers if k != by)]

        return Fork(child, 20 * sum(limits.values()) + 1200, done, self.found.folder)


class KernelHost(Host):
    """The same for Triton functions, which the interpreter compiles from their source when they are first called."""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """A mutant's tests are those of the point functions that use the changed one."""
        self.mutants = [(m, dict.fromkeys(self._users(m, session.items), KERNEL_SECONDS)) for m, _ in self.mutants]
        return super().pytest_runtestloop(session)

    @staticmethod
    def _users(mutant: Mutant, items: Sequence[pytest.Item]) -> list[str]:
        module = mutant.file.removesuffix(".py").replace("/", ".")
        found = []
        for item in items:
            example = getattr(item, "callspec", None) and item.callspec.params.get("example")
            kernel = getattr(getattr(example, "point", None), "kernel", None)
            home = getattr(getattr(kernel, "fn", None), "__module__", "")
            if home == module or mutant.function in vars(sys.modules.get(home, object)):
                found.append(item.nodeid)
        return found

    def change(self, mutant: Mutant) -> Callable[[], None]:
        tree = mutated((self.root / mutant.file).read_text(encoding="utf-8"), mutant)
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        text = ast.unparse(functions[mutant.function]).splitlines(keepends=True)
        path, whole = str(self.root / mutant.file), inspect.getsourcelines

        def lines(thing: Any) -> tuple[list[str], int]:
            code = getattr(thing, "__code__", None)
            same = code is not None and (code.co_filename, code.co_qualname) == (path, mutant.function)
            return (text, code.co_firstlineno) if same else whole(thing)

        def exchange() -> None:
            inspect.getsourcelines = lines  # type: ignore[assignment]

        return exchange


def verdict(events: Events, late: bool) -> tuple[str, str]:
    """Result and what brought it about, from what a fork said before it ended.

    Args:
        events: of the fork.
        late: whether it was stopped.
    """
    verdicts = [e for e in events if "result" in e] or [{"result": "timeout" if late else "killed", "by": "crash"}]
    errors = [e["error"] for e in events if "error" in e]
    return ("error", errors[0]) if errors else (verdicts[0]["result"], verdicts[0]["by"])


def run_hosted(host: Host, files: Sequence[str]) -> None:
    """Run a host with some test files in a fork of this process until it has tried its mutants."""
    host.parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            run_tests(host.root, {}, files, host, None)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
