"""What a malicious file holds."""

from __future__ import annotations

import os
from pathlib import Path


class Payload:
    """Makes a file when it is unpickled.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)
