"""Reading again what a disk, a mount or a server failed to give."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

# Seconds to wait before each further attempt: a mount that fails over, or a busy server, is back by then.
RETRY_PAUSES = (0.5, 2.0, 8.0)

# What the file system says of a path for good. Everything else that has a number may pass.
_LASTING = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EMFILE, errno.ENFILE),
    }
)


def may_pass(error: OSError) -> bool:
    """Whether reading again may help: an error of the disk or the network, not of the path or of an image's content.

    Pillow's errors about damaged images are `OSError` without a number.
    """
    return error.errno is not None and error.errno not in _LASTING


def read_patiently(
    read: Callable[[], T],
    pauses: Sequence[float] | None = None,
    note: Callable[[OSError, float], None] | None = None,
) -> T:
    """What `read` returns; an input/output error is met by further attempts, with pauses between them.

    Args:
        read: called once or more.
        pauses: seconds before each further attempt; None takes `RETRY_PAUSES`.
        note: called with each error that is met so, and the pause in seconds that follows.

    Raises:
        OSError: the last attempt's, or at once one that does not pass.
    """
    for pause in RETRY_PAUSES if pauses is None else pauses:
        try:
            return read()
        except OSError as error:
            if not may_pass(error):
                raise
            if note is not None:
                note(error, pause)
        time.sleep(pause)
    return read()
