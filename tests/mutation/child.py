"""What happens in a fork: a module is changed before anything imports it, and chosen tests run against it."""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import json
import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Import time, before any test has started.
AT_IMPORT = ""
# Signal, timer, and how often a test's limit it waits.
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 20))


class _ChangedSource(importlib.machinery.SourceFileLoader):
    """Loads a module from a tree in place of its file's content."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class ChangedModules(importlib.abc.MetaPathFinder):
    """Finds the changed modules (name -> tree) before the usual finders do."""

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        self.trees = trees

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.trees:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _ChangedSource(name, spec.origin, self.trees[name])
        return spec


def detached(value: Any) -> Any:
    """`value.detach()` for tensors that carry a gradient, anything else as it is."""
    return value.detach() if getattr(value, "requires_grad", False) else value


class Probe:
    """Notes at which nodes a tensor ever had a gradient, and at which one was of a type that can have one."""

    def __init__(self) -> None:
        self.carried, self.floating = set[str](), set[str]()

    def __call__(self, node: str, value: Any) -> Any:
        if getattr(value, "requires_grad", False):
            self.carried.add(node)
        if getattr(getattr(value, "dtype", None), "is_floating_point", False):
            self.floating.add(node)
        return value


def _forbidden(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("a test that starts a process would meet the unchanged module there")


def forbid_processes() -> None:
    """From now on starting a process is an error, so that tests which do are not among those that are used."""
    subprocess.Popen.__init__ = _forbidden  # type: ignore[method-assign,assignment]
    multiprocessing.process.BaseProcess.start = _forbidden  # type: ignore[method-assign]


class Lines:
    """Records which lines of some files run during which test."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = {str(f): i for i, f in enumerate(files)}
        self.test = AT_IMPORT
        self.seen: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def _call(self, frame: types.FrameType, event: str, argument: object) -> Any:
        number = self.files.get(frame.f_code.co_filename)
        if number is None:
            return None
        seen = self.seen

        def line(inner: types.FrameType, kind: str, value: object) -> Any:
            if kind == "line":
                seen[self.test].add((number, inner.f_lineno))
            return line

        seen[self.test].add((number, frame.f_lineno))
        return line

    def start(self) -> None:
        """Trace this thread and those that it starts."""
        threading.settrace(self._call)
        sys.settrace(self._call)


class Session:
    """A pytest plugin: chosen tests in the chosen order, a limit of time for each, and what became of them.

    Args:
        report: file descriptor for one line of JSON an event.
        chosen: test ids in their order with the seconds that each may take; None takes every test.
        lines: records coverage where that is wanted.
        stop: end at the first failure.
    """

    def __init__(
        self, report: int, chosen: Mapping[str, float] | None = None, lines: Lines | None = None, stop: bool = False
    ) -> None:
        self.report, self.chosen, self.lines, self.stop = report, chosen, lines, stop
        self.seconds: dict[str, float] = {}
        self.outcome: dict[str, str] = {}
        self.ran = 0

    def say(self, **event: object) -> None:
        """One line to the parent."""
        os.write(self.report, (json.dumps(event) + "\n").encode())

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        forbid_processes()
        if self.chosen is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.chosen if name in found]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.lines is not None:
            self.lines.test = item.nodeid
            # Test libraries put tracers of their own in place and leave none behind.
            self.lines.start()
        if self.chosen is not None:
            # Processor time, so that other work on the machine makes no mutant look dead; a test that sleeps has more.
            for number, timer, times in TIMERS:
                signal.signal(number, lambda *_: self._late(item.nodeid))
                signal.setitimer(timer, self.chosen[item.nodeid] * times)
        self.ran += 1
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - start
            for _, timer, _ in TIMERS:
                signal.setitimer(timer, 0)
            if self.lines is not None:
                self.say(test=item.nodeid, outcome=self.outcome.get(item.nodeid), seconds=self.seconds[item.nodeid])

    def _late(self, test: str) -> NoReturn:
        self.say(result="timeout", by=test)
        os._exit(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome[report.nodeid] = "failed"
            if self.stop:
                self.say(result="killed", by=report.nodeid)
                # Nothing that comes after the verdict matters.
                os._exit(0)
        elif report.skipped:
            self.outcome.setdefault(report.nodeid, "skipped")
        elif report.when == "call":
            self.outcome.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.stop:
            self.say(result="killed", by=f"import of {report.nodeid}")
            os._exit(0)


def _plain_hypothesis() -> None:
    """The same examples in every run, none remembered, and no time spent on making a failing one smaller."""
    try:
        from hypothesis import HealthCheck, Phase, settings
    except ImportError:
        return
    settings.register_profile(
        "mutation",
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )
    settings.load_profile("mutation")


def run_tests(
    root: Path,
    trees: Mapping[str, ast.Module],
    paths: Sequence[str],
    session: Session,
    scratch: Path | None,
    probe: Probe | None = None,
) -> int:
    """Run pytest in this process with the modules of `trees` changed; returns its exit code.

    Args:
        root: the repository.
        trees: name of a module -> its changed tree.
        paths: test files or folders, from the root.
        session: the plugin.
        scratch: folder for temporary files of tests; None where forks of this process choose their own.
        probe: what `__mutation_probe__` in the trees calls.
    """
    os.chdir(root)
    sys.meta_path.insert(0, ChangedModules(trees))
    builtins.__mutation_detached__ = detached  # type: ignore[attr-defined]
    builtins.__mutation_probe__ = probe  # type: ignore[attr-defined]
    _plain_hypothesis()
    if session.lines is not None:
        session.lines.start()
    options = ["-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    options += ["-m", "not slow and not multirank and not gpu and not aot"]
    # Standard output is shared among the forks of a host, so that nothing may be read back from it.
    options += ["-s"] if scratch is None else ["--basetemp", str(scratch)]
    return int(pytest.main([*options, *paths], plugins=[session]))
