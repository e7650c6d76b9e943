"""Objects under a URL: read whole or by ranges, listed and written, with patience. The only file that imports fsspec.

Every request that fails in a way that may pass (429, 5xx, throttling, a timeout, a broken connection, a body that ends
too early) is repeated with growing pauses; the libraries below make no further attempts of their own, so that attempts
do not multiply. What stays wrong, and what cannot pass, is a `StoreError` with one sentence.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import http.client
import importlib.util
import itertools
import os
import random
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spml_fast.core.errors import UserError
from spml_fast.core.urls import Url
from spml_fast.data.read_retry import read_patiently

T = TypeVar("T")

# Seconds before each further attempt, each times 0.5 to 1.5 at random, so that ranks that were refused together do not
# come back together: a minute and a half of an outage is waited for.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
# The same where a command begins: a wrong name should not take as long to be told.
OPENING_PAUSES = (0.5, 2.0)
# A pause this long is told.
_TOLD = 8.0
# Seconds until a connection is there, until the next bytes come, and bytes a second below which a request is given up.
_CONNECT, _SILENCE, _SLOWEST = 10.0, 30.0, 100_000
# Connections of a process.
_CONNECTIONS = 64

# Package that fsspec needs for a scheme, besides itself.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3='{\"anon\": true}' for a "
    "public bucket",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_GONE = (404, 410)
# HTTP status codes that may pass.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
# `errno` of errors that may pass: of S3's as s3fs gives them, and of a network that is away for a moment.
_PASSING_NUMBERS = frozenset(
    {
        *(errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE),
        *(errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
    }
)
# What libraries raise besides errors of the system: they have no base in common.
_EXCEPTIONS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
    "urllib3.exceptions": ("HTTPError",),
}
# Those libraries whose exceptions without a number are about the network.
_NETWORK = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "urllib3", "azure")


def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _request_errors() -> tuple[type[Exception], ...]:
    """What a request may raise that says something of the store or the network, of the libraries that are in use.

    Anything else is a mistake of a program.
    """
    found: list[type[Exception]] = [OSError, EOFError, http.client.HTTPException]
    for module, names in _EXCEPTIONS.items():
        # Whatever raised it has been imported.
        found += [getattr(sys.modules[module], name) for name in names if hasattr(sys.modules.get(module), name)]
    return tuple(found)


class StoreError(UserError):
    """A store, and not an image in it, is what cannot be used."""


@dataclass
class Traffic:
    """What went over the network.

    Attributes:
        requests: attempts that were made.
        received: bytes that came.
        repeated: attempts that failed and were repeated.
    """

    requests: int = 0
    received: int = 0
    repeated: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, requests: int = 0, received: int = 0, repeated: int = 0) -> None:
        """Count; safe to call from several threads."""
        with self._lock:
            self.requests += requests
            self.received += received
            self.repeated += repeated


def _options(scheme: str) -> dict[str, Any]:
    """What fsspec is given; a user's own settings for it stay (`FSSPEC_S3`, ~/.config/fsspec)."""
    from fsspec.config import conf

    own = copy.deepcopy(conf.get(scheme, {}))
    if scheme == "s3":
        settings = {
            "connect_timeout": _CONNECT,
            "read_timeout": _SILENCE,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
        return {"config_kwargs": settings | own.get("config_kwargs", {}), "use_listings_cache": False}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE)
        return {"client_kwargs": {"timeout": timeout} | own.get("client_kwargs", {})}
    return {"use_listings_cache": False}


def _file_system(url: Url) -> Any:
    """fsspec's file system for a URL, connected. `StoreError` where a package is missing."""
    package = _PACKAGES[url.scheme]
    missing = next((name for name in ("fsspec", package) if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        more = f" {package}" if package == "adlfs" else ""
        raise StoreError(f"{url} cannot be used: {missing} is not installed; pip install 'spml_fast[remote]'{more}")
    import fsspec
    import fsspec.asyn

    fs = fsspec.filesystem(url.scheme, **_options(url.scheme))
    if url.scheme == "s3":
        # Attempts are counted here.
        fs.retries = 1
    if hasattr(fs, "set_session"):
        # Threads that connect at the same time would each make a session.
        fsspec.asyn.sync(fs.loop, fs.set_session, timeout=2 * _CONNECT)
    return fs


class Store:
    """Objects below a URL. Safe to use from several threads, and after a fork.

    Args:
        url: of a folder.
        pauses: seconds before each further attempt; None for `PAUSES`.
        note: called with a sentence when it takes long.

    Attributes:
        traffic: what this process has asked for and got.
        tell: `note`.
    """

    def __init__(
        self, url: Url, pauses: tuple[float, ...] | None = None, note: Callable[[str], None] = _print_note
    ) -> None:
        self.url, self.traffic, self.tell = url, Traffic(), note
        self._pauses = pauses
        self._lock = threading.Lock()
        # The file system, and the process that made it: connections do not survive a fork.
        self._made: tuple[int, Any] | None = None

    @property
    def _fs(self) -> Any:
        if self._made is None or self._made[0] != os.getpid():
            with self._lock:
                if self._made is None or self._made[0] != os.getpid():
                    self._made = os.getpid(), _file_system(self.url)
        return self._made[1]

    def _call(self, url: Url, seconds: float | None, name: str, *args: Any, **options: Any) -> Any:
        """One request: a method of the file system, given up after so many seconds."""
        fs = self._fs
        self.traffic.add(requests=1)
        method = getattr(fs, f"_{name}", None)
        if method is None or not asyncio.iscoroutinefunction(method):
            return getattr(fs, name)(url, *args, **options)
        import fsspec.asyn

        return fsspec.asyn.sync(fs.loop, method, url, *args, timeout=seconds, **options)

    def _patiently(self, url: Url, attempt: Callable[[], T]) -> T:
        """What an attempt returns, with further ones. Raises `StoreError`."""

        def once() -> T:
            try:
                return attempt()
            except _request_errors() as error:
                raise _translated(error, url) from error

        def note(error: OSError, pause: float) -> None:
            self.traffic.add(repeated=1)
            if pause >= _TOLD:
                self.tell(f"{url} does not answer as it should ({error.strerror}); trying again in {pause:.0f} s")

        pauses = [pause * random.uniform(0.5, 1.5) for pause in (PAUSES if self._pauses is None else self._pauses)]
        try:
            return read_patiently(once, pauses, note)
        except OSError as error:
            raise StoreError(
                f"{url} cannot be reached ({error.strerror}, {len(pauses) + 1} attempts); check the network and the "
                "store, and repeat the command"
            ) from error

    def read_range(self, url: Url, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of an object.

        Raises:
            StoreError: it is not there, is shorter, may not be read, or the store does not answer.
        """
        if length == 0:
            return b""
        seconds = _CONNECT + _SILENCE + length / _SLOWEST

        def attempt() -> bytes:
            data: bytes = self._call(url, seconds, "cat_file", start=start, end=start + length)
            self.traffic.add(received=len(data))
            if len(data) > length:
                raise StoreError(f"{url}: the server sends whole files where parts are asked for; use another one")
            if len(data) < length:
                size = self._size(url)
                if size is not None and size < start + length:
                    raise StoreError(f"{url} has {size} bytes, and {start + length} were written; restore it")
                raise OSError(errno.EIO, f"the answer ended after {len(data)} of {length} bytes")
            return data

        return self._patiently(url, attempt)

    def read(self, url: Url, most: int) -> bytes:
        """A small object, whole. Raises `StoreError` as `read_range`, and where it has more than `most` bytes."""

        def attempt() -> bytes:
            size = self._size(url)
            if size is not None and size > most:
                raise StoreError(f"{url} has {size} bytes, too many for what it should be; name another place")
            data = self._whole(url, most)
            if size is not None and len(data) != size:
                raise OSError(errno.EIO, f"the answer has {len(data)} of {size} bytes")
            return data

        return self._patiently(url, attempt)

    def _whole(self, url: Url, most: int) -> bytes:
        """An object that is to have `most` bytes at most."""
        data: bytes = self._call(url, _CONNECT + _SILENCE + most / _SLOWEST, "cat_file")
        self.traffic.add(received=len(data))
        return data

    def _size(self, url: Url) -> int | None:
        size = self._call(url, _CONNECT + _SILENCE, "info").get("size")
        return None if size is None else int(size)

    def size(self, url: Url) -> int | None:
        """Bytes of an object; None where there is none. Raises `StoreError`."""

        def attempt() -> int | None:
            try:
                return self._size(url)
            except FileNotFoundError as error:
                hidden = _hidden(error, url)
                if hidden is None or _status(hidden) in _GONE:
                    return None
                raise

        return self._patiently(url, attempt)

    def names(self, url: Url) -> list[str]:
        """Names of objects and folders below a folder; empty where it does not exist. Raises `StoreError`."""

        def attempt() -> list[str]:
            try:
                found = self._call(url, _CONNECT + _SILENCE, "ls", detail=False)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in found]
            return sorted({name for name in names if name})

        return self._patiently(url, attempt)

    def upload(self, path: Path, url: Url, new: bool = False) -> None:
        """Write a file to an object, in several parts where it is large; it is there whole or not at all.

        Args:
            path: of the file.
            url: of the object.
            new: refuse to replace an object, where the store can.

        Raises:
            StoreError: it cannot be written, is there already, or has another size afterwards.
        """
        size = path.stat().st_size
        options = {"mode": "create"} if new and url.scheme == "s3" else {}
        attempts = itertools.count()

        def attempt() -> None:
            again = next(attempts) > 0
            try:
                self._call_upload(path, url, options, size)
            except FileExistsError:
                # An earlier attempt may have arrived, and its answer been lost.
                if not again or self._size(url) != size or self._whole(url, size) != path.read_bytes():
                    raise
            written = self._size(url)
            if written != size:
                raise OSError(errno.EIO, f"{written} of {size} bytes arrived")

        if url.scheme in ("http", "https"):
            raise StoreError(f"{url} cannot be written: web servers are only read; name a bucket")
        self._patiently(url, attempt)

    def _call_upload(self, path: Path, url: Url, options: dict[str, Any], size: int) -> None:
        fs = self._fs
        self.traffic.add(requests=1)
        import fsspec.asyn

        seconds = _CONNECT + _SILENCE + size / _SLOWEST
        fsspec.asyn.sync(fs.loop, fs._put_file, str(path), str(url), timeout=seconds, **options)

    def remove(self, url: Url) -> None:
        """Delete an object that may be there. Raises `StoreError`."""

        def attempt() -> None:
            try:
                self._call(url, _CONNECT + _SILENCE, "rm_file")
            except FileNotFoundError:
                return

        self._patiently(url, attempt)


def _code(error: BaseException) -> str:
    """What S3 calls an error; empty where it is no error of S3."""
    response = getattr(error.__cause__, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(found or "")


def _status(error: BaseException) -> int | None:
    """HTTP status that an error is about."""
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    response = getattr(error.__cause__, "response", None)
    found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return found if isinstance(found, int) else None


def _hidden(error: Exception, url: Url) -> Exception | None:
    """What fsspec has called a missing file, of a web server that does not answer or is busy; None of one that is."""
    cause = error.__cause__
    web = url.scheme in ("http", "https")
    return cause if web and isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else None


def _translated(error: Exception, url: Url) -> OSError | StoreError:
    """What an exception of fsspec or a library below it means: `OSError` with a number where it may pass, else
    `StoreError`."""
    error = _hidden(error, url) or error
    kind, status, code = type(error).__name__, _status(error), _code(error)
    library = type(error).__module__.partition(".")[0]
    said = code or (f"status {status}" if status is not None else str(error).strip().split("\n")[0] or kind)
    login = _CREDENTIALS.get(url.scheme, "give them to fsspec (docs/data.md, Data on object storage)")
    if "Credential" in kind or kind in ("ProfileNotFound", "TokenRetrievalError"):
        return StoreError(f"there are no credentials for {url} ({said}); {login}")
    if kind == "ParamValidationError":
        return StoreError(f"{url} is no name that the store takes; check the bucket's and the rest")
    if code == "NoSuchBucket":
        return StoreError(f"{url}: there is no bucket {url.bucket}; check its name, and the region or endpoint")
    if isinstance(error, FileNotFoundError) or status in _GONE:
        return StoreError(f"{url} does not exist; check the name")
    if isinstance(error, FileExistsError):
        return StoreError(f"{url} exists, and is not replaced; choose another place")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StoreError(
            f"access to {url} is refused ({said}), or it does not exist; check the name and the permissions, or {login}"
        )
    if status == 416:
        return StoreError(f"{url} is shorter than what was written; restore it")
    if status is not None:
        passing = status in _PASSING or code in ("SlowDown", "RequestTimeout", "InternalError")
    elif isinstance(error, TimeoutError | asyncio.TimeoutError):
        passing, said = True, "it took too long"
    elif isinstance(error, ConnectionError | http.client.HTTPException | EOFError | ssl.SSLError):
        passing = not isinstance(error, ssl.SSLCertVerificationError)
    elif isinstance(error, OSError) and error.errno is not None:
        # Negative ones are of names that could not be looked up: a name server may be away for a moment as well.
        passing = error.errno in _PASSING_NUMBERS or error.errno < 0
    else:
        passing = library in _NETWORK
    if passing:
        return OSError(errno.EIO, said)
    return StoreError(f"{url} cannot be used ({said}); check the name and the settings of the store")
