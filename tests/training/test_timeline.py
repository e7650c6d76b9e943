"""The time of a step is cut into spans that add up to it, on a CPU and on a (pretended) GPU, which nobody waits for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from spml_fast.core.spans import OTHER
from spml_fast.training.timeline import DeviceClock, HostClock, Timeline


class Watch:
    """A clock that is set by hand."""

    def __init__(self):
        self.time, self.here = 0.0, True

    def now(self):
        return self.time

    def seconds(self, first, second):
        return second - first

    def wait(self, moment):
        pass


@pytest.fixture
def watch():
    return Watch()


def test_spans_cut_the_steps_and_nothing_else(watch):
    """What is within a span is not counted for it; what is between steps not at all."""
    line = Timeline(watch)
    with line.span("before"):
        watch.time += 100
    for step in range(2):
        watch.time += 1000
        line.begin_step()
        watch.time += 1
        with line.span("a"):
            watch.time += 2
            with line.span("b"):
                watch.time += 4
                with line.span("a"):
                    watch.time += 8
            watch.time += 16
        with line.span("c"):
            watch.time += 32 * step
        watch.time += 64
        line.end_step()
    whole, parts = line.totals()
    assert parts == {OTHER: 130, "a": 52, "b": 8, "c": 32} and whole == sum(parts.values())


def test_a_span_ends_where_an_error_leaves_it(watch):
    line = Timeline(watch)
    line.begin_step()
    with pytest.raises(RuntimeError), line.span("a"):
        watch.time += 1
        raise RuntimeError
    watch.time += 2
    line.end_step()
    assert line.totals() == (3, {OTHER: 2, "a": 1})


def test_what_runs_beside_the_step_takes_none_of_its_time(watch):
    line = Timeline(watch)
    line.begin_step()
    watch.here = False
    with line.span("beside"):
        watch.time += 5
    watch.here = True
    line.end_step()
    assert line.totals() == (5, {OTHER: 5})


def test_the_host_has_the_thread_that_trains():
    clock, seen = HostClock(), []
    thread = threading.Thread(target=lambda: seen.append(clock.here))
    thread.start()
    thread.join()
    assert clock.here and seen == [False]
    first, second = clock.now(), clock.now()
    assert clock.seconds(first, second) == second - first >= 0


@pytest.fixture
def gpu(monkeypatch):
    """What a clock asks of a GPU: the device is 10 s behind the host, and waits are counted."""
    gpu = SimpleNamespace(host=0.0, stream="training", waits=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "training"
            self.time = gpu.host + 10

        def elapsed_time(self, other):
            assert gpu.waits, "an event may be read once it is over"
            return 1000 * (other.time - self.time)

        def synchronize(self):
            gpu.waits.append(self.time)

    def never(*_):
        raise AssertionError("a step waits for the device")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", never)
    return gpu


def test_a_gpu_is_waited_for_once_and_at_the_end(gpu):
    line = Timeline(DeviceClock(torch.device("cuda", 0)))
    for _ in range(3):
        line.begin_step()
        with line.span("forward"):
            gpu.host += 2
        gpu.stream = "communication"
        with line.span("beside"):
            gpu.host += 1
        gpu.stream = "training"
        line.end_step()
        assert not gpu.waits
    assert line.totals() == (9, {OTHER: 3, "forward": 6}) and gpu.waits == [19]
