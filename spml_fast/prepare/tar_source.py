"""Tar files that others made, such as OpenImages' train_0.tar.gz, as a source of images.

They are read as streams from their start to their end, the only way to read compressed ones. Nothing is unpacked to
disk: names are only compared with those of a Manifest, so an unsafe name, link or device in them does no harm.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.data.manifest import Split

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# No photograph has so many bytes; a forged header may claim any number.
_MAX_IMAGE = 256 << 20
# Bytes that are read and dropped at a time.
_SKIP = 1 << 20
# What the library and the decompressors raise at hostile bytes.
_UNREADABLE = (
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)


class MemberIndex:
    """Finds the sample of a file name among all splits, in eight bytes per sample.

    Names are compared without their folders where every image has a file name of its own, else with them.

    Raises:
        UserError: two samples have the same path.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.starts = np.concatenate([[0], np.cumsum([len(split) for split in splits])]).astype(np.int64)
        self._flat = True
        self._sort()
        if self._repeated() is not None:
            self._flat = False
            self._sort()
            repeated = self._repeated()
            if repeated is not None:
                split, row = self.locate(repeated)
                raise UserError(
                    f"{split.relative_path(row)} is the image of two samples; --tars needs one image per sample"
                )

    def _name(self, path: str) -> str:
        return path.rpartition("/")[2] if self._flat else path

    @staticmethod
    def _hash(name: str) -> int:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _sort(self) -> None:
        hashes = np.fromiter(
            (self._hash(self._name(split.relative_path(i))) for split in self.splits for i in range(len(split))),
            np.uint64,
            int(self.starts[-1]),
        )
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def _repeated(self) -> int | None:
        """A sample whose name another one has; None if there is none."""
        equal = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        return int(self._order[equal[0]]) if len(equal) else None

    def locate(self, sample: int) -> tuple[Split, int]:
        """Split and row of a number over all splits."""
        number = int(np.searchsorted(self.starts, sample, "right")) - 1
        return self.splits[number], sample - int(self.starts[number])

    def find(self, path: str) -> int:
        """Number over all splits of the sample with that path, or -1."""
        name = self._name(path)
        position = int(np.searchsorted(self._hashes, np.uint64(self._hash(name))))
        if position == len(self._hashes):
            return -1
        sample = int(self._order[position])
        split, row = self.locate(sample)
        return sample if self._name(split.relative_path(row)) == name else -1


def find_tars(folder: Path) -> list[Path]:
    """The tar files of a folder, by name. Raises `UserError` if there is none."""
    if not folder.is_dir():
        raise UserError(f"--tars {folder} is not a folder")
    tars = sorted(path for path in folder.iterdir() if path.name.lower().endswith(_TAR_ENDINGS))
    if not tars:
        raise UserError(f"--tars {folder} has no tar file ({', '.join(_TAR_ENDINGS)})")
    return tars


def _next_member(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member of a stream, or None at its end.

    What lies between is read here: the library goes on counting blocks after the file's end, for ever where a forged
    header claims 2^50 bytes.
    """
    stream: Any = archive.fileobj
    # Opening has read the header of the first member, whose content comes next.
    first: Any = getattr(archive, "firstmember", None)
    while first is None and (missing := archive.offset - stream.tell()) > 0:
        if not stream.read(min(missing, _SKIP)):
            raise tarfile.ReadError(f"the file ends {missing:,} bytes before the next member")
    return archive.next()


def read_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str]]:
    """Members of a tar file from its start to its end, each with why it is ignored ("" if it is not)."""
    last = "its start"
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r|*", errorlevel=2) as archive:
            while (member := _next_member(archive)) is not None:
                last = repr(member.name)
                # Otherwise a stream keeps every member that it has read: gigabytes over millions of images.
                archive.members = []  # type: ignore[attr-defined]
                if not member.isdir():
                    yield archive, member, _ignored(member)
    except _UNREADABLE as error:
        raise UserError(f"tar file {path} cannot be read beyond {last} ({error}); download it again") from error


def member_bytes(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of the member that `read_members` has yielded. Raises `UserError` if the file is damaged or cut off."""
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except _UNREADABLE as error:
        raise UserError(
            f"tar file {path} cannot be read beyond {member.name!r} ({error}); download it again"
        ) from error


def _ignored(member: tarfile.TarInfo) -> str:
    """Why a member is ignored; empty when it is not."""
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "with an unsafe path"
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "devices and other special files"
    if member.size > _MAX_IMAGE:
        return f"larger than {_MAX_IMAGE >> 20} MiB"
    return ""


def member_path(member: tarfile.TarInfo) -> str:
    """Path of a member without a leading `./`."""
    return PurePosixPath(member.name).as_posix()
