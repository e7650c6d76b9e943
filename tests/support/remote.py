"""Servers that tests read data sets from: the standard library's web server, and moto's S3."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.range_server import RangeServer
from spml_fast.data.remote import store

INSTALL = "pip install 'spml_fast[remote]'"
# boto3 and botocore of one version, which s3fs has chosen: left to itself pip tries releases for half an hour.
INSTALL_MOTO = INSTALL + " 'moto[server]' \"boto3==$(python -c 'import botocore; print(botocore.__version__)')\""


def need_http() -> None:
    """Skip where fsspec lacks what it reads web servers with."""
    pytest.importorskip("aiohttp", reason=f"no aiohttp: {INSTALL}")


def need_s3() -> None:
    """Skip where there is no S3 to talk to, or nothing to talk with."""
    pytest.importorskip("s3fs", reason=f"no s3fs: {INSTALL}")
    pytest.importorskip("moto.server", reason=f"no moto: {INSTALL_MOTO}")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further attempts come at once."""
    monkeypatch.setattr(store, "PAUSES", (0.0,) * len(store.PAUSES))
    monkeypatch.setattr(store, "OPENING_PAUSES", (0.0,) * len(store.OPENING_PAUSES))
    monkeypatch.setattr("spml_fast.data.remote.mirror.OPENING_PAUSES", (0.0, 0.0))


def serve(folder: Path, **options: Any) -> RangeServer:
    """A web server of a folder, for a `with` block."""
    return RangeServer(folder, **options)


# (method, path) of a request -> HTTP status to answer with, and the code in S3's words; None lets it through.
S3Fault = Callable[[str, str], tuple[int, str] | None]


class S3:
    """moto's S3 in threads of this process, with a bucket called `bucket`.

    Attributes:
        url: its endpoint.
        requests: (method, path) of every request.
        fault: what is wrong with which answer.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.requests: list[tuple[str, str]] = []
        self.fault: S3Fault = lambda method, path: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Its buckets belong to the process.
        urllib.request.urlopen(f"{self.url}/moto-api/reset", data=b"").close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        fault = self.fault(method, path)
        if fault is None:
            return self._app(environ, start_response)
        status, code = fault
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        start_response(f"{status} {code}", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def close(self) -> None:
        """End it."""
        self._server.shutdown()

    def environment(self) -> dict[str, str]:
        """What a program needs to talk to it."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}

    def objects(self, folder: str) -> list[str]:
        """Names of all objects below `bucket/folder`."""
        import s3fs

        fs = s3fs.S3FileSystem(
            key="test", secret="test", endpoint_url=self.url, skip_instance_cache=True, use_listings_cache=False
        )
        return sorted(path.removeprefix(f"bucket/{folder}/") for path in fs.find(f"bucket/{folder}"))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 of its own with an empty bucket `bucket`; the environment points to it."""
    need_s3()
    import s3fs

    served = S3()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in served.environment().items():
        monkeypatch.setenv(name, value)
    # Nobody's own settings and keys.
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=served.url, skip_instance_cache=True)
    fs.mkdir("bucket")
    served.requests.clear()
    yield served
    served.close()
    s3fs.S3FileSystem.clear_instance_cache()
