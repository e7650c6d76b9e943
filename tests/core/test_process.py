"""Processes of programs: they start quicker, and end with everything done that others were promised."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spml_fast.core.errors import UserError, run_command
from spml_fast.core.process import keep_what_exists
from tests.support.paths import ROOT

PROGRAM = """
import atexit, gc, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from spml_fast.core.errors import UserError, run_command

class Freed:
    def __del__(self):
        sys.stdout and sys.stdout.write("freed\\n")

freed = Freed()
freed.itself = freed
pool = ThreadPoolExecutor(1)

def late(name, seconds):
    time.sleep(seconds)
    print(name)

def main():
    print("looks after", gc.get_threshold()[0])
    # As DALI does; `freed` is garbage by then.
    atexit.register(gc.collect)
    del globals()["freed"]
    atexit.register(print, "first registered")
    atexit.register(print, "last registered")
    pool.submit(late, "job", 0.1)
    threading.Thread(target=late, args=("thread", 0.3)).start()
    if sys.argv[1:] == ["wrong"]:
        raise UserError("that is wrong")
    return int(sys.argv[1])

if __name__ == "__main__":
    run_command(main)
"""
SAID = ["first registered", "job", "last registered", "looks after 20000", "thread"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*words: object, stdout: object = subprocess.PIPE, **options: object) -> subprocess.CompletedProcess[str]:
    """Of Python, with a buffer before standard output."""
    options = {"env": buffered(), "cwd": ROOT, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, *map(str, words)], stdout=stdout, check=False, **options)


def buffered() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(("word", "status"), [("0", 0), ("3", 3), ("wrong", 1)])
def test_everything_promised_is_done_but_nothing_is_freed(program: Path, word: str, status: int) -> None:
    """Standard output is a pipe here, so that what is printed waits in a buffer."""
    done = run(program, word)
    lines = done.stdout.splitlines()
    assert done.returncode == status and sorted(lines) == SAID
    assert lines.index("last registered") < lines.index("first registered"), "as `atexit` has it"
    assert done.stderr == ("error: that is wrong\n" if word == "wrong" else "")


def test_modules_and_console_scripts_end_so_too(program: Path) -> None:
    done = run("-m", "program", "0", cwd=program.parent)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, SAID)
    script = "import os, sys; os._exit = lambda status: print('at once', status)\n"
    script += "from spml_fast.cli.main import entry; sys.exit(entry())"
    assert "at once 0" in run("-c", script, "--version").stdout


def test_what_started_a_program_goes_on(program: Path, tmp_path: Path) -> None:
    """A profiler writes its file, `-i` asks on, a script and a test catch `SystemExit`; and Python frees everything."""
    profile = tmp_path / "profile"
    done = run("-m", "cProfile", "-o", profile, program, "3")
    assert profile.stat().st_size and "freed" in done.stdout
    done = run("-i", program, "3", input="print('go', 'on')\n")
    assert "go on" in done.stdout and "freed" in done.stdout
    outer = tmp_path / "outer.py"
    outer.write_text(
        "import runpy, sys\ntry:\n    runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as leaving:\n    print('left with', leaving.code)\n"
    )
    done = run(outer, program, "3")
    assert done.returncode == 0 and "left with 3" in done.stdout and "freed" in done.stdout
    with pytest.raises(SystemExit, match=r"^1$"):
        run_command(wrong)


def test_only_a_program_has_cycles_looked_for_less_often(program: Path) -> None:
    assert "looks after 20000" in run(program, "0").stdout
    before = gc.get_threshold()
    with pytest.raises(SystemExit):
        run_command(wrong)
    assert gc.get_threshold() == before


def test_only_a_program_keeps_what_exists(program: Path) -> None:
    before = gc.get_freeze_count()
    keep_what_exists()
    assert gc.get_freeze_count() == before
    begin = "from spml_fast.core.process import keep_what_exists\n" + program.read_text()
    for order in ("keep_what_exists(), made()", "made(), keep_what_exists()"):
        made = "def made():\n    other = Freed()\n    other.itself = other\n"
        program.write_text(begin.replace("def main():\n", f"{made}\ndef main():\n    {order}, gc.collect()\n"))
        assert ("freed" in run(program, "0").stdout) == order.endswith("made()")


def wrong() -> int:
    raise UserError("that is wrong")


def test_who_interrupts_the_end_does_not_wait(program: Path) -> None:
    text = program.read_text().replace('args=("thread", 0.3)', 'args=("thread", 60)')
    interrupt = "threading._register_atexit(os.kill, os.getpid(), signal.SIGINT)"
    program.write_text(text.replace("def main():", f"import os, signal\ndef main():\n    {interrupt}"))
    done = run(program, "3", timeout=30)
    assert (done.returncode, done.stderr) == (3, "") and "first registered" in done.stdout


def test_output_that_cannot_be_written_is_no_success(program: Path) -> None:
    for word, status in (("0", 120), ("3", 3)):
        with open("/dev/full", "w") as full:
            done = run(program, word, stdout=full)
        assert done.returncode == status
        assert ("error: the output cannot be written: " in done.stderr) == (status == 120)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        done = run(program, "0", stdout=nobody)
    assert done.returncode == 141 and not done.stderr
    done = run("-c", "import sys\nsys.stdout = None\nexec(open(sys.argv.pop(1)).read())", program, "0")
    assert done.returncode == 0 and not done.stderr
