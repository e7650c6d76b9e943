"""Ids of OpenImages: 16 hexadecimal digits for an image; /m/01g317, /g/11b6xjp0kx or /oi/m_0dzf4 for a class."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

CLASS_ID = re.compile(rb"/[a-z]+/[0-9a-z_-]+")
IMAGE_ID = re.compile(r"[0-9a-fA-F]{16}")
# Value of a hexadecimal digit by its ASCII code; 255 where it is none.
_NIBBLE = np.full(256, 255, np.uint8)
for _digits, _first in ((b"0123456789", 0), (b"abcdef", 10), (b"ABCDEF", 10)):
    _NIBBLE[list(_digits)] = np.arange(_first, _first + len(_digits))


def ids_from_hex(text: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Image ids from their digits.

    Args:
        text: uint8 [N, 16], ASCII.

    Returns:
        ids uint64 [N], and whether all 16 are hexadecimal digits, bool [N].
    """
    nibbles = _NIBBLE[text]
    valid: npt.NDArray[np.bool_] = nibbles.max(1, initial=0) < 16
    values = np.ascontiguousarray(nibbles[:, 0::2] << 4 | nibbles[:, 1::2] & 15)
    return values.view(">u8")[:, 0].astype(np.uint64), valid
