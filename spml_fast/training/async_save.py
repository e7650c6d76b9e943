"""Writing a checkpoint while training goes on: a copy in host memory, and a thread that writes it.

The thread writes this rank's files and talks to nobody. The main thread makes the checkpoint whole, together with the
other ranks, once all of them have written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spml_fast.core.io import FileRecord

# Path of a file, and what goes into it.
FileContent = tuple[Path, Any]


def host_copy(state: Any) -> Any:
    """The same containers and values with every tensor copied to host memory, where training does not change it.

    Args:
        state: tensors, plain values and others' objects in dictionaries, lists and tuples; tensors that share memory
            and shape share their copy.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = (value.device, value.dtype, value.data_ptr(), tuple(value.shape), value.stride())
            if not value.numel() or place not in copies:
                copies[place] = value.detach().to("cpu", copy=True)
            return copies[place]
        if isinstance(value, Mapping):
            same = type(value)() if isinstance(value, dict) else {}
            same.update({key: copied(item) for key, item in value.items()})
            return same
        if type(value) in (list, tuple):
            return type(value)(copied(item) for item in value)
        return value

    return copied(state)


class BackgroundSave:
    """Files that are being written.

    Args:
        files: in host memory, and nobody else's.
        write: writes one file to the disk and returns its checksum; raises `OSError`.

    Attributes:
        records: name -> what each file holds, of those that are written.
        errors: why others could not be.
    """

    def __init__(self, files: Sequence[FileContent], write: Callable[[Path, Any], FileRecord]) -> None:
        self.records: dict[str, FileRecord] = {}
        self.errors: list[OSError] = []
        self._files, self._write = list(files), write
        # A program that ends in between leaves an unfinished checkpoint, which counts as none.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._failure: Exception | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._files:
                path, state = self._files.pop(0)
                try:
                    self.records[path.name] = self._write(path, state)
                except OSError as error:
                    self.errors.append(error)
                # Its memory is free as soon as it is written.
                del state
        except Exception as error:
            # Raised where the save is finished.
            self._failure = error

    @property
    def busy(self) -> bool:
        """Whether the thread still writes."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until everything is written. Raises what was no `OSError`."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
