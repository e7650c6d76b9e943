"""Files that a user names for results: what another program or the user made is never replaced unasked.

Every command that writes such a file leaves its mark in it and replaces only files that bear the mark, unless it is
told to overwrite. What the mark is depends on the kind of file, and is found near the file's beginning:

    csv, table    the first line: the command's own header
    json          the first key, "written_by"
    png           the text chunk Software
    html          <meta name="generator">
    onnx          the producer's name
    safetensors   the metadata of an export: "spml_fast" and "layout"
    markdown      a comment, "written by"
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from spml_fast.core.errors import UserError, fail
from spml_fast.core.io import partial_path, printable, write_json

Kind = Literal["csv", "table", "json", "png", "html", "onnx", "safetensors", "markdown"]

WRITTEN_BY = "written_by"
PRODUCER = "spml_fast"
# Headers of tables; here, so that a command need not import what makes them to know its own file.
PREDICTION_COLUMNS = ("path", "class", "probability", "rank")
CALIBRATED_COLUMNS = (*PREDICTION_COLUMNS, "calibrated_probability")
SUGGESTION_COLUMNS = ("path", "class", "known", "probability", "suggestion", "split", "run")
DECISION_COLUMNS = (*SUGGESTION_COLUMNS, "decision", "who", "when")
# What may stand in the column `decision`.
ACCEPT, REJECT, SKIP = "accept", "reject", "skip"
# Bytes from the beginning among which a mark must be.
_START = 1 << 16
# The header of a safetensors file lists all of its tensors, and its metadata all classes.
_MAX_HEADER = 100 << 20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def writer_name(command: str) -> str:
    """What a command calls itself in its files: `spml_fast evaluate`."""
    return f"{PRODUCER} {command}"


def markdown_mark(mark: str) -> str:
    """The comment that a Markdown file bears near its beginning; `mark` is a command's name."""
    return f"<!-- written by {mark} -->"


@dataclass(frozen=True)
class OutputFile:
    """A file that a user has named for a command's results.

    Attributes:
        path: of the file.
        kind: of the file.
        mark: what tells that the command wrote it: the first line of a csv or table, or several with line ends between
            them where it writes more than one kind, else the command's name.
        option: that named it, for messages.
        overwrite: replace whatever file is there.
    """

    path: Path
    kind: Kind
    mark: str
    option: str
    overwrite: bool = False

    def check(self, parent: bool = True) -> None:
        """Refuse a file that must not be written: before the work begins, and again before the file is replaced.

        Args:
            parent: the folder must be there.

        Raises:
            UserError: it is a folder or no regular file, another program made it, or its folder does not exist.
        """
        name = printable(os.fspath(self.path))
        if str(self.path) == "-":
            raise UserError(f"{self.option} - is no file name; give the name of a file")
        if parent and not self.path.parent.is_dir():
            folder = printable(os.fspath(self.path.parent))
            raise UserError(f"{self.option} {name} cannot be written: there is no directory {folder}")
        self._check_existing(self.path)
        self._check_existing(partial_path(self.path))

    def write_json(self, values: dict[str, Any]) -> None:
        """Check once more, then write a JSON file with the mark. Raises `UserError` if it cannot be written."""
        self.check()
        try:
            write_json(self.path, {WRITTEN_BY: self.mark, **values})
        except OSError as error:
            name = printable(os.fspath(self.path))
            raise UserError(f"{self.option} {name} cannot be written: {error.strerror}") from error

    def _check_existing(self, path: Path) -> None:
        name = printable(os.fspath(path))
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise UserError(f"{self.option} {name} is a directory; give the name of a file")
            if not stat.S_ISREG(mode):
                raise UserError(f"{self.option} {name} is not a regular file; give another name")
            if self.overwrite or path.stat().st_size == 0:
                return
            with path.open("rb") as file:
                own = _has_mark(file, self.kind, self.mark)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.option} {name} cannot be written: {error.strerror}") from error
        if not own:
            raise UserError(
                f"{self.option} {name} exists and was not written by this command; "
                "give another name, or --overwrite to replace it"
            )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--overwrite` of a benchmark."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file as well")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT even if the benchmark did not write it")


def json_output(args: argparse.Namespace, name: str) -> OutputFile | None:
    """The file of `add_json_option`, checked, for the benchmark `name`; None where none was asked for.

    Ends the program with a sentence where the file must not be written.
    """
    if args.json is None:
        return None
    args.json.parent.mkdir(parents=True, exist_ok=True)
    output = OutputFile(args.json, "json", writer_name(name), "--json", args.overwrite)
    try:
        output.check()
    except UserError as error:
        fail(str(error))
    return output


def _has_mark(file: IO[bytes], kind: Kind, mark: str) -> bool:
    """Whether an open file bears a command's mark."""
    start = file.read(_START)
    text = mark.encode("utf-8", "surrogateescape")
    if kind in ("csv", "table"):
        return start.split(b"\n", 1)[0].rstrip(b"\r") in text.split(b"\n")
    if kind == "json":
        return start.lstrip(b"{ \r\n\t").startswith(f'"{WRITTEN_BY}": "{mark}"'.encode())
    if kind == "html":
        return f'<meta name="generator" content="{mark}">'.encode() in start
    if kind == "markdown":
        return markdown_mark(mark).encode() in start
    if kind == "png":
        return _png_software(start) == text
    if kind == "onnx":
        # The second field of the message, the producer's name, behind the first, the version as one or two bytes.
        field = b"\x12" + bytes([len(PRODUCER)]) + PRODUCER.encode()
        return start.startswith(b"\x08") and field in start[:32]
    return {PRODUCER, "layout"} <= _safetensors_metadata(start, file).keys()


def _png_software(data: bytes) -> bytes | None:
    """The text chunk Software before the pixels of a PNG; None where there is none."""
    if not data.startswith(_PNG_SIGNATURE):
        return None
    at = len(_PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(b"Software\0"):
            return body.partition(b"\0")[2]
        if kind == b"IDAT":
            return None
        at += 12 + length
    return None


def _safetensors_metadata(start: bytes, file: IO[bytes]) -> dict[str, Any]:
    """The metadata of a safetensors file; empty where it has none."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _MAX_HEADER:
        return {}
    file.seek(8)
    try:
        metadata = json.loads(file.read(length))["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
