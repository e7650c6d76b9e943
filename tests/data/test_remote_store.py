"""Objects of a web server whose answers are late, wrong, cut off or refused."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import time

import pytest

from benchmarks.range_server import Fault
from spml_fast.core.urls import location
from spml_fast.data.remote import store as module
from spml_fast.data.remote.store import Store, StoreError
from tests.support.remote import need_http, serve
from tests.support.remote import no_pauses as no_pauses

need_http()
DATA = os.urandom(300_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    return tmp_path


def read(server, start=1000, length=200_000):
    store = Store(location(server.url))
    return store, store.read_range(store.url / "a.bin", start, length)


def test_ranges_are_what_the_file_has(folder):
    with serve(folder) as server:
        store, data = read(server)
        assert data == DATA[1000:201_000]
        assert store.read_range(store.url / "a.bin", 299_999, 1) == DATA[-1:]
        assert store.read_range(store.url / "a.bin", 5, 0) == b""
        assert store.read(store.url / "a.bin", 1 << 20) == DATA and store.size(store.url / "a.bin") == len(DATA)
        assert store.size(store.url / "none") is None
        with pytest.raises(StoreError, match="has 300000 bytes, too many"):
            store.read(store.url / "a.bin", 1000)
    assert store.traffic.received == 200_001 + len(DATA) and store.traffic.repeated == 0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_burst_of_refusals_is_waited_for(status, folder, no_pauses):
    with serve(folder, faults=lambda path, start, number: Fault(status=status) if number < 5 else None) as server:
        store, data = read(server)
        assert data == DATA[1000:201_000] and store.traffic.repeated == 5 and len(server.requests) == 6


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_not_one_that_lacks_the_file(status, folder, no_pauses):
    """fsspec says of either that the file does not exist."""
    with serve(folder, faults=lambda path, start, number: Fault(status=status) if number < 4 else None) as server:
        store = Store(location(server.url))
        assert store.size(store.url / "a.bin") == len(DATA) and store.traffic.repeated == 2
        assert store.size(store.url / "none") is None


def test_pauses_grow_and_differ_from_process_to_process(folder, monkeypatch):
    pauses: list[float] = []
    said: list[str] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with serve(folder, faults=lambda path, start, number: Fault(status=503)) as server:
        store = Store(location(server.url), note=said.append)
        with pytest.raises(StoreError, match=r"a\.bin cannot be reached \(status 503, 10 attempts\)"):
            store.read_range(store.url / "a.bin", 0, 10)
    ours = [pause for pause in pauses if pause > 0.05]
    assert len(ours) == len(module.PAUSES)
    assert all(0.5 * p <= ours[i] <= 1.5 * p for i, p in enumerate(module.PAUSES))
    assert ours != list(module.PAUSES)
    assert said and "does not answer as it should (status 503); trying again in" in said[0]


def test_a_body_that_ends_too_early_is_asked_for_again(folder, no_pauses):
    with serve(folder, faults=lambda path, start, number: Fault(cut=7) if number < 2 else None) as server:
        store, data = read(server)
        assert data == DATA[1000:201_000] and store.traffic.repeated == 2


def test_an_object_that_is_shorter_is_told_at_once(folder):
    with serve(folder) as server:
        for start in (250_000, 400_000):
            with pytest.raises(
                StoreError, match=r"a\.bin (has 300000 bytes, and 450000 were|is shorter than what was)"
            ):
                read(server, start, 450_000 - start)


def test_an_answer_that_takes_too_long_is_given_up(folder, monkeypatch, no_pauses):
    for name, value in (("_CONNECT", 0.2), ("_SILENCE", 0.3), ("_SLOWEST", 10_000_000)):
        monkeypatch.setattr(module, name, value)
    with serve(folder, faults=lambda path, start, number: Fault(wait=2.5) if number == 0 else None) as server:
        began = time.monotonic()
        store, data = read(server)
        assert data == DATA[1000:201_000] and store.traffic.repeated == 1
        assert time.monotonic() - began < 2.4


def test_what_does_not_pass_is_one_sentence(folder):
    for fault, says in (
        (Fault(status=403), r"access to http\S+/a\.bin is refused \(status 403\), or it does not exist"),
        (Fault(status=404), r"/a\.bin does not exist; check the name"),
        (Fault(whole=True), "the server sends whole files where parts are asked for"),
    ):
        with serve(folder, faults=lambda path, start, number, fault=fault: fault) as server:
            with pytest.raises(StoreError, match=says) as caught:
                read(server)
            assert "\n" not in str(caught.value) and len(server.requests) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    ],
)
def test_a_network_that_is_away_for_a_moment_is_waited_for(error, folder, monkeypatch, no_pauses):
    with serve(folder) as server:
        store = Store(location(server.url))
        call, failures = store._call, iter([error, error])

        def failing(*arguments, **options):
            if (failure := next(failures, None)) is not None:
                raise failure
            return call(*arguments, **options)

        monkeypatch.setattr(store, "_call", failing)
        assert store.read_range(store.url / "a.bin", 0, 10) == DATA[:10] and store.traffic.repeated == 2


def test_nobody_answers(folder, no_pauses):
    with serve(folder) as server:
        url = server.url
    store = Store(location(url), (0.0,))
    with pytest.raises(StoreError, match=r"cannot be reached \(.*, 2 attempts\); check the network"):
        store.size(store.url / "a.bin")


def test_a_web_server_is_not_written(folder):
    store = Store(location("https://example.org/a"))
    with pytest.raises(StoreError, match="cannot be written: web servers are only read"):
        store.upload(folder / "a.bin", store.url / "a.bin")


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    with pytest.raises(StoreError, match=r"gcsfs is not installed; pip install 'spml_fast\[remote\]'"):
        Store(location("gs://bucket")).size(location("gs://bucket/a"))


def test_mistakes_of_a_program_stay_what_they_are(folder, monkeypatch):
    with serve(folder) as server:
        store = Store(location(server.url))
        monkeypatch.setattr(store, "_call", lambda *args, **options: {}["nothing"])
        with pytest.raises(KeyError) as caught:
            store.read_range(store.url / "a.bin", 0, 10)
        assert caught.value.__cause__ is None


def test_what_libraries_raise_is_told_from_mistakes():
    """Whatever is imported counts; nothing is imported for it."""
    import aiohttp

    errors = module._request_errors()
    assert issubclass(aiohttp.ClientPayloadError, errors) and issubclass(TimeoutError, errors)
    assert not any(issubclass(kind, errors) for kind in (KeyError, TypeError, ValueError, RuntimeError))
