"""A web server of the standard library that gives parts of files, late or wrong if asked to: a store far away.

    python benchmarks/range_server.py FOLDER [--latency-ms 50] [--megabytes-per-second 100]

It prints its address and serves until it is ended. Tests give it faults: a function that is asked about every request.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer.

    Attributes:
        status: HTTP status instead of the file; 0 for none.
        cut: so many bytes are missing at the end, though the header promises them.
        flip: the byte of that number is another one; -1 for none.
        wait: seconds before the body.
        whole: the whole file, whatever part was asked for.
    """

    status: int = 0
    cut: int = 0
    flip: int = -1
    wait: float = 0.0
    whole: bool = False


# (path, first byte, number of the request from 0 on) -> what is wrong with the answer; None for nothing.
Faults = Callable[[str, int, int], Fault | None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without it small answers wait for each other.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        """Size of a file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """A file, or a part of it."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        assert isinstance(server, RangeServer)
        path = server.folder / unquote(self.path).lstrip("/")
        # Whoever can reach the port may ask: nothing outside of the folder, by .. or by a link, is served.
        inside = path.resolve().is_relative_to(server.folder.resolve())
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        fault = server.count(self.command, self.path, start) or Fault()
        if server.latency:
            time.sleep(server.latency)
        if fault.status or not inside or not path.is_file():
            self.send_response(fault.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        stop = min(size, int(asked[2]) + 1) if asked else size
        if fault.whole:
            asked, start, stop = None, 0, size
        if start >= size and asked:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if body:
            self._send(path, start, stop, fault, server.rate)

    def _send(self, path: Path, start: int, stop: int, fault: Fault, rate: float) -> None:
        time.sleep(fault.wait)
        with path.open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(stop - start))
        if fault.flip >= 0:
            data[fault.flip % len(data)] ^= 0x40
        if rate:
            time.sleep(len(data) / rate)
        self.wfile.write(data[: len(data) - fault.cut])
        if fault.cut:
            self.close_connection = True


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder on a free port of this machine while the block runs.

    Args:
        folder: of the files.
        latency: seconds before every answer.
        rate: bytes a second of one connection; 0 for as many as possible.
        faults: what is wrong with which answer; None for nothing.

    Attributes:
        requests: (method, path, first byte) of every request.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency: float = 0.0, rate: float = 0.0, faults: Faults | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.rate, self.faults = folder, latency, rate, faults
        self.requests: list[tuple[str, str, int]] = []
        self._count_lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method: str, path: str, start: int) -> Fault | None:
        """Note a request; returns what is to be wrong with its answer."""
        with self._count_lock:
            number = len(self.requests)
            self.requests.append((method, path, start))
        return self.faults(path, start, number) if self.faults is not None else None

    def get_request(self) -> tuple[socket.socket, Any]:
        """A new connection."""
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """A connection that ends."""
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error."""

    def __enter__(self) -> RangeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            # Else it would serve whoever is connected.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def main() -> int:
    """Serve a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="before every answer")
    parser.add_argument("--megabytes-per-second", type=float, default=0.0, help="of one connection; 0 for no limit")
    args = parser.parse_args()
    server = RangeServer(args.folder, args.latency_ms / 1000, args.megabytes_per_second * 1e6)
    print(server.url, flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
