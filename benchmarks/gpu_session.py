"""A few minutes of one GPU, used well: everything that only a card can tell, in the order of what is worth most.

    python benchmarks/gpu_session.py --out DIR [--minutes 14] [--dry-run] [--commit C]
    python benchmarks/gpu_session.py --out DIR --part 1        and then        --part 2

Everything is compiled by many processes first, ops are held against fp64 meanwhile; then come ceilings, cam_pool and
its rivals kernel by kernel, other ways and block sizes, the other ops with CUDA graphs, 200 runs of everything for
equal bits, whole training steps, and compute-sanitizer with what is left. Every step is a command of its own, ended
when its time is over, and writes its rows one by one, so that a session that is cut off keeps what it has. What ops
need is torch, triton and timm; steps whose libraries are not installed are left out.

--dry-run prints the plan, with what is to be compiled and timed counted, and the commands; it needs no GPU. Where one
command may run ten minutes at most, do --part 1 and --part 2, one after the other, each into a folder of its own.

DIR is new, empty or has the results of an earlier session, whose rows of the same names are replaced:

    session.csv  session.log    the steps, and what they printed
    ceilings.json               copy and product rates
    compile.csv  checks.csv     ops against fp64; bits, sanitizer
    <gpu>_kernels.csv  <gpu>_kernels_profile.csv  <gpu>_sweep.csv  <gpu>_sweep_profile.csv  <gpu>_steps.csv

`python benchmarks/session_report.py DIR [DIR ...]` makes tables for docs/performance.md of them, and says which numbers
of the heuristics to change. Exit status 0; 1 when a step failed or was not reached; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.kernel_report import Row, commit, machine, merge_csv  # noqa: E402
from benchmarks.machine import installed  # noqa: E402
from benchmarks.session_plan import (  # noqa: E402
    LONGEST_COMMAND,
    MINUTES,
    Place,
    Step,
    budget,
    carry_out,
    steps_of,
)
from spml_fast.core.errors import UserError, run_command  # noqa: E402

TABLE, LOG = "session.csv", "session.log"


def show_plan(steps: list[Step], place: Place, minutes: float, part: int | None) -> None:
    """The plan, what it comes to, and how to start it."""
    print(
        f"{minutes:g} minutes, {place.processes} processes that compile; a step that needs less leaves it to the others"
    )
    print(f"{'from':>6}{'to':>6}  {'items':>6}  step")
    begin = 0.0
    for number, step in enumerate(steps):
        seconds = budget(steps, number, 60 * minutes - begin)
        print(f"{begin:>5.0f}s{begin + seconds:>5.0f}s  {step.items():>6}  {step.name}: {step.what}")
        print(f"{'':>22}{shlex.join(step.command(place, seconds)[1:])}")
        begin += seconds
    print(f"files: at most {len(result_files(steps))} in {place.out}")
    if part is None and 60 * minutes > LONGEST_COMMAND:
        print(f"where a command may run {LONGEST_COMMAND / 60:g} minutes at most, these two are the same:")
        for number in (1, 2):
            words = f"python benchmarks/gpu_session.py --part {number} --minutes {MINUTES[number]:g} --out DIR{number}"
            print(f"    {words} --commit {place.commit}")


def result_files(steps: list[Step]) -> set[str]:
    """Names of what steps leave, `<gpu>` for the card's."""
    names = {TABLE, LOG}
    made = {
        "ceilings": {"ceilings.json"},
        "compile": {"compile.csv"},
        "headline": {"<gpu>_kernels.csv", "<gpu>_kernels_profile.csv"},
        "losses": {"<gpu>_kernels.csv", "<gpu>_kernels_profile.csv"},
        "sweep": {"<gpu>_sweep.csv", "<gpu>_sweep_profile.csv"},
        "repeat": {"checks.csv"},
        "sanitizer": {"checks.csv"},
        "training": {"<gpu>_steps.csv"},
    }
    return names.union(*(made[step.name.split()[0]] for step in steps))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command with everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def run_step(step: Step, seconds: float, place: Place) -> str:
    """Run one command, its output on the screen and in the log; its status."""
    print(f"== {step.name}, {seconds:.0f} s: {step.what}", flush=True)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    tee = 'exec > >(tee -a "$0") 2>&1; exec "$@"'
    words = ["bash", "-c", tee, str(place.out / LOG), *step.command(place, seconds)]
    process = subprocess.Popen(words, env=env, start_new_session=True, cwd=ROOT)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        # A table that was being replaced is still there as it was.
        for part in place.out.glob("*.part"):
            part.unlink()
        return f"stopped after {seconds:.0f} s"
    except BaseException:
        end(process)
        raise
    return "ok" if status == 0 else f"exit status {status}"


def session(steps: list[Step], place: Place, minutes: float, start: Callable[[Step, float], str]) -> list[Row]:
    """Carry out all steps; a row each, in the table as soon as the step is over."""
    facts = machine(torch.cuda.get_device_name() if torch.cuda.is_available() else "none", place.commit)
    rows: list[Row] = []
    for step, outcome in carry_out(steps, 60 * minutes, start, time.monotonic):
        found = {"step": step.name, "status": outcome.status, "planned_s": outcome.planned, "seconds": outcome.seconds}
        rows.append({**found, **facts})
        merge_csv(place.out / TABLE, [rows[-1]], key=("step",))
        print(f"== {step.name}: {outcome.status}, {outcome.seconds:.0f} of {outcome.planned:.0f} s", flush=True)
    return rows


def check_folder(out: Path) -> None:
    """Raise `UserError` unless results may go there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a directory; give the name of one")
    if out.exists() and any(out.iterdir()) and not (out / TABLE).exists():
        raise UserError(f"--out {out} holds other files than a session's; give an empty or a new directory")


def main() -> int:
    """Parse the command line, plan, and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, help="for everything (default: 14; 8 and 4.5 for the parts)")
    parser.add_argument("--part", type=int, choices=[1, 2], help="one of the halves alone")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; needs no GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile side by side")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    options = parser.parse_args()
    minutes = MINUTES[options.part] if options.minutes is None else options.minutes
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g} leaves no time; give a positive number")
    if options.processes < 1:
        raise UserError(f"--processes {options.processes} compiles nothing; give a positive number")
    place = Place(options.out, options.commit or commit(), options.processes)
    known = {"ceilings", "ceilings again"} if (options.out / "ceilings.json").exists() else set()
    steps = steps_of(options.part, installed, known)
    check_folder(options.out)
    if options.dry_run:
        show_plan(steps, place, minutes, options.part)
        return 0
    if not torch.cuda.is_available():
        print("there is no GPU on this machine; --dry-run shows what would be done with one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    # Whoever ends the session ends its step too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    place = place._replace(out=options.out.resolve())
    rows = session(steps, place, minutes, lambda step, seconds: run_step(step, seconds, place))
    print(f"written to {options.out}; python benchmarks/session_report.py {options.out} makes tables of it")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    run_command(main)
