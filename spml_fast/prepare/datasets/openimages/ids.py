"""Ids of OpenImages: 16 hexadecimal digits for an image; /m/01g317, /g/11b6xjp0kx or /oi/m_0dzf4 for a class."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

CLASS_ID = re.compile(rb"/[a-z]+/[0-9a-z_-]+")
IMAGE_ID = re.compile(r"[0-9a-fA-F]{16}")
_INVALID = 0xFFFF
# Values of two ASCII characters as a uint16, the first of them in the low byte; `_INVALID` where they are no digits.
_VALUES = np.full(1 << 16, _INVALID, np.uint16)
_DIGITS = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}
for _first, _high in _DIGITS.items():
    for _second, _low in _DIGITS.items():
        _VALUES[_second << 8 | _first] = _high << 4 | _low


def ids_from_hex(text: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Image ids from their digits.

    Args:
        text: uint8 [N, 16], ASCII.

    Returns:
        ids uint64 [N], and whether all 16 are hexadecimal digits, bool [N].
    """
    values = _VALUES[np.ascontiguousarray(text).view("<u2")]
    # Values of digits have no high byte.
    high = values.view(np.uint64) & np.uint64(0xFF00FF00FF00FF00)
    return values.astype(np.uint8).view(">u8")[:, 0].astype(np.uint64), (high[:, 0] | high[:, 1]) == 0
