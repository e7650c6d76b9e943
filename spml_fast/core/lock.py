"""Who uses a folder: one process may write to a run directory, and a Manifest that is being read is not replaced.

A user of a folder leaves a small file there that says who it is: machine, boot, namespace of process ids, process and
its start. On the same system the file counts while that process is there; a process id that was given to another one
has another start. Of another machine nobody can know that, so the user touches its file every few seconds, and one that
was not touched for two minutes, on the clock of the disk, counts no more. A killed process therefore hinders nobody.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spml_fast.core.errors import UserError

# In a folder that is read: a file for each process that says it reads it for long.
READERS = ".readers"
TOUCH = 15.0
# Attributes of files on network disks may be cached for a minute.
STALE = 120.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Start of a process in ticks since boot; "" if it is gone or only its exit status is left."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not fields or fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Owner:
    """A process that uses a folder.

    Attributes:
        host: name of its machine.
        boot: id of the boot of that machine.
        namespace: namespace that its process id belongs to; containers on one machine have their own.
        pid: its process id.
        start: when it started, in ticks since boot.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    start: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        boot = _read("/proc/sys/kernel/random/boot_id")
        return cls(socket.gethostname(), boot, namespace, os.getpid(), _process_start(os.getpid()))

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """What a file says; None if it is gone, empty or half written."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values) if isinstance(values, dict) else None
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def uses(self, path: Path) -> bool:
        """Whether the owner, which `path` names, is still there."""
        here = Owner.current()
        if (self.boot, self.namespace) == (here.boot, here.namespace):
            return _process_start(self.pid) == self.start
        return _age(path) < STALE


def _age(path: Path) -> float:
    """Seconds since a file was touched, on the clock of its disk; infinite if it is gone."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime
    except OSError:
        return float("inf")


class _Held:
    """The files of this process, which a thread touches."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self.pid = 0

    def add(self, path: Path) -> None:
        self.paths = self.paths | {path} if self.pid == os.getpid() else {path}
        if self.pid != os.getpid():
            # The first one, or a fork, which has no threads and owns nothing.
            self.pid = os.getpid()
            threading.Thread(target=self._touch, name="locks", daemon=True).start()
            atexit.register(release_all)

    def _touch(self) -> None:
        while True:
            time.sleep(TOUCH)
            for path in self.paths:
                with contextlib.suppress(OSError):
                    os.utime(path)


_held = _Held()


def release_all() -> None:
    """Give up everything that this process uses; also happens when it ends."""
    if _held.pid != os.getpid():
        return
    paths, _held.paths = _held.paths, set()
    for path in paths:
        if Owner.read(path) == Owner.current():
            with contextlib.suppress(OSError):
                path.unlink()


def lock_open_file(descriptor: int, wait: bool = True) -> bool:
    """Keep out whoever has opened the same file and locks it, threads of this process included, until it is closed.

    Args:
        descriptor: of the open file.
        wait: for whoever holds it.

    Returns:
        Whether it is locked; False on a disk without locks.

    Raises:
        BlockingIOError: it is held by somebody else, and `wait` is false.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


@dataclass(frozen=True)
class Guarded:
    """A lock file that is held.

    Attributes:
        descriptor: of the open file.
        alone: no other process holds it; False on a disk without locks, where that is not known.
    """

    descriptor: int
    alone: bool


@contextlib.contextmanager
def guarded(path: Path, wait: bool = True) -> Iterator[Guarded]:
    """An open file at `path`, made if it is not there, that other users of this function, threads too, wait for.

    Args:
        path: of the file.
        wait: for whoever holds it.

    Raises:
        BlockingIOError: another one holds it, and `wait` is false.
        OSError: the file cannot be made.
    """
    while True:
        # Its own description of the file: threads of one process wait for each other, too.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            alone = lock_open_file(file, wait)
            try:
                same = os.path.samestat(os.fstat(file), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield Guarded(file, alone)
                return
        finally:
            os.close(file)


def acquire(path: Path, what: str) -> None:
    """Take a folder for this process alone, until it ends or calls `release_all`.

    Waits up to two minutes for a process of another machine that may be gone.

    Args:
        path: the lock file in that folder.
        what: what is used, for messages, such as `run directory runs/a`.

    Raises:
        UserError: another process uses it; it names machine and process.
        OSError: the file cannot be written.
    """
    said, first = False, None
    while True:
        with guarded(path) as held:
            # On a disk without locks the file's content alone has to do.
            owner = Owner.read(path)
            current = Owner.current()
            if owner is None or owner == current or not owner.uses(path):
                os.ftruncate(held.descriptor, 0)
                os.pwrite(held.descriptor, json.dumps(asdict(current)).encode(), 0)
                _held.add(path)
                return
            touched = path.stat().st_mtime
        first = first or (owner, touched)
        far = (owner.boot, owner.namespace) != (current.boot, current.namespace)
        if not far or first != (owner, touched):
            raise UserError(f"{what} is in use by {owner}; wait for it or choose another (lock {path})")
        if not said:
            text = f"{what} was in use by {owner}; waiting up to {STALE:g} seconds to see whether it still is"
            print(text, file=sys.stderr, flush=True)
            said = True
        time.sleep(1)


def register_reader(folder: Path) -> Path | None:
    """Say that this process reads what lies in `folder`'s parent, until it ends; nothing where that is read-only.

    Args:
        folder: where readers leave their files; made if it is not there.

    Returns:
        The file that says so, for `release`; None where it was there before, or cannot be written.
    """
    current = Owner.current()
    path = folder / f"{current.host}-{current.pid}-{current.start}.json"
    if _held.pid == os.getpid() and path in _held.paths and path.exists():
        return None
    try:
        folder.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(current)), encoding="utf-8")
    except OSError:
        # Somebody who may not write there cannot replace it either; whoever can is not told.
        return None
    _held.add(path)
    return path


def release(path: Path) -> None:
    """Give up one thing that this process uses."""
    _held.paths = _held.paths - {path}
    with contextlib.suppress(OSError):
        path.unlink()


def readers(folder: Path) -> list[Owner]:
    """Other processes that read what lies beside `folder`; files of those that are gone are removed."""
    found = []
    for path in sorted(folder.glob("*.json")):
        owner = Owner.read(path)
        if owner is not None and owner == Owner.current():
            continue
        if owner is not None and owner.uses(path):
            found.append(owner)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return found
