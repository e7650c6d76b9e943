"""What to do with a few minutes of a GPU, in which order, and how long each step may take. Nothing here touches a GPU.

A step gets its share of the time that is left, so that what others did not need goes to the rest, and at least what it
needs to be of use: where that is not there any more it is left out. What is worth most comes first.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernel_base import KernelWork
from benchmarks.kernel_sweep import SWEEPS
from benchmarks.kernel_works import OPS, works

FOLDER = Path(__file__).resolve().parent
# Seconds before its end that a command of the benchmark is told to stop, so as not to be stopped.
SPARE = 12.0
# Minutes by default: of a whole session, and of its parts, for machines where a command may run ten minutes and all of
# them fifteen, the start of the machine included.
MINUTES = {None: 14.0, 1: 8.0, 2: 4.5}
LONGEST_COMMAND = 600.0


class Selection(NamedTuple):
    """Works that a step times, and that are compiled for it.

    Attributes:
        ops, small, shapes: as for `works`.
        ways: of tries only those of a whole way, and of providers only the fused op.
    """

    ops: tuple[str, ...]
    small: bool
    shapes: tuple[str, ...] | None = None
    ways: bool = False

    def works(self) -> list[KernelWork]:
        """All of them."""
        found = works(list(self.ops), self.small, None if self.shapes is None else list(self.shapes))
        whole = re.compile(r"(way|backward) \w+")
        return [w for w in found if not w.variant or whole.fullmatch(w.variant)] if self.ways else found


HEADLINE = ("bf16 B 128 HW 14x14 K 2048 C 5000", "bf16 B 128 HW 14x14 K 2048 C 80 dense", "C 312 dense")
SELECTIONS = {
    "headline": Selection(("cam_pool",), False, HEADLINE),
    "sweep": Selection(tuple(SWEEPS), False),
    "losses": Selection(tuple(op for op in OPS if op != "cam_pool"), True),
    # What the losses' compiles leave of the calls that are repeated.
    "repeat": Selection(tuple(SWEEPS), False, None, True),
}


class Place(NamedTuple):
    """Where a session runs.

    Attributes:
        out: folder of the results.
        commit: to record.
        processes: that compile side by side.
    """

    out: Path
    commit: str
    processes: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a session.

    Attributes:
        name: of its row.
        part: 1 or 2.
        share: seconds it would like of 12.5 minutes.
        least: seconds below which it is of no use.
        what: it does, for the plan.
        words: its command after the interpreter, from the place and its seconds.
        needs: modules without which it cannot run.
        items: how many things it compiles, times or checks.
    """

    name: str
    part: int
    share: float
    least: float
    what: str
    words: Callable[[Place, float], list[str]]
    needs: tuple[str, ...] = ()
    items: Callable[[], int] = lambda: 1

    def command(self, place: Place, seconds: float) -> list[str]:
        """All words of its command."""
        return [sys.executable, *self.words(place, seconds)]


def _kernels(name: str, *options: str) -> Callable[[Place, float], list[str]]:
    """bench_kernels.py over a selection."""
    chosen = SELECTIONS[name]

    def words(place: Place, seconds: float) -> list[str]:
        ops = ["--ops", *(op.removeprefix("sweep_") for op in chosen.ops)]
        shapes = ["--shapes", *chosen.shapes] if chosen.shapes else []
        given = [*ops, *shapes, *(["--quick"] if chosen.small else []), *options]
        told = ["--seconds", f"{max(seconds - SPARE, 1):.0f}", "--no-plot", "--commit", place.commit]
        kept = ["--results", str(place.out), "--ceilings", str(place.out / "ceilings.json")]
        return [str(FOLDER / "bench_kernels.py"), *given, *told, *kept]

    return words


def _ceilings(place: Place, seconds: float) -> list[str]:
    task = {"ops": "ceilings", "events": str(place.out / "ceilings.json"), "commit": place.commit}
    return [str(FOLDER / "bench_kernels.py"), "--worker", json.dumps(task)]


def _compile(*sets: str) -> Callable[[Place, float], list[str]]:
    """kernel_precompile.py for some selections."""

    def words(place: Place, seconds: float) -> list[str]:
        told = ["--seconds", f"{max(seconds - SPARE, 1):.0f}", "--processes", str(place.processes)]
        kept = ["--results", str(place.out), "--commit", place.commit]
        return [str(FOLDER / "kernel_precompile.py"), "--sets", *sets, *told, *kept]

    return words


def _check(*names: str) -> Callable[[Place, float], list[str]]:
    """gpu_check.py, some of its checks."""

    def words(place: Place, seconds: float) -> list[str]:
        script = str(FOLDER.parent / "tests" / "gpu_check.py")
        return [script, "--only", *names, "--out", str(place.out / "checks.csv"), "--commit", place.commit]

    return words


def _train(*options: str) -> Callable[[Place, float], list[str]]:
    """bench_step.py at the size of the papers' experiments."""

    def words(place: Place, seconds: float) -> list[str]:
        size = ["--methods", "an", "ll_r", "ignore", "--image-size", "448", "--batch-size", "32", "--count", "128"]
        size += ["--steps", "5", "--rounds", "2"]
        kept = ["--results", str(place.out), "--commit", place.commit]
        return [str(FOLDER / "bench_step.py"), *size, *options, *kept]

    return words


def _rows(name: str) -> int:
    return sum(len(work.rows) for work in SELECTIONS[name].works())


def _compiled(*sets: str) -> int:
    from benchmarks.kernel_precompile import items

    return len(items(sets))


STEPS = (
    Step("ceilings", 1, 25, 10, "copy rate and product rates", _ceilings, items=lambda: 4),
    Step(
        "compile for part 1",
        1,
        150,
        30,
        "everything of part 1 compiled side by side, ops against fp64",
        _compile("checks", "headline", "sweep"),
        items=lambda: _compiled("checks", "headline", "sweep"),
    ),
    Step(
        "headline",
        1,
        120,
        30,
        "cam_pool and its rivals, forward and backward, kernels one by one",
        _kernels("headline"),
        items=lambda: _rows("headline"),
    ),
    Step(
        "sweep",
        1,
        175,
        30,
        "ways, tiles and chunks of cam_pool, large_loss and cam_mask",
        _kernels("sweep", "--sweep"),
        items=lambda: _rows("sweep"),
    ),
    Step("ceilings again", 2, 20, 10, "as before, unless they are known", _ceilings, items=lambda: 4),
    Step(
        "compile for part 2",
        2,
        60,
        20,
        "everything of part 2 compiled side by side",
        _compile("losses", "repeat", "small"),
        items=lambda: _compiled("losses", "repeat", "small"),
    ),
    Step(
        "losses",
        2,
        110,
        30,
        "losses, label rows and masked images with their rivals, as CUDA graphs too",
        _kernels("losses"),
        items=lambda: _rows("losses"),
    ),
    Step(
        "repeat",
        2,
        30,
        15,
        "every op 200 times, on another stream and card: all bits equal",
        _check("repeat", "devices"),
        items=lambda: len(works(list(OPS), small=True)),
    ),
    Step(
        "training steps",
        2,
        45,
        25,
        "ResNet-50 at 448 px, images in memory, PyTorch's loop",
        _train("--input", "memory", "--loop", "torch"),
        items=lambda: 12,
    ),
    Step(
        "training steps, whole",
        2,
        60,
        40,
        "the same with DALI and DeepSpeed",
        _train("--input", "files", "--loop", "deepspeed"),
        ("nvidia.dali", "deepspeed"),
        items=lambda: 12,
    ),
    Step(
        "sanitizer",
        2,
        40,
        20,
        "memcheck, then racecheck, with what is left",
        _check("memcheck", "racecheck"),
        items=lambda: 2,
    ),
)


def steps_of(part: int | None, has: Callable[[str], bool], known: Iterable[str] = ()) -> list[Step]:
    """Steps of a part, or of all, that this machine can run.

    Args:
        part: 1 or 2; None for both.
        has: whether a module is installed.
        known: names of steps whose results are there already.
    """
    chosen = [s for s in STEPS if part in (None, s.part) and all(map(has, s.needs))]
    # One measurement of the card is enough where both parts run.
    return [s for s in chosen if s.name not in known and not (part is None and s.name == "ceilings again")]


def budget(steps: list[Step], place: int, left: float) -> float:
    """Seconds of a step: its share of what is left among the steps from it on, at least its least, or 0."""
    step = steps[place]
    share = left * step.share / sum(other.share for other in steps[place:])
    return max(share, step.least) if left >= step.least else 0.0


class Outcome(NamedTuple):
    """What became of a step.

    Attributes:
        status: `ok`, `exit status N`, `stopped after N s` or `no time left`.
        planned, seconds: it might have taken, and took.
    """

    status: str
    planned: float
    seconds: float


def carry_out(
    steps: list[Step], seconds: float, start: Callable[[Step, float], str], clock: Callable[[], float]
) -> Iterator[tuple[Step, Outcome]]:
    """Every step with its outcome, as soon as there is one.

    Args:
        steps: in order.
        seconds: for all of them.
        start: runs a step, at most that many seconds, and gives its status.
        clock: seconds.
    """
    end = clock() + seconds
    for place, step in enumerate(steps):
        begun = clock()
        planned = budget(steps, place, end - begun)
        status = start(step, planned) if planned > 0 else "no time left"
        yield step, Outcome(status, planned, clock() - begun)
