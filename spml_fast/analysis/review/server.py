"""Serves a page to the browser of this machine, and writes what is decided there into a table at once.

Only 127.0.0.1 listens, and only who knows the random word in the address is answered. What can be asked for is the
page, the pictures that it lists, and the decisions: names are looked up, never joined to a path.
"""

from __future__ import annotations

import http.server
import json
import re
import secrets
import sys
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from spml_fast.analysis.review.decisions import DecisionTable, read_changes, suggestion_cells
from spml_fast.analysis.review.files import MARK, PAGE, THUMBNAIL, Json, is_file
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.core.text import parse_json, printable

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
# All decisions of a page of a million rows.
_MOST_BYTES = 100 << 20
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReviewPage:
    """A page that `suggest --page` wrote, read for serving.

    Args:
        path: the file, or the folder.

    Attributes:
        folder: that it lies in.
        data: what it shows.
        pictures: names of the pictures that it may ask for.
        rows: how many suggestions it has.
        manifest: folder of the data set that they are about.

    Raises:
        UserError: it cannot be read, or is no such page.
    """

    def __init__(self, path: Path) -> None:
        self.file = path if is_file(path) else path / PAGE
        self.folder = self.file.parent
        name = printable(str(self.file))
        try:
            with open_regular(self.file) as file:
                text = file.read().decode("utf-8", "replace")
        except OSError as error:
            raise UserError(
                f"{name} cannot be read: {error.strerror or error}; give a page of `spml-fast suggest --page`"
            ) from error
        found = _DATA.search(text)
        if MARK not in text[:1000] or found is None:
            raise UserError(f"{name} is no page of `spml-fast suggest --page`; make one")
        try:
            self.data: Json = parse_json(found[1])
            self.pictures = {i["src"] for i in self.data["images"] if THUMBNAIL.fullmatch(i["src"])}
            self.rows = len(suggestion_cells(self.data))
            self.manifest = str(self.data["manifest"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{name} is damaged; make it again with `spml-fast suggest --page`") from error
        # Both stand at the page's beginning, before anything that comes from data.
        text = text.replace('<meta name="autosave" content="off">', '<meta name="autosave" content="on">', 1)
        self.html = text.replace("connect-src 'none'", "connect-src 'self'", 1).encode()

    def picture(self, name: str) -> bytes | None:
        """The bytes of a picture; None for a name that the page does not list, or that leads out of its folder."""
        if name not in self.pictures:
            return None
        path = self.folder / name
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                return None
            with open_regular(path) as file:
                return file.read()
        except OSError:
            return None


class ReviewServer(http.server.ThreadingHTTPServer):
    """The server; `address` is what to open.

    Args:
        page: to serve.
        table: takes the decisions.
        port: to listen at; 0 for any free one.

    Raises:
        OSError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, page: ReviewPage, table: DecisionTable, port: int = 0) -> None:
        self.page, self.table = page, table
        self.token = secrets.token_urlsafe(24)
        self.writing = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where the browser went away, as it does when an image is out of view again."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "spml_fast", ""
    # Of a connection that says nothing, in seconds.
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""

    def _allowed(self) -> str | None:
        """What is asked for below the token; None, after an answer, for whoever may not ask.

        A page of another origin that has its name lead to 127.0.0.1 gives itself away by the host it asks for.
        """
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        first, _, rest = self.path.removeprefix("/").partition("/")
        known = secrets.compare_digest(first.encode("utf-8", "replace"), self.server.token.encode())
        strange = host not in hosts or (origin is not None and origin.removeprefix("http://") not in hosts)
        if not known or strange or not self.path.startswith(f"/{first}/"):
            self._answer(HTTPStatus.FORBIDDEN, {"error": "this address is not right; take it from the terminal"})
            return None
        return rest

    def _answer(self, status: HTTPStatus, body: bytes | Json, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """The page, one of its pictures, or the decisions so far."""
        name = self._allowed()
        if name is None:
            return
        if name == "":
            self._answer(HTTPStatus.OK, self.server.page.html, "text/html; charset=utf-8")
        elif name == "decisions":
            with self.server.writing:
                entries = dict(self.server.table.entries)
            self._answer(HTTPStatus.OK, {"entries": entries})
        elif (picture := self.server.page.picture(name)) is not None:
            self._answer(HTTPStatus.OK, picture, "image/jpeg")
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "there is no such thing"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Decisions."""
        # What is not read of a request would be taken for the next one.
        self.close_connection = True
        name = self._allowed()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        if name != "decisions" or self.headers.get_content_type() != "application/json":
            self._answer(HTTPStatus.NOT_FOUND, {"error": "decisions are sent as JSON to /decisions"})
        elif not re.fullmatch("[0-9]{1,10}", length) or int(length) > _MOST_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "the request has no length, or is too long"})
        else:
            self._take(self.rfile.read(int(length)))

    def _take(self, body: bytes) -> None:
        try:
            changes = read_changes(parse_json(body), self.server.page.rows)
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": f"the request is not understood: {error}"})
            return
        try:
            with self.server.writing:
                self.server.table.apply(changes)
        except UserError as error:
            self._answer(HTTPStatus.CONFLICT, {"error": str(error)})
            return
        self._answer(HTTPStatus.OK, {"saved": len(changes)})
