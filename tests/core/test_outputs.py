"""Files that a user names are replaced only where the command that writes them wrote them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from safetensors.numpy import save_file

from spml_fast.core.errors import UserError
from spml_fast.core.io import write_csv, write_json, write_text
from spml_fast.core.outputs import Kind, OutputFile, markdown_mark, writer_name

MARK = writer_name("evaluate")


def output(path: Path, kind: Kind, mark: str = MARK, overwrite: bool = False) -> OutputFile:
    return OutputFile(path, kind, mark, "--out", overwrite)


def write_own(path: Path, kind: Kind, mark: str) -> None:
    """A file as the command writes it."""
    if kind in ("csv", "table"):
        write_csv(path, mark.split(","), [("x", 1)])
    elif kind == "json":
        write_json(path, {"written_by": mark, "map": 1.0})
    elif kind == "html":
        write_text(path, f'<!DOCTYPE html>\n<head>\n<meta name="generator" content="{mark}">\n</head>')
    elif kind == "markdown":
        write_text(path, f"---\ntags: []\n---\n\n{markdown_mark(mark)}\n\n# A model\n")
    elif kind == "png":
        pyplot.figure().savefig(path, format="png", metadata={"Software": mark})
        pyplot.close()
    elif kind == "onnx":
        path.write_bytes(b"\x08\x0a\x12\x09spml_fast\x1a\x050.2.0:\x00")
    else:
        metadata = {"spml_fast": "0.2.0", "layout": "timm", "classes": "x" * 70_000}
        save_file({"a": np.zeros(3, np.float32)}, path, metadata=metadata)


def write_other(path: Path, kind: Kind) -> None:
    """A file of the same kind that another program made."""
    if kind in ("csv", "table"):
        path.write_text("path,positives\na.jpg,cat\n")
    elif kind == "json":
        path.write_text('{"map": 1.0, "written_by": "spml_fast evaluate"}')
    elif kind == "html":
        path.write_text("<!DOCTYPE html>\n<p>spml_fast evaluate")
    elif kind == "markdown":
        path.write_text("# A model\n\nwritten by spml_fast evaluate\n")
    elif kind == "png":
        pyplot.figure().savefig(path, format="png")
        pyplot.close()
    elif kind == "onnx":
        path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x053.0.0spml_fast")
    else:
        save_file({"a": np.zeros(3, np.float32)}, path, metadata={"spml_fast": "0.2.0"})


KINDS: list[tuple[Kind, str]] = [
    ("csv", "path,class"),
    ("table", "a,b"),
    ("json", MARK),
    ("png", MARK),
    ("html", MARK),
    ("onnx", MARK),
    ("safetensors", MARK),
    ("markdown", MARK),
]


@pytest.mark.parametrize(("kind", "mark"), KINDS)
def test_own_files_are_replaced_and_others_are_not(tmp_path, kind, mark):
    path = tmp_path / "out"
    output(path, kind, mark).check()
    write_own(path, kind, mark)
    output(path, kind, mark).check()
    write_other(path, kind)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"--out .*out exists and was not written by this command; .*--overwrite"):
        output(path, kind, mark).check()
    output(path, kind, mark, overwrite=True).check()
    assert path.read_bytes() == before
    # A file that another command wrote is another file.
    if kind in ("csv", "table", "json", "png", "html"):
        write_own(path, kind, "spml_fast other")
        with pytest.raises(UserError, match="exists and was not written"):
            output(path, kind, mark).check()
    # What is cut off anywhere is not ours, and no crash.
    write_own(path, kind, mark)
    whole = path.read_bytes()
    for length in range(1, min(len(whole), 60)):
        path.write_bytes(whole[:length])
        try:
            output(path, kind, mark).check()
        except UserError as error:
            assert "exists and was not written" in str(error)


def test_what_lies_where_the_file_is_written_before_it_is_whole(tmp_path):
    """NAME.partial may be somebody's, too."""
    path = tmp_path / "out.csv"
    (tmp_path / "out.csv.partial").write_text("mine\n")
    with pytest.raises(UserError, match=r"out\.csv\.partial exists"):
        output(path, "csv", "a,b").check()
    (tmp_path / "out.csv.partial").write_text("a,b\nx,")
    output(path, "csv", "a,b").check()


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (Path("-"), "is no file name"),
        (tmp_path / "none" / "a.json", "there is no directory"),
    ):
        with pytest.raises(UserError, match=message):
            output(path, "json", overwrite=True).check()
    with pytest.raises(UserError, match=r"a\\x1b\[2J"):
        output(tmp_path / "a\x1b[2J" / "b", "json").check()
    output(tmp_path / "none" / "a.json", "json").check(parent=False)


def test_an_empty_file_is_nobodys(tmp_path):
    (tmp_path / "a.json").touch()
    output(tmp_path / "a.json", "json").check()


def test_json_bears_the_mark(tmp_path):
    file = output(tmp_path / "a.json", "json")
    file.write_json({"map": float("nan")})
    assert file.path.read_text() == '{\n "written_by": "spml_fast evaluate",\n "map": null\n}'
    file.write_json({"map": 2})
    # Made by somebody else while the command worked.
    file.path.write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        file.write_json({"map": 3})
    assert file.path.read_text() == "mine"


def test_a_forged_png_chunk_ends(tmp_path):
    path = tmp_path / "a.png"
    body = b"Software\0other"
    chunk = struct.pack(">I4s", len(body), b"tEXt") + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**32 - 1, b"tEXt") + chunk)
    with pytest.raises(UserError, match="was not written"):
        output(path, "png").check()
