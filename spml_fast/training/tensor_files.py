"""Files of tensors and plain values: written with a checksum, read without running what they may hold."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, RecordedFile


def write_tensors(path: Path, state: Any) -> FileRecord:
    """Save tensors and plain values as `torch.save`, to the disk; returns the checksum. Raises `OSError`."""
    file = RecordedFile(path)
    torch.save(state, cast("IO[bytes]", file))
    return file.record()


def read_tensors(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load what `torch.save` wrote as tensors and plain values, without running code that the file may hold.

    Args:
        path: the file.
        map_location: where the tensors go, as in `torch.load`.
        mmap: leave tensors in the file until they are used.

    Raises:
        UserError: the file is damaged, or holds something else.
        OSError: it cannot be read.
    """
    # A missing file or a lacking permission is told apart from damage, which torch reports as OSError too.
    path.open("rb").close()
    try:
        with warnings.catch_warnings():
            # torch remarks on files that it did not write.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds something else than tensors and plain values ({first_line(error)}), or is damaged; "
            "it was not loaded, since such a file can run code"
        ) from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({first_line(error) or 'it ends too early'})") from error


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 300 characters; torch explains unpickling in paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return textwrap.shorten(told, 300)
