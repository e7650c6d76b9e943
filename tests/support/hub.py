"""A stand-in for the Hugging Face Hub: a local server that speaks the few calls that huggingface_hub makes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_stand_in"
OWNER = "owner"


class Hub(BaseHTTPRequestHandler):
    """Models by name, each a dictionary of files; large files come by git-lfs as they do there."""

    models: ClassVar[dict[str, dict[str, bytes]]] = {}
    private: ClassVar[dict[str, bool]] = {}
    commits: ClassVar[dict[str, int]] = {}
    blobs: ClassVar[dict[str, bytes]] = {}
    calls: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._refuse(401, "RepoNotFound" if self.command != "POST" else "Unauthorized")
        return False

    def _commit(self, name: str) -> str:
        return hashlib.sha1(f"{name} {self.commits[name]}".encode()).hexdigest()

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, path = self._read(), unquote(urlsplit(self.path).path)
        self.calls.append(f"POST {path}")
        if not self._allowed():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if name in self.models:
                self._send(409, {"error": "exists", "url": f"{self._root}/{name}"})
                return
            private = asked.get("private", asked.get("visibility") == "private")
            self.models[name], self.private[name], self.commits[name] = {}, bool(private), 0
            self._send(200, {"url": f"{self._root}/{name}", "name": name, "id": name})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self._root}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.models[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.models[name][value["path"]] = self.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    self.models[name].pop(value["path"])
            self.commits[name] += 1
            commit = self._commit(name)
            self._send(200, {"commitUrl": f"{self._root}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._send(200, {})

    def do_PUT(self) -> None:
        body = self._read()
        oid = hashlib.sha256(body).hexdigest()
        assert self.path.endswith(oid)
        self.blobs[oid] = body
        self._send(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.calls.append(f"{self.command} {path}")
        name = next((n for n in self.models if path.startswith((f"/{n}/", f"/api/models/{n}"))), None)
        if name is None:
            self._refuse(404, "RepoNotFound")
        elif self.private[name] and not self._allowed():
            pass
        elif path.startswith("/api/"):
            rest = path.removeprefix(f"/api/models/{name}")
            files = self.models[name]
            if rest.startswith("/tree"):
                entries = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()]
                self._send(200, entries)
            else:
                siblings = [{"rfilename": f} for f in files]
                about = {"id": name, "modelId": name, "sha": self._commit(name), "siblings": siblings, "tags": []}
                self._send(200, about | {"private": self.private[name], "downloads": 0, "likes": 0})
        else:
            revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
            if revision not in ("main", self._commit(name)):
                self._refuse(404, "RevisionNotFound")
            elif file not in self.models[name]:
                self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self._commit(name))
            else:
                data = self.models[name][file]
                etag = hashlib.sha256(data).hexdigest()
                self._send(200, data, ETag=f'"{etag}"', X_Repo_Commit=self._commit(name))

    @property
    def _root(self) -> str:
        assert isinstance(self.server, ThreadingHTTPServer)
        return f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def running_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of its own, which huggingface_hub talks to inside, with an empty cache and somebody logged in."""
    from huggingface_hub import constants

    class Own(Hub):
        models: ClassVar[dict[str, dict[str, bytes]]] = {}
        private: ClassVar[dict[str, bool]] = {}
        commits: ClassVar[dict[str, int]] = {}
        blobs: ClassVar[dict[str, bytes]] = {}
        calls: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    root = f"http://127.0.0.1:{server.server_address[1]}"
    # What HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_DISABLE_XET and HF_HUB_OFFLINE set when the library is imported.
    patch.setattr(constants, "ENDPOINT", root)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", root + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield Own
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
