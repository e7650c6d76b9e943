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


class HostCopy:
    """Copies states to host memory, where training does not change them.

    Tensors that share memory and shape share their copy, over all states that one instance is called with: the best
    weights take no memory beside the module's. A temporary one among them is kept until the instance goes, so that its
    memory is not taken for another's.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, state: Any) -> Any:
        """The same containers and values with every tensor copied.

        Args:
            state: tensors, plain values and others' objects in dictionaries, lists and tuples.
        """
        if isinstance(state, Tensor):
            place = (state.device, state.dtype, state.data_ptr(), tuple(state.shape), state.stride())
            if not state.numel() or place not in self._copies:
                self._copies[place] = state, state.detach().to("cpu", copy=True)
            return self._copies[place][1]
        if isinstance(state, Mapping):
            same = type(state)() if isinstance(state, dict) else {}
            same.update({key: self(item) for key, item in state.items()})
            return same
        if type(state) in (list, tuple):
            return type(state)(self(item) for item in state)
        return state


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
