"""Images that are named on a command line: found in directories, read like a split."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.image_check import LOADER_FORMATS
from spml_fast.data.manifest import Split

# Endings of images that the loader does not read, and that `prepare --convert` can copy into a format that it does.
CONVERTIBLE_SUFFIXES = frozenset({".gif", ".avif", ".avifs", ".heic", ".heif", ".hif", ".ico", ".tga"})


def image_suffixes() -> frozenset[str]:
    """Suffixes (lower case, with the dot) of the formats that the loader reads, as Pillow knows them."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in LOADER_FORMATS)


def find_images(sources: Sequence[str], note: Callable[[str], None]) -> list[str]:
    """Paths of all images in `sources`, each once: files as they are, directories searched with all below them.

    Args:
        sources: files, whatever they are called, and directories, of which files with `image_suffixes` are taken,
            sorted by path. Links are followed; a directory that is reached twice is searched once.
        note: called with a sentence about each directory that adds nothing, and about images in it of formats that the
            loader does not read (`CONVERTIBLE_SUFFIXES`), which are skipped.

    Raises:
        UserError: no image is given or exists, a path does not exist or is neither file nor directory, or a directory
            cannot be read.
    """
    if not sources:
        raise UserError("no image given; name image files, or directories to search for them")
    suffixes = image_suffixes()
    path_of: dict[tuple[str, str], str] = {}
    searched: set[str] = set()
    for source in sources:
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise UserError(f"{printable(source)} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            before = len(searched)
            skipped: Counter[str] = Counter()
            paths = _search(source, suffixes, searched, skipped)
            if skipped:
                kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
                note(f"{printable(source)}: images of formats that are not read are skipped ({kinds}); convert them")
            if not paths and len(searched) > before:
                note(f"no image in {printable(source)}")
        elif stat.S_ISREG(mode):
            paths = [source]
        else:
            raise UserError(f"{printable(source)} is neither a file nor a directory")
        for path in paths:
            folder, name = os.path.split(path)
            # A link to an image counts as another image; a link to a directory does not.
            path_of.setdefault((os.path.realpath(folder), name), path)
    if not path_of:
        raise UserError(f"there is no image; files are taken that end in {' '.join(sorted(suffixes))}")
    return list(path_of.values())


def images_below(folder: str, suffixes: frozenset[str]) -> list[str]:
    """Files in a directory and below it that end in `suffixes`, sorted; links are followed, but no directory twice.

    Raises:
        UserError: a directory cannot be read.
    """
    return _search(folder, suffixes, set(), Counter())


def _search(top: str, suffixes: frozenset[str], searched: set[str], skipped: Counter[str]) -> list[str]:
    """Images in a directory and below it, sorted; directories in `searched` are skipped, new ones added to it.

    Images that the loader does not read are counted in `skipped` by their suffix.
    """
    paths: list[str] = []
    # Linked directories come last, so that images keep the path without a link where there is one.
    plain, linked = [top], list[str]()
    while plain or linked:
        folder = plain.pop() if plain else linked.pop()
        real = os.path.realpath(folder)
        if real in searched:
            continue
        searched.add(real)
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"directory {printable(folder)} cannot be read: {error.strerror}") from error
        for entry in entries:
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                (linked if link else plain).append(entry.path)
            # A broken link is kept: the check names it. Pipes and devices are no images.
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in suffixes and (link or entry.is_file()):
                paths.append(entry.path)
            elif suffix in CONVERTIBLE_SUFFIXES:
                skipped[suffix] += 1
    return sorted(paths)


class ImageFiles(Split):
    """Image files that belong to no Manifest, as the loaders take them: no labels, no sizes, everything in memory.

    Args:
        paths: of the images.
        orientation: uint8 [N], EXIF orientation 1..8 that the loader applies.
    """

    def __init__(self, paths: Sequence[str], orientation: npt.NDArray[np.uint8]) -> None:
        super().__init__(Path("images"), Path(), {"size": len(paths)})
        self.paths = paths
        self.orientation = orientation
        self.width = self.height = np.broadcast_to(np.int32(0), len(paths))
        self.shards = None

    @property
    def manifest_folder(self) -> None:
        """None: the images belong to no Manifest."""
        return

    def relative_path(self, index: int) -> str:
        """The path as it was given."""
        return self.paths[index]

    def path(self, index: int) -> str:
        """The path as it was given."""
        return self.paths[index]

    def part(self, start: int, stop: int) -> ImageFiles:
        """Images start..stop - 1."""
        return ImageFiles(self.paths[start:stop], self.orientation[start:stop])
