"""Spans that nobody listens to, and who listens."""

from __future__ import annotations

import contextlib

import pytest

from spml_fast.core import spans


class Listener:
    def __init__(self):
        self.heard = []

    @contextlib.contextmanager
    def span(self, name):
        self.heard.append(name)
        yield


def test_without_a_listener_nothing_is_made():
    """Every span is the same empty context, also within itself."""
    with spans.span("a") as first, spans.span("b") as second:
        assert first is None and second is None
    assert spans.span("a") is spans.span("b")


def test_a_listener_hears_what_is_within_and_nothing_after_an_error():
    listener, inner = Listener(), Listener()
    with pytest.raises(RuntimeError), spans.recorded(listener):
        with spans.span("a"), spans.recorded(inner), spans.span("b"):
            pass
        with spans.span("c"):
            raise RuntimeError
    with spans.span("d"):
        pass
    assert listener.heard == ["a", "c"] and inner.heard == ["b"]
