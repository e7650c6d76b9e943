"""An array that grows in place: many small ones, joined at the end, would take twice the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class GrowingArray:
    """Values that are added at the end, as one array.

    Args:
        dtype: of the values; what is added is converted to it.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._values, self._size = np.empty(1 << 16, dtype), 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values at the end."""
        end = self._size + len(values)
        if end > len(self._values):
            self._values.resize(max(end, len(self._values) * 5 // 4), refcheck=False)
        self._values[self._size : end] = values
        self._size = end

    def finish(self) -> npt.NDArray[Any]:
        """All values; nothing may be added afterwards."""
        self._values.resize(self._size, refcheck=False)
        return self._values
