"""How far work is: lines for a file, bars of every width for a terminal, nothing on standard output."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from spml_fast.core import progress
from spml_fast.core.progress import Task, bar_line, duration, fitting, say, show_progress, speed, under_way, watched
from tests.support.paths import ROOT

NOTES = ["loss 0.1234", "val mAP 71.20", "512 images/s", "data wait 3%", "1.2 GiB"]
FULL = ["epoch 2/8", "25% done", "9 min left", *NOTES]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is set."""
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(progress, "_display", progress.Display())
    return clock


def make(notes: Sequence[str] | None = NOTES) -> Task:
    return Task("epoch 2/8", 400, unit="", done=100, notes=notes, left=540.0)


@pytest.mark.parametrize(
    ("width", "fields", "bar"),
    [
        (9, 1, 0),
        (20, 2, 0),
        (39, 3, 0),
        (59, 4, 13),
        (79, 5, 17),
        (99, 6, 22),
        (126, 8, 24),
        (200, 8, 40),
        (1000, 8, 40),
    ],
)
def test_a_narrow_terminal_goes_without_the_last_fields(width: int, fields: int, bar: int):
    line = bar_line(make(), width).plain
    assert len(line) <= width
    drawn = "".join(c for c in line if c in "\u2501\u2500")
    assert len(drawn) == bar and drawn.count("\u2501") == round(bar / 4)
    words = re.sub(" [\u2501\u2500]+ ", " | ", line).split(" | ")
    assert words == FULL[:fields], "those that stay are the most important ones, in their order"


def test_every_width_holds_its_line_and_wider_ones_show_no_less():
    shown = 0
    for width in range(1, 160):
        line = bar_line(make(), width).plain
        assert cell_len(line) <= width
        count = sum(field in line for field in FULL)
        assert count >= shown
        shown = count
    assert shown == len(FULL)


def test_a_name_that_is_wider_than_the_terminal_is_cut():
    task = Task("checking \u6f22\u5b57 images of the split", 10)
    assert bar_line(task, 20).plain == "checking \u6f22\u5b57 image\u2026"
    assert bar_line(task, 20, plain=True).plain.endswith("...") and cell_len(bar_line(task, 20).plain) <= 20
    assert "\x1b" not in bar_line(Task("a\x1b]0;x\x07", 10), 80).plain


def test_terminals_without_unicode_get_a_bar_of_ascii():
    line = bar_line(make(), 200, plain=True).plain
    assert line.isascii() and f" {'#' * 10}{'.' * 30} " in line


def test_a_whole_that_nobody_knows_has_no_bar():
    task = Task("reading a.csv", 0, "rows", done=1234)
    assert bar_line(task, 200).plain.startswith("reading a.csv | 1,234 rows")


def test_fields_that_fit():
    assert fitting(["ab", "cd"], 7) == ["ab", "cd"] and fitting(["ab", "cd"], 6) == ["ab"]
    assert fitting(["too long"], 3) == ["too long"] and fitting([], 3) == []
    # A shorter field does not overtake a longer one.
    assert fitting(["a", "bbbbbbbb", "c"], 9) == ["a"]


@pytest.mark.parametrize(("rate", "text"), [(0.3456, "0.35"), (7.24, "7.2"), (12.6, "13"), (4321.0, "4,321")])
def test_speeds(rate: float, text: str):
    assert speed(rate) == text


def test_a_file_gets_a_line_after_ten_seconds_and_then_every_thirty(now: list[float], capsys: pytest.CaptureFixture):
    with show_progress(1000, "checking images") as advance:
        for _ in range(100):
            now[0] += 1.0
            advance(4)
    out, err = capsys.readouterr()
    assert out == "", "standard output is for results"
    lines = err.splitlines()
    assert lines[0] == "checking images | 40 of 1,000 images | 4 min left | 4 images/s"
    assert [int(line.split()[3]) for line in lines] == [40, 160, 280, 400]


def test_nothing_is_said_of_what_is_done_in_less_than_ten_seconds(now: list[float], capsys: pytest.CaptureFixture):
    for _ in range(5):
        with show_progress(10, "looking") as advance:
            now[0] += 9.9
            advance(10)
        # As another command.
        progress._display = progress.Display()
    assert capsys.readouterr() == ("", "")


def test_many_short_tasks_are_not_silent_together(now: list[float], capsys: pytest.CaptureFixture):
    for table in range(8):
        with show_progress(10, f"reading {table}") as advance:
            now[0] += 9
            advance(10)
    assert [line.split(" | ")[0] for line in capsys.readouterr().err.splitlines()] == ["reading 1", "reading 5"]


def test_a_task_after_a_long_silence_does_not_begin_with_a_line(now: list[float], capsys: pytest.CaptureFixture):
    for _ in range(3):
        with show_progress(10, "looking") as advance:
            now[0] += 9.9
            advance(10)
        now[0] += 500
    assert capsys.readouterr() == ("", "")


def test_other_lines_make_it_wait(now: list[float], capsys: pytest.CaptureFixture):
    with show_progress(10, "looking") as advance:
        now[0] += 9
        say("something else")
        now[0] += 9
        advance(1)
        assert capsys.readouterr() == ("something else\n", "")
        now[0] += 21
        advance(1)
        assert capsys.readouterr().err.startswith("looking | 2 of 10 images")


def test_a_part_speaks_for_itself_and_then_the_whole_again(now: list[float], capsys: pytest.CaptureFixture):
    with under_way(make()) as whole:
        now[0] += 10
        whole.change("epoch 3/8", 200, NOTES, 60.0)
        with watched(range(3), "validation", "batches") as batches:
            for _ in batches:
                now[0] += 10
        now[0] += 29
        whole.change("epoch 3/8", 201, NOTES, 59.0)
        now[0] += 1
        whole.change("epoch 3/8", 202, ["loss 0.1"], None)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 3/8 | 50% done | 60 s left | " + " | ".join(NOTES),
        "validation | 3 of 3 batches | 0.1 batches/s",
        "epoch 3/8 | 50% done | loss 0.1",
    ]


def test_a_step_that_takes_long_is_not_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(progress, "_display", progress.Display(beats=True))
    monkeypatch.setattr(progress, "STALLED", 0.05)
    monkeypatch.setattr(progress, "LOOK", 0.01)
    lines, end = list[str](), time.monotonic() + 30
    with show_progress(10, "compiling", unit="steps"):
        while len(lines) < 2 and time.monotonic() < end:
            time.sleep(0.02)
            lines += capsys.readouterr().err.splitlines()
    assert set(lines) == {"compiling | 0 of 10 steps"} and len(lines) >= 2
    assert progress._display.over.is_set()


def test_who_is_not_rank_0_shows_nothing(now: list[float], capsys: pytest.CaptureFixture):
    with show_progress(10, "looking", enabled=False) as advance, watched("ab", "more", enabled=False) as items:
        now[0] += 100
        advance(1)
        assert list(items) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_sizes_of_items_and_a_total_of_their_own(now: list[float], capsys: pytest.CaptureFixture):
    with watched(iter(["aa", "bbb"]), "counting", "letters", total=5, size=len) as items:
        for _ in items:
            now[0] += 30
    assert [line.split(" | ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "2 of 5 letters",
        "5 of 5 letters",
    ]


def test_an_error_ends_what_is_shown():
    with pytest.raises(ValueError), show_progress(10, "looking"):
        raise ValueError
    with pytest.raises(ValueError), watched("ab", "looking") as items:
        for _ in items:
            raise ValueError
    assert progress._display.tasks == [] and progress._display.live is None


def test_steps_that_nobody_sees_cost_no_formatting(now: list[float], monkeypatch: pytest.MonkeyPatch):
    # A display of its own: after other tasks of the same process a line could be due.
    assert progress._display.tasks == [] and now
    monkeypatch.setattr(Task, "fields", lambda *_, **__: pytest.fail("nothing is due"))
    with show_progress(10, "looking") as advance:
        for _ in range(10):
            advance(1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (7200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


SCRIPT = """
import sys, time
from spml_fast.core import progress
progress.FIRST = progress.EVERY = {first}
task = progress.Task("epoch 2/8", 400, unit="", done=100, notes={notes}, left=540.0)
with progress.under_way(task):
    time.sleep(0.3)
    progress.say("a sentence of many short words that is much longer than forty columns are")
    print("result", file=sys.stderr if sys.argv[1:] else sys.stdout)
    with progress.show_progress(10, "validation") as advance:
        advance(5)
        time.sleep(0.4)
progress.say_fields({notes})
progress.say("spml-fast evaluate --run a/rather/long/name/of/a/run/directory --per-class", whole=True)
"""


def on_terminal(width: int, stdout: int | None = None, first: float = 10.0, **environment: str) -> str:
    """What a program with a task writes to a pseudo-terminal of so many columns.

    Args:
        width: of the terminal.
        stdout: another file for standard output.
        first: seconds of silence before a line where there is no bar.
        environment: variables beside the terminal's kind.
    """
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")}
    kept |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(notes=NOTES, first=first)],
        stdout=slave if stdout is None else stdout,
        stderr=slave,
        env=kept,
    )
    os.close(slave)
    out, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            out += data
    os.close(master)
    assert child.wait(10) == 0
    return out.decode()


def without_codes(text: str) -> list[str]:
    """The lines that were drawn, one after the other, whatever was drawn over later."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\0", text)
    return [part for line in re.split(r"[\r\n]+", text) for part in [line.replace("\0", "")] if part]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_on_a_terminal(width: int):
    written = on_terminal(width)
    lines = without_codes(written)
    command = "spml-fast evaluate --run a/rather/long/name/of/a/run/directory --per-class"
    assert lines[-1] == command, "what people copy is one line, whatever the width"
    assert all(cell_len(line) <= width for line in lines if line != command)
    bars = [line for line in lines if line.startswith("epoch 2/8 ")]
    assert bars and {len(line) for line in bars} == {len(bar_line(make(), width - 1).plain)}
    assert any(line.startswith("validation") for line in lines) and "result" in lines
    sentence = "a sentence of many short words that is much longer than forty columns are"
    said = lines[next(i for i, line in enumerate(lines) if line.startswith("a sentence")) :]
    assert " ".join(said).startswith(sentence), "broken between words alone"
    assert lines[-2] == " | ".join(fitting(NOTES, width))
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor comes back"
    assert "\x1b[36m" in written or width == 40, "bars have a colour"


def test_on_a_terminal_without_colours():
    written = on_terminal(80, NO_COLOR="1")
    assert "\u2501" in written and not re.search(r"\x1b\[[0-9;]*3[0-7]m", written)


def test_on_a_terminal_that_cannot_move_its_cursor():
    written = on_terminal(200, TERM="dumb", first=0.0)
    assert "\x1b" not in written and "validation | 5 of 10 images\r\n" in written, "as in a file"


def test_results_stay_in_standard_output(tmp_path):
    with (tmp_path / "out").open("wb") as file:
        written = on_terminal(80, stdout=file.fileno())
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[:2] == ["a sentence of many short words that is much longer than forty columns are", "result"]
    assert lines[2] == " | ".join(NOTES) and "result" not in written and "epoch 2/8" in written
