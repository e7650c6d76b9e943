"""Compile side by side what a GPU is going to be timed with, and check ops on it on the way.

    python benchmarks/kernel_precompile.py --sets headline sweep [--processes 16] [--seconds N] [--results DIR]

Triton and torch.compile keep what they compile on disk, where the benchmark finds it: a call of everything in many
processes takes as long as the longest, while one process would let the card wait for the compiler. Nothing is timed
here. `checks` are the ops against fp64, in pieces, `small` the calls that compute-sanitizer watches; the other sets are
what `gpu_session.py` times under that name.
Rows go to compile.csv, one by one. Exit status 1 when something failed or was not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.kernel_base import Compiled, KernelWork, forget_compiled, make_call  # noqa: E402
from benchmarks.kernel_gpu import first_line, prepare_process  # noqa: E402
from benchmarks.kernel_report import RESULTS, Row, machine, merge_csv  # noqa: E402
from benchmarks.session_plan import SELECTIONS  # noqa: E402

CHECKS, SMALL = "checks", "small"
TUNING_THREADS = 8
# Before a worker's answer, among whatever else is printed.
MARK = "precompiled: "


class Item(NamedTuple):
    """One thing to compile.

    Attributes:
        kind: the set it is of.
        name: of the work and the provider, or of the check.
        seconds: that it takes by a guess, to begin with the longest.
    """

    kind: str
    name: str
    seconds: float


def _guess(work: KernelWork, provider: str) -> float:
    call = work.providers[provider]
    if isinstance(call, Compiled):
        return 60 if call.mode.startswith("max-autotune") else 20
    return 25 if provider.startswith("compile") else 8


def items(sets: Iterable[str]) -> list[Item]:
    """What there is to compile, the longest first. PyTorch's own kernels need no compiler."""
    found = []
    for kind in sets:
        if kind in (CHECKS, SMALL):
            from tests.support.gpu_ops import PIECES, small_pieces

            found += [Item(kind, name, 30) for name in (PIECES if kind == CHECKS else small_pieces("meta"))]
            continue
        for work in SELECTIONS[kind].works():
            for provider in work.providers:
                if provider == "fused" or (provider.startswith("compile") and not SELECTIONS[kind].ways):
                    found.append(Item(kind, f"{work.name} | {provider}", _guess(work, provider)))
    return sorted(found, key=lambda item: -item.seconds)


class Compilations:
    """Runs items one by one: what a worker does.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.works: dict[str, dict[str, KernelWork]] = {}

    def run(self, kind: str, name: str) -> str:
        """Call everything of an item once; a note."""
        if kind in (CHECKS, SMALL):
            from tests.support.gpu_ops import PIECES, small_pieces

            return (PIECES[name] if kind == CHECKS else small_pieces(self.device)[name])() or ""
        if kind not in self.works:
            self.works[kind] = {work.name: work for work in SELECTIONS[kind].works()}
        label, provider = name.rsplit(" | ", 1)
        work = self.works[kind][label]
        forget_compiled()
        call = work.providers[provider]
        if isinstance(call, Compiled):
            # Choosing among kernels compiles dozens of them; everything else has its other processes.
            config: Any = importlib.import_module("torch._inductor.config")
            config.compile_threads = TUNING_THREADS if call.mode.startswith("max-autotune") else 1
        with work.around():
            inputs = work.inputs(self.device)
            for mode in [mode for name, mode in work.rows if name == provider and mode != "bwd"]:
                make_call(work, provider, mode, inputs)()
        return ""


def work_off(device: str, orders: IO[str], answers: IO[str]) -> int:
    """A worker: a line of JSON for every order, until there are no more or the card is broken."""
    prepare_process()
    compilations = Compilations(device)
    for order in orders:
        kind, name = json.loads(order)
        start = time.monotonic()
        broken = False
        try:
            status, note = "ok", compilations.run(kind, name)
        except Exception as problem:
            status, note = f"FAILED {first_line(problem)}", ""
        gc.collect()
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as problem:
                status, broken = f"FAILED {first_line(problem)}", True
        answer = {"status": status, "note": note, "seconds": time.monotonic() - start, "last": broken}
        print(MARK + json.dumps(answer), file=answers, flush=True)
        if broken:
            return 1
    return 0


Write = Callable[[Item, Row], None]


class Pool:
    """Workers in processes of their own, each of which is followed by another one when it dies.

    Args:
        command: of a worker.
        pending: items, taken from the front.
        write: is given every item's row as it is done.
    """

    def __init__(self, command: list[str], pending: list[Item], write: Write) -> None:
        self.command, self.pending, self.write = command, pending, write
        self.lock = threading.Lock()
        self.over = False
        self.running: set[subprocess.Popen[str]] = set()

    def run(self, processes: int, seconds: float) -> None:
        """Work off all items in at most that many seconds; those that were not reached have a row that says so."""
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(processes, len(self.pending)))]
        stop = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(stop - time.monotonic(), 0))
        with self.lock:
            self.over = True
            for process in self.running:
                process.kill()
        for thread in threads:
            thread.join()
        for item in self.pending:
            self.write(item, {"status": "FAILED no time left"})

    def _start(self) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.over or not self.pending:
                return None
            # A worker's own compilers would be as many again for each of them.
            env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, encoding="utf-8"
            )
            self.running.add(process)
            return process

    def _take(self) -> Item | None:
        with self.lock:
            return self.pending.pop(0) if self.pending and not self.over else None

    def _serve(self) -> None:
        while (process := self._start()) is not None:
            assert process.stdin is not None and process.stdout is not None
            alive = True
            while alive and (item := self._take()) is not None:
                answer = self._ask(process, item)
                if answer is None:
                    answer = {"status": "FAILED no time left" if self.over else "FAILED worker died", "last": True}
                alive = not answer.pop("last")
                self.write(item, answer)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            with self.lock:
                self.running.discard(process)

    def _ask(self, process: subprocess.Popen[str], item: Item) -> Row | None:
        """A worker's answer; None where it died."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([item.kind, item.name]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in process.stdout:
            if line.startswith(MARK):
                answer: Row = json.loads(line.removeprefix(MARK))
                return answer
            print(line, end="", flush=True)
        return None


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sets", nargs="+", choices=[CHECKS, SMALL, *SELECTIONS], default=[CHECKS, SMALL, *SELECTIONS])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work_off("cuda", sys.stdin, sys.stdout)
    if not torch.cuda.is_available():
        print("there is no GPU on this machine to compile for", file=sys.stderr)
        return 2
    facts = machine(torch.cuda.get_device_name(), options.commit)
    rows: list[Row] = []
    writing = threading.Lock()

    def write(item: Item, answer: Row) -> None:
        row = {"set": item.kind, "item": item.name, **answer, **facts}
        with writing:
            rows.append(row)
            merge_csv(options.results / "compile.csv", [row], key=("set", "item"))
            print(f"{answer['status']:<8}{answer.get('seconds', 0.0):6.1f} s  {item.name}", flush=True)

    start = time.monotonic()
    pool = Pool([sys.executable, str(Path(__file__).resolve()), "--worker"], items(options.sets), write)
    pool.run(options.processes, options.seconds)
    failed = sum(row["status"] != "ok" for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} compiled in {time.monotonic() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
