"""Which tests reach which lines, how long they take, and where tensors carry gradients: found out once, then kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.mutation.child import AT_IMPORT, Lines, Probe, Session, run_tests
from tests.mutation.forks import Fork, run_all
from tests.mutation.operators import Mutant, probed

# A file of tests that takes longer than this has no place among quick unit tests.
FILE_LIMIT = 1800.0


@dataclass
class Baseline:
    """What one test file does with the unchanged modules.

    Attributes:
        seconds: test id -> processor time, of tests that pass without starting a process.
        lines: test id (or `AT_IMPORT`) -> target file -> lines that run.
        carried: "file:node" of expressions that were tensors with a gradient.
        floating: the same of tensors that can have one.
        modules: everything that was imported in the end.
        left_out: test id -> why it is not used.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Coverage:
    """The baselines of all test files together."""

    def __init__(self, baselines: list[Baseline]) -> None:
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.users: dict[str, set[str]] = defaultdict(set)
        self.at_import: dict[str, set[int]] = defaultdict(set)
        self.carried: set[str] = set()
        self.floating: set[str] = set()
        for one in baselines:
            self.seconds |= one.seconds
            self.carried |= set(one.carried)
            self.floating |= set(one.floating)
            for test, files in one.lines.items():
                for file, numbers in files.items():
                    if test == AT_IMPORT:
                        self.at_import[file] |= set(numbers)
                    elif test in one.seconds:
                        self.users[file].add(test)
                        for number in numbers:
                            self.reached[file][number].add(test)

    def counts(self, mutant: Mutant) -> bool:
        """Whether a mutant can change anything: a `.detach()` does nothing to what never carries a gradient."""
        if not mutant.probe:
            return True
        place = f"{mutant.file}:{mutant.node}"
        return place in (self.floating if mutant.change == ".detach() removed" else self.carried)

    def runs_at_import(self, mutant: Mutant) -> bool:
        """Whether its lines run before any test has started."""
        return bool(self.at_import[mutant.file] & set(range(mutant.span[0], mutant.span[1] + 1)))

    def tests(self, mutant: Mutant) -> dict[str, float]:
        """Seconds of the tests that may notice a mutant, in the order in which they are run."""
        lines = range(mutant.span[0], mutant.span[1] + 1)
        reached = set[str]().union(*(self.reached[mutant.file][n] for n in lines))
        users = self.users[mutant.file]
        if self.runs_at_import(mutant):
            # They matter to whoever imports the file, not to those tests alone in which somebody was the first to do
            # so; a package whose own lines all run at import has no other users than everybody.
            everybody = self._ordered(users or set(self.seconds), mutant, reached)
            return {t: self.seconds[t] for t in everybody}
        # What a fixture of a file makes is made in the first test that asks for it, and used by those after it.
        files = {t.partition("::")[0] for t in reached}
        later = {t for t in users if t.partition("::")[0] in files} - reached
        return {t: self.seconds[t] for group in (reached, later) for t in self._ordered(group, mutant)}

    def _ordered(self, tests: set[str], mutant: Mutant, reached: Collection[str] = ()) -> list[str]:
        """Tests of the target's folder first, quick ones before slow ones, those with its name first.

        A gradient that is cut off is looked for in tests that have the word in their names.

        Args:
            tests: to be ordered.
            mutant: which they are for.
            reached: those of them that come before the others of the same folder and speed.
        """
        path, target = Path(mutant.file), mutant.file
        name = path.parent.name if path.stem in ("reference", "__init__") else path.stem
        wing = "kernels" if target.startswith("kernels/") else path.parts[:2][-1]

        def place(test: str) -> tuple[bool, bool, bool, bool, bool, float, str]:
            seconds, elsewhere = self.seconds[test], mutant.probe and "gradient" not in test
            far = Path(test).parts[1] != wing
            return far, seconds > 1, test not in reached, elsewhere, name not in test, seconds, test

        return sorted(tests, key=place)


def measure(
    root: Path,
    targets: dict[str, str],
    mutants: list[Mutant],
    tests: list[str],
    state: Path,
    jobs: int,
    stale: bool = False,
) -> Coverage:
    """Run all test files against the unchanged modules, or read what was found out before.

    Args:
        root: the repository.
        targets: file -> name of the module.
        mutants: of the targets.
        tests: files.
        state: folder where results are kept.
        jobs: processes at once.
        stale: what was found out of older sources of the targets will do, where lines have hardly moved.
    """
    code = hashlib.sha256()
    for file in sorted(targets):
        code.update(file.encode() + b"\0" + (root / file).read_bytes())
    kept: dict[str, Path] = {}
    forks = []
    for test in tests:
        name = test.replace("/", "-").removesuffix(".py")
        name += "-" + hashlib.sha256((root / test).read_bytes()).hexdigest()[:12]
        kept[test] = state / "baseline" / f"{name}-{code.hexdigest()[:12]}.json"
        older = sorted(kept[test].parent.glob(f"{name}-*.json"), key=lambda p: p.stat().st_mtime)
        if stale and older and not kept[test].exists():
            kept[test] = older[-1]
        if not kept[test].exists():
            forks.append(_fork(root, targets, mutants, test, kept[test], state))
    run_all(forks, jobs)
    return Coverage([Baseline(**json.loads(p.read_text())) for p in kept.values()])


def remembered(state: Path) -> Coverage:
    """What any run found out so far, of whatever sources."""
    return Coverage([Baseline(**json.loads(p.read_text())) for p in sorted((state / "baseline").glob("*.json"))])


def preload(state: Path) -> list[str]:
    """Names of the modules that some test file imported."""
    names: dict[str, None] = {}
    for path in sorted((state / "baseline").glob("*.json")):
        names |= dict.fromkeys(json.loads(path.read_text())["modules"])
    return list(names)


def _fork(root: Path, targets: dict[str, str], mutants: list[Mutant], test: str, path: Path, state: Path) -> Fork:
    files = sorted(targets)
    found = Baseline()

    def child(report: int, scratch: Path) -> None:
        lines, probe = Lines([root / f for f in files]), Probe()
        trees = {}
        for file, name in targets.items():
            source = (root / file).read_text(encoding="utf-8")
            trees[name] = probed(source, [m for m in mutants if m.file == file])
        session = Session(report, lines=lines)
        run_tests(root, trees, [test], session, scratch, probe)
        sys.settrace(None)
        seen: dict[str, dict[str, list[int]]] = {}
        for name, places in lines.seen.items():
            for number, line in sorted(places):
                seen.setdefault(name, {}).setdefault(files[number], []).append(line)
        rest = {"carried": sorted(probe.carried), "floating": sorted(probe.floating), "modules": list(sys.modules)}
        (scratch.parent / "lines.json").write_text(json.dumps({"lines": seen, **rest}))
        session.say(written=str(scratch.parent / "lines.json"))

    def done(events: list[dict[str, Any]], late: bool) -> None:
        for event in events:
            if "test" in event and event["outcome"] == "passed":
                found.seconds[event["test"]] = event["seconds"]
            elif "test" in event:
                found.left_out[event["test"]] = event["outcome"] or "no outcome"
            elif "written" in event:
                for key, value in json.loads(Path(event["written"]).read_text()).items():
                    setattr(found, key, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)))
        print(
            f"{test}: {len(found.seconds)} tests, {sum(found.seconds.values()):.0f} s, {len(found.left_out)} left out"
            + (" (stopped: too slow)" if late else ""),
            flush=True,
        )

    return Fork(child, FILE_LIMIT, done, state)
