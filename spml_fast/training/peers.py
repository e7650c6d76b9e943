"""What the ranks of a run know of each other, so that one that dies, fails or hangs ends the others with a sentence.

Collectives alone tell little: when a rank is gone the others get an error that names a socket, or wait, and on a GPU
the host does not even notice. So each rank writes a line about itself to the store of torch.distributed once a second,
from a thread with a connection of its own: machine, process, and where it is. The same thread reads the others' lines.

- A rank that leaves with an error says so in the store; the others end without a word, since it has said why. Where
  several meet the same error, however long after each other, one of them says it: rank 0 if it is not much later.
- When a collective breaks, the lines tell which rank is gone, on which machine, and how far it had come.
- The run ends when, for the time limit, a rank's line has not changed (its machine is lost, or it was stopped), a
  rank has kept others waiting that are further, or no rank has moved within an update. Between updates all ranks may
  stand as long as they like: rank 0 has work that only one rank does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from spml_fast.core import distributed
from spml_fast.core.errors import UserError

INTERVAL = 1.0
# Seconds in which the others take notice of an error, and end by themselves.
NOTICE = 3.0
# Seconds for which an error that rank 0 may meet too is left to it; less than NOTICE, since a launcher ends all ranks
# when one is gone.
PATIENCE = 2.0
FAILED = "spml_fast/failed"
ERROR = "spml_fast/error"
# What errors of a collective whose peer is gone have in common; torch has no class for gloo's.
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class Line:
    """What a rank says of itself, and when this process last saw it change.

    Attributes:
        host: its machine.
        pid: its process.
        place: (phase, epoch, update) of the last update done; None before the first.
        steps: how often it began or ended an update, to compare; odd within one.
        beat: grows by one a second.
        seen: `time.monotonic()` of the last change of `beat`.
    """

    host: str
    pid: int
    place: tuple[str, int, int] | None = None
    steps: int = 0
    beat: int = 0
    seen: float = 0.0

    def where(self, trains: bool = True) -> str:
        """Machine, process and, where ranks train, the last update, for a sentence."""
        text = f"on {self.host}, process {self.pid}"
        if self.place is None:
            return text + (", before its first update" if trains else "")
        phase, epoch, update = self.place
        return text + f", last update {update} of epoch {epoch} ({phase})"


class Peers:
    """The watch of one rank over the others.

    Args:
        store: a connection to the store of the process group that nobody else uses.
        rank: this process's.
        world: number of ranks.
        limit: seconds after which a rank that does not move ends the run.
        trains: whether the ranks train; else they do something that can be started again.
    """

    def __init__(self, store: Any, rank: int, world: int, limit: float, trains: bool = True) -> None:
        self.store, self.rank, self.world, self.limit, self.trains = store, rank, world, limit, trains
        self.own = Line(socket.gethostname(), os.getpid())
        self.lines: dict[int, Line] = {}
        # Ranks that have written a line.
        self._there: list[int] = []
        self.moved = time.monotonic()
        self.stopped = threading.Event()
        # Whether a rank has said that it fails, which one reports what, and whether this one needs the store no more.
        self.failed, self.seen = False, False
        self.reporter: Line | None = None
        self.error = ""
        self._lock = threading.Lock()
        store.set_timeout(timedelta(seconds=10))
        self._write()
        self.thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self.thread.start()

    def moved_to(self, place: tuple[str, int, int] | None) -> None:
        """Note that an update begins (None) or is done."""
        self.own.place = place or self.own.place
        self.own.steps += 1
        self.moved = time.monotonic()

    def _write(self) -> None:
        own = self.own
        own.beat += 1
        self.store.set(_line_key(self.rank), json.dumps([own.host, own.pid, own.place, own.steps, own.beat]))

    def read(self) -> None:
        """Read the other ranks' lines: all of them in one call, since one store serves every rank every second."""
        # A line that is not there yet would be waited for; once written it stays.
        self._there += [r for r in range(self.world) if r not in (self.rank, *self._there) and self._is_there(r)]
        texts = self.store.multi_get([_line_key(rank) for rank in self._there]) if self._there else []
        now = time.monotonic()
        for rank, text in zip(self._there, texts, strict=True):
            host, pid, place, steps, beat = json.loads(text)
            known = self.lines.setdefault(rank, Line(host, pid))
            if beat != known.beat:
                known.seen = now
            known.place, known.steps, known.beat = place and tuple(place), steps, beat

    def _is_there(self, rank: int) -> bool:
        return bool(self.store.check([_line_key(rank)]))

    def gone(self, silence: float) -> dict[int, Line]:
        """Ranks whose process is not there any more, or that said nothing for so many seconds."""
        now = time.monotonic()
        lost = {}
        for rank, line in self.lines.items():
            if now - line.seen > silence or self._ended(line):
                lost[rank] = line
        return lost

    def _ended(self, line: Line) -> bool:
        """Whether a rank's process is known to be gone, as one of this machine."""
        return line.host == self.own.host and not process_runs(line.pid)

    def _hanging(self) -> dict[int, Line]:
        """Ranks that the others have waited for longer than the limit."""
        lost = self.gone(self.limit)
        if not lost and time.monotonic() - self.moved > self.limit and self.lines:
            lines = {**self.lines, self.rank: self.own}
            furthest = max(line.steps for line in lines.values())
            lost = {rank: line for rank, line in lines.items() if line.steps < furthest}
            if not lost and furthest % 2:
                lost = lines
        return lost

    def _run(self) -> None:
        """Until `stop`: write, read, and end the process when a peer failed or hangs."""
        answered, limit = time.monotonic(), None
        while not self.stopped.wait(INTERVAL):
            try:
                self._write()
                self.failed = self.store.check([FAILED])
                if self.failed:
                    # What waits for rank 0 looks at the store, which that rank may take with it once all have seen.
                    distributed.given_up.set()
                    time.sleep(0.2)
                    break
                self.read()
            except (RuntimeError, ValueError) as error:
                # A store that does not answer belongs to a process that hangs; one that cannot be reached is gone.
                limit = self.limit if isinstance(error, dist.DistStoreError) else None
                if limit is not None and time.monotonic() - answered < limit:
                    continue
                break
            answered = time.monotonic()
            lost = self._hanging()
            if lost:
                self._say_and_exit(lost, None if all(map(self._ended, lost.values())) else self.limit)
        end = time.monotonic() + (NOTICE if self.failed else 2 * NOTICE)
        if self.failed:
            self._find_reporter(end)
        if not self.stopped.wait(max(0.0, end - time.monotonic())):
            # A collective that broke has ended the process by now; one on a GPU may never.
            unknown = Line("an unknown machine", 0)
            self._say_and_exit({} if self.failed else {0: self.lines.get(0, unknown)}, limit)

    def _is_first_but(self, lost: dict[int, Line]) -> bool:
        """Whether this rank speaks: the first that is well or, where none is, rank 0."""
        return self.rank == min((r for r in range(self.world) if r not in lost), default=0)

    def _say_and_exit(self, lost: dict[int, Line], limit: float | None) -> None:
        """End this process at once, whatever it is waiting for."""
        if lost and self._is_first_but(lost):
            print(f"error: {sentence(lost, limit, self.trains)}", file=sys.stderr, flush=True)
        os._exit(1)

    def explain(self, error: BaseException) -> str | None:
        """Why a collective broke, for the user; None where another rank says it."""
        try:
            if self.failed or self.store.check([FAILED]):
                return None
            self.read()
            lost = self.gone(3 * INTERVAL)
            end = time.monotonic() + 4 * INTERVAL
            while not lost and time.monotonic() < end:
                time.sleep(INTERVAL / 4)
                if self.store.check([FAILED]):
                    return None
                self.read()
                lost = self.gone(3 * INTERVAL)
        except (RuntimeError, ValueError):
            # The store went with rank 0, unless a launcher holds it.
            lost = {0: self.lines[0]} if 0 in self.lines else {}
        if not lost:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return f"the ranks lost each other, all of them alive ({self.own.where(self.trains)}): {text}"
        return sentence(lost, None, self.trains) if self._is_first_but(lost) else None

    def announce(self, text: str = "") -> bool:
        """Tell the others that this rank leaves with an error, which it reports itself.

        Args:
            text: the error, if it is a user's.

        Returns:
            Whether another rank has met the same error and has reported it; one sentence is enough.
        """
        if self.rank:
            self._set_failed()
            end = time.monotonic() + PATIENCE
            while text not in ("", self.error) and self._read_error() and time.monotonic() < end:
                time.sleep(0.05)
        self.stop()
        if self._is_reported(text):
            self.leave()
            return True
        self._set_failed()
        self._set_seen()
        return False

    def leave(self) -> None:
        """End the watch of a rank that leaves without a word, once the one that reports why is gone.

        A launcher ends all ranks when the first one is gone, whether it has reported yet or not.
        """
        self._set_failed()
        self.stop()
        end = time.monotonic() + NOTICE
        self._find_reporter(end)
        while time.monotonic() < end and not (self.reporter and self._ended(self.reporter)):
            time.sleep(0.05)

    def _set_failed(self) -> None:
        with self._lock, contextlib.suppress(RuntimeError, ValueError):
            if not (self.failed or self.seen):
                self.store.set(FAILED, str(self.rank))

    def _read_error(self) -> bool:
        """Read which rank reports what; False when the store is not to be used any more."""
        with self._lock, contextlib.suppress(RuntimeError, ValueError):
            if not self.seen and self.store.check([ERROR]):
                host, pid, self.error = json.loads(self.store.get(ERROR))
                self.reporter = Line(host, pid)
            return not self.seen
        return False

    def _find_reporter(self, end: float) -> None:
        """Read until a rank reports an error, no longer than to the time `end`; the store is not used after that."""
        while self._read_error() and self.reporter is None and time.monotonic() < end:
            time.sleep(0.05)
        self._set_seen()

    def _set_seen(self) -> None:
        """Use the store no more; rank 0, which may hold it, waits for the others to say so."""
        with self._lock, contextlib.suppress(RuntimeError, ValueError):
            if self.seen:
                return
            self.seen = True
            if self.rank:
                self.store.set(_seen_key(self.rank), "1")
                return
            others = [_seen_key(rank) for rank in range(1, self.world)]
            end = time.monotonic() + NOTICE
            while not self.store.check(others) and time.monotonic() < end:
                time.sleep(0.05)

    def _is_reported(self, text: str) -> bool:
        """Whether another rank was the first to claim this user's error; else this one is."""
        with self._lock, contextlib.suppress(RuntimeError, ValueError):
            if not self.seen:
                if text and self.store.add(f"{ERROR}/{hashlib.sha256(text.encode()).hexdigest()}", 1) > 1:
                    return True
                self.store.set(ERROR, json.dumps([self.own.host, self.own.pid, text]))
                return False
        return bool(text) and self.error == text

    def stop(self) -> None:
        """End the watch, before the ranks leave."""
        self.stopped.set()


def _line_key(rank: int) -> str:
    """Where a rank's line is in the store."""
    return f"spml_fast/rank/{rank}"


def _seen_key(rank: int) -> str:
    """Where a rank says that it knows of an error."""
    return f"spml_fast/seen/{rank}"


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is there, and not only its exit status."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def sentence(lost: dict[int, Line], limit: float | None, trains: bool = True) -> str:
    """Which ranks are gone (no limit) or have kept the others waiting for `limit` seconds, and what to do."""
    ranks = "; ".join(f"rank {rank} ({line.where(trains)})" for rank, line in sorted(lost.items()))
    many = len(lost) > 1
    if limit is None:
        what = f"{'have' if many else 'has'} ended unexpectedly"
    else:
        option = " (run.timeout_minutes)" if trains else ""
        what = f"{'have' if many else 'has'} not moved for {limit / 60:g} minutes{option}"
    if not trains:
        return f"{ranks} {what}, so the command ends; start it again"
    return f"{ranks} {what}, so the run ends; start the same command again to resume from the last checkpoint"


_peers: Peers | None = None


def start(limit: float, trains: bool) -> None:
    """Watch the other ranks of the process group from now on, if there are any.

    Args:
        limit: seconds after which a rank that does not move ends the run.
        trains: as in `Peers`.
    """
    global _peers
    if distributed.world_size() > 1 and _peers is None:
        _peers = Peers(distributed.store().clone(), distributed.rank(), distributed.world_size(), limit, trains)


def begin_update() -> None:
    """Note that this rank has what an update needs."""
    if _peers is not None:
        _peers.moved_to(None)


def end_update(phase: str, epoch: int, update: int) -> None:
    """Note an update of this rank that is done."""
    if _peers is not None:
        _peers.moved_to((phase, epoch, update))


def stop() -> None:
    """End the watch; every rank does so before it leaves the process group.

    Its thread is waited for, so that what it asks the store is answered before the store goes. A call that takes
    longer is left alone.
    """
    global _peers
    if _peers is not None:
        _peers.stop()
        _peers.thread.join(NOTICE)
        _peers = None


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Around a run: an error of this rank ends the others quietly, and the loss of another is explained.

    Raises:
        UserError: another rank is gone; it names rank, machine, process and last update.
        SystemExit: another rank has said why the run ends.
    """
    try:
        yield
    except Exception as error:
        if _peers is None:
            raise
        broken = isinstance(error, dist.DistError) or any(word in str(error) for word in BROKEN)
        if isinstance(error, UserError) or not broken:
            if _peers.announce(str(error) if isinstance(error, UserError) else ""):
                raise SystemExit(1) from None
            raise
        why = _peers.explain(error)
        _peers.stop()
        if why is None:
            raise SystemExit(1) from None
        raise UserError(why) from error
    except SystemExit:
        if _peers is not None:
            _peers.leave()
        stop()
        raise
