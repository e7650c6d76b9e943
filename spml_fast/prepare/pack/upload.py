"""Packing to object storage: a shard goes there as soon as it is whole, the Manifest when all are, manifest.json last.

    URL/packing.json      whose unfinished work it is; removed at the end
    URL/shards/NAME.tar   each as one object, which is there whole or not at all
    URL/...               the Manifest's other files
    URL/manifest.json     written last: without it there is no Manifest

Nothing that is there is replaced, but for what the same work has written before it was cut off. On the disk lie at most
as many shards as there are worker processes.
"""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.io import write_text
from spml_fast.core.text import parse_json
from spml_fast.core.urls import Url
from spml_fast.data.manifest import Manifest
from spml_fast.data.remote.mirror import remote_files
from spml_fast.data.remote.store import OPENING_PAUSES, Store
from spml_fast.prepare.pack.plan import PlannedShard
from spml_fast.prepare.pack.writer import load_record

_CLAIM = "packing.json"
# Bytes of a claim at most.
_MOST = 1 << 16


class Upload:
    """Where a packed Manifest goes.

    Args:
        url: of the Manifest to write.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, url: Url) -> None:
        if url.scheme in ("http", "https"):
            raise UserError(f"--out {url} cannot be written: web servers are only read; name a bucket")
        self.url, self.store = url, Store(url)

    def finished(self, work: Path) -> Manifest | None:
        """The Manifest that `work` was cut off behind: it is whole, and only the claim had to be removed; else None.

        Raises:
            UserError: nothing answers.
        """
        own = work / _CLAIM
        if not own.exists() or not {_CLAIM, "manifest.json"} <= set(Store(self.url, OPENING_PAUSES).names(self.url)):
            return None
        if self.store.read(self.url / _CLAIM, _MOST) != own.read_bytes():
            return None
        self.store.remove(self.url / _CLAIM)
        return Manifest(self.url)

    def check(self, work: Path) -> bool:
        """Whether the URL has the unfinished work of `work`; else it is empty.

        Raises:
            UserError: there is a Manifest, unfinished work of somebody else, or anything else; or nothing answers.
        """
        own = work / _CLAIM
        names = Store(self.url, OPENING_PAUSES).names(self.url)
        if "manifest.json" in names:
            raise UserError(f"{self.url} already holds a Manifest, which is not replaced; choose another --out")
        if _CLAIM in names:
            theirs = self.store.read(self.url / _CLAIM, _MOST)
            if own.exists() and own.read_bytes() == theirs:
                return True
            raise UserError(
                f"{self.url} holds unfinished work{_owner(theirs)}; repeat that command there, or delete what is at "
                "the URL"
            )
        if names:
            raise UserError(f"{self.url} is not empty ({names[0]}), and is no Manifest; choose another --out")
        return False

    def claim(self, work: Path) -> None:
        """Note whose work it is, at the URL and in `work`, unless that was done. Raises `UserError` as `check`."""
        if self.check(work):
            return
        own = work / _CLAIM
        note = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "folder": str(work.resolve())}
        write_text(own, json.dumps(note))
        self.store.upload(own, self.url / _CLAIM, new=True)

    def put_shard(self, path: Path) -> None:
        """Upload a whole shard. Raises `StoreError`."""
        self.store.upload(path, self.url / "shards" / path.name)

    def is_whole(self, work: Path, planned: PlannedShard) -> bool:
        """Whether a shard was uploaded: its record is written after that, and it has the bytes that it should."""
        record = load_record(work, planned)
        return record is not None and self.store.size(self.url / "shards" / f"{planned.name}.tar") == record.size

    def publish(self, manifest: Manifest) -> Manifest:
        """Upload a Manifest whose shards are there; returns it as it is read there. Raises `UserError`."""
        for file in remote_files(self.url, manifest.meta):
            self.store.upload(manifest.folder / file.name, self.url / file.name)
        self.store.upload(manifest.folder / "manifest.json", self.url / "manifest.json", new=True)
        self.store.remove(self.url / _CLAIM)
        return Manifest(self.url)


def _owner(claim: bytes) -> str:
    """Who has made a claim, for a message."""
    try:
        note = parse_json(claim)
        return f" of {note['host']} (folder {note['folder']})"
    except (ValueError, KeyError, TypeError):
        return ""
