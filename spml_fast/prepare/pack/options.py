"""What to pack and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.urls import Location, Url
from spml_fast.data.image_check import Level


@dataclass(frozen=True)
class PackOptions:
    """What to pack and how.

    Attributes:
        manifest: Manifest, or URL of one, whose images are packed.
        out: Manifest to write; the shards lie in its folder `shards`. At a URL it is uploaded, and replaces nothing.
        image_root: image folder, or URL of shards, when it is not where it was at preparation.
        work: folder below which the unfinished work lies where `out` is a URL; None for one in the user's cache.
        tars: folder of tar files that hold the images; None reads the Manifest's own files (or shards).
        short_side: images with a longer short side are shrunk to it, in pixels; None copies every byte.
        quality: JPEG quality of images that are shrunk, 1 to 95.
        shard_size: bytes that a shard should not exceed.
        leave_out: leave out images that are missing or damaged instead of stopping at them.
        verify: how closely images are checked; None reads headers of images that preparation has checked, and decides
            by the number of images for others.
        overwrite: replace an older Manifest at `out`.
        workers: processes; None for all cores.
        progress: show progress.

    Raises:
        UserError: a number is out of range.
    """

    manifest: Location
    out: Location
    image_root: Location | None = None
    work: Path | None = None
    tars: Path | None = None
    short_side: int | None = None
    quality: int = 90
    shard_size: int = 256_000_000
    leave_out: bool = False
    verify: Level | None = None
    overwrite: bool = False
    workers: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"--short-side is {self.short_side}; it must be 1 or more")
        if not 1 <= self.quality <= 95:
            raise UserError(f"--quality is {self.quality}; it must lie between 1 and 95")
        if self.shard_size < 1:
            raise UserError("--shard-size must be greater than 0")
        if self.workers is not None and self.workers < 1:
            raise UserError("--workers needs at least one process")
        if isinstance(self.out, Url) and self.overwrite:
            raise UserError(
                f"--overwrite does not replace {self.out}: whoever reads it elsewhere cannot be seen; choose another "
                "--out, or delete it first"
            )
        if self.work is not None and not isinstance(self.out, Url):
            raise UserError("--work is for an --out on object storage; other work lies beside --out")
