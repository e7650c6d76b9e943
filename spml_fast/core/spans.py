"""Spans of a training step: the code says what it does, for whoever measures it.

Nobody does unless a run is profiled (training/step_profile.py); a span is then a look at one variable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

# In the order of the tables. The forwards of the views are `FORWARD` and the view's name.
DATA: Final = "data wait"
DECODING: Final = "data wait: decoding"
VIEWS: Final = "data wait: views"
LABELS: Final = "labels"
FORWARD: Final = "forward"
METHOD: Final = "method and loss"
BACKWARD: Final = "backward"
OPTIMIZER: Final = "optimizer"
COMMUNICATION: Final = "communication"
SAVING: Final = "saving"
OTHER: Final = "logging and other"


class Recorder(Protocol):
    """Who measures."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Inside, the time is that of the span, but for what spans within it take."""


_recorder: Recorder | None = None
_NOBODY = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Inside, what is done is `name`."""
    return _NOBODY if _recorder is None else _recorder.span(name)


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Inside, spans of this process go to a recorder."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
