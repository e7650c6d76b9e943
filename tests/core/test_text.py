"""Names that come from anywhere: what a terminal shows, a spreadsheet opens and a JSON reader takes."""

from __future__ import annotations

import csv
import fcntl
import html
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from spml_fast.core import io
from spml_fast.core.errors import UserError, fail
from spml_fast.core.progress import show_progress
from spml_fast.core.text import (
    formula_safe,
    formula_safe_path,
    has_surrogates,
    in_whole_words,
    markdown_safe,
    parse_json,
    printable,
    shortened,
    without_controls,
)
from spml_fast.training.console import print_table

HOSTILE = "a\x1b[2J\x07\x9b31m\u202eb\r"


def test_messages_hold_no_control_characters(capsys):
    assert without_controls("a\tb\nü 漢字 👩‍👧") == "a\tb\nü 漢字 👩‍👧"
    assert without_controls(HOSTILE) == r"a\x1b[2J\x07\x9b31m\u202eb\r"
    assert without_controls("\udcff\ud800") == r"\udcff\ud800" and printable(HOSTILE).isprintable()
    with pytest.raises(SystemExit):
        fail(f"class {HOSTILE} is listed twice")
    assert capsys.readouterr().err == "error: class a\\x1b[2J\\x07\\x9b31m\\u202eb\\r is listed twice\n"
    with pytest.raises(SystemExit):
        fail("x" * 100_000 + "; do this")
    message = capsys.readouterr().err
    assert len(message) < 5000 and message.endswith("; do this\n")
    assert shortened("short") == "short"


def test_names_in_markdown_are_text():
    """Character references stand for the same characters, and readers of Markdown never take them for markup."""
    assert markdown_safe("plain name_1, 2.5 (a/b) 漢字") == "plain name_1, 2.5 (a/b) 漢字"
    for mark in '\\`*_{}[]<>#!|~$:@.&"^=':
        assert markdown_safe(f"{mark}a {mark} b{mark}") == f"&#{ord(mark)};a &#{ord(mark)}; b&#{ord(mark)};"
    assert markdown_safe(HOSTILE) == "a&#92;x1b&#91;2J&#92;x07&#92;x9b31m&#92;u202eb&#92;r"
    assert html.unescape(markdown_safe("<a href='x'>&amp; www.x.y")) == "<a href='x'>&amp; www.x.y"


def test_names_in_tables_are_no_markup(capsys):
    """`[/b]` used to fail when a training had ended."""
    print_table("of [/b]", [("run directory", "runs/a[/b]c[red]"), ("b" + HOSTILE, "x")])
    shown = capsys.readouterr().out
    assert "runs/a[/b]c[red]" in shown and "of [/b]" in shown and r"b\x1b" not in shown.replace(r"ba\x1b", "")
    assert "\x1b" not in shown and "\x9b" not in shown


def test_progress_of_a_split_with_an_odd_name(monkeypatch):
    class Terminal:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress(2, "checking [/b]\x1b]0;x\x07 images", True) as advance:
        advance(2)
    assert "[/b]" in terminal.text and "\x1b]0;" not in terminal.text


def test_cells_are_no_formulas(tmp_path):
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", "", "'quoted"]
    io.write_csv(tmp_path / "a.csv", ("name", "number"), [(name, -0.5) for name in names])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\t=1", "'\r=1", "a=1", "", "'quoted"]
    assert {row[1] for row in rows} == {"-0.5"}, "numbers stay numbers"
    assert formula_safe("cat") == "cat"
    assert formula_safe_path("=x.jpg") == "./=x.jpg" and formula_safe_path("/a/=x.jpg") == "/a/=x.jpg"


def test_json_of_any_depth():
    assert parse_json("[1]") == [1]
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000, "", b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
    assert has_surrogates("a\ud800") and not has_surrogates("ü👩")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "it is a named pipe, not a regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        ("/dev/zero", "it is a device, not a regular file"),
    ):
        with pytest.raises(OSError, match=reason):
            io.open_regular(path)
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert io.read_lines(tmp_path / "a") == ["a", "b", "c", ""]
    (tmp_path / "b").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"b is not UTF-8 text \(byte 2\)"):
        io.read_text(tmp_path / "b")
    with pytest.raises(UserError, match=r"pipe cannot be read: it is a named pipe, not a regular file"):
        io.read_text(tmp_path / "pipe")


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """A terminal of 40 columns: what is read from it, and the stream that writes to it."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(writer, "w", encoding="utf-8") as stream:
        yield reader, stream
    os.close(reader)


def test_an_error_on_a_terminal_breaks_no_word(terminal, monkeypatch, capsys):
    path = "/data/a-folder/with-a-long-name/and-another-one/labels.csv"
    message = f"{path}, line 3: a class is named twice; take one of the two out, and prepare the data again"
    reader, stream = terminal
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit):
            fail(message)
    lines = os.read(reader, 10_000).decode().splitlines()
    assert " ".join(lines) == f"error: {message}"
    assert len(lines) > 3 and all(len(line) <= 40 or line == f"{path}," for line in lines)
    monkeypatch.undo()
    # In a file or a pipe the sentence is one line, for programs.
    with pytest.raises(SystemExit):
        fail(message)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_lines_of_a_message_end_where_the_terminal_does(terminal):
    _, stream = terminal
    lines = in_whole_words("one two three four five six seven eight nine\nten", stream).split("\n")
    assert lines == ["one two three four five six seven eight", "nine", "ten"]
