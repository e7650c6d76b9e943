"""Images as files and the same packed into shards, quietly and in this process."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.pack import PackOptions, pack
from tests.support.pil import make_split, photo

COUNT = 38


def make_files(root: Path) -> Split:
    """`COUNT` images of several sizes and kinds as files, some turned by their EXIF data."""
    (root / "föl der").mkdir()
    names, turned = [], []
    for i in range(COUNT):
        names.append(f"föl der/{i}.x.{'png' if i % 9 == 4 else 'jpg'}")
        photo(i, 90 + 7 * (i % 5), 70 + 11 * (i % 3)).save(root / names[-1], quality=90)
        turned.append(1 + i % 8 if i % 4 == 0 else 1)
    return make_split(root / "manifest", root, names, orientation=turned)


def pack_quietly(source: Path, out: Path, **changes: Any) -> Manifest:
    """Pack a Manifest into small shards, in this process unless `workers` says otherwise."""
    return pack(PackOptions(source, out, **{"shard_size": 60_000, "workers": 1, "progress": False, **changes}))


def checksums(manifest: Manifest) -> list[str]:
    """SHA-256 of every shard, in order."""
    return [file.sha256 for split in manifest.splits.values() if split.shards for file in split.shards.files]


def write_tar(path: Path, members: Sequence[tarfile.TarInfo | tuple[str, bytes]]) -> None:
    """A tar file of (name, content) pairs and ready members without content; gzipped if its name ends with .gz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(gzip.compress(data.getvalue(), 1) if path.suffix == ".gz" else data.getvalue())


def tar_members(files: Split, ids: Iterable[int]) -> list[tuple[str, bytes]]:
    """Images by their sample index, named as OpenImages names them; PNG files are called JPEG too."""
    return [(f"./train_0/{i:016x}.jpg", files.read(i)) for i in ids]
