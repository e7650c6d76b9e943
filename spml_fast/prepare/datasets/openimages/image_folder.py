"""The image folder of OpenImages: which ids have an image, and where it lies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line
from spml_fast.prepare.datasets.openimages.ids import ids_from_hex

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".webp"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


@dataclass
class Images:
    """The images below a folder.

    Attributes:
        ids: uint64 [N], ascending, each once.
        template_of: uint32 [N], number of each image's template.
        templates: paths from an id, relative to the folder.
        doubled: files whose id lies in another folder too; the first folder in alphabetical order is taken.
        archives: names of tar and zip files, relative to the folder.
        others: number of other files.
    """

    ids: npt.NDArray[np.uint64]
    template_of: npt.NDArray[np.uint32]
    templates: list[str]
    doubled: int
    archives: list[str]
    others: int


class _FolderScan:
    """The files seen so far. Their names are not kept as text: nine million would take a gigabyte."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.templates: list[str] = []
        self.ids = [np.empty(0, np.uint64)]
        self.template_numbers = [np.empty(0, np.uint32)]
        self.archives: list[str] = []
        self.others = 0
        self._seen: set[tuple[int, int]] = set()

    def scan(self, folder: str) -> list[str]:
        """Take in the files of one folder, relative to the root; returns the folders in it, in alphabetical order."""
        stems: dict[str, list[str]] = {}
        inner: list[str] = []
        try:
            status = os.stat(self.root / folder)
            # Links may lead in a circle.
            if (status.st_dev, status.st_ino) in self._seen:
                return []
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = entry.name
                    if len(name) > 16 and name[16:] in IMAGE_SUFFIXES:
                        stems.setdefault(name[16:], []).append(name[:16])
                    elif entry.is_dir():
                        inner.append(os.path.join(folder, name))
                    elif name.endswith(_ARCHIVES):
                        self.archives.append(os.path.join(folder, name))
                    else:
                        self.others += 1
        except OSError as error:
            raise UserError(f"image folder {self.root / folder} cannot be read: {error.strerror}") from error
        for suffix in sorted(stems):
            self._add(folder, suffix, stems[suffix])
        return sorted(inner)

    def _add(self, folder: str, suffix: str, stems: list[str]) -> None:
        # A name of other letters than ASCII gives question marks, and those are no digits.
        text = np.frombuffer("".join(stems).encode("ascii", "replace"), np.uint8).reshape(-1, 16)
        ids, valid = ids_from_hex(text)
        valid &= ~((text >= ord("A")) & (text <= ord("F"))).any(1)
        self.others += int((~valid).sum())
        if valid.any():
            self.ids.append(ids[valid])
            self.template_numbers.append(np.full(len(self.ids[-1]), len(self.templates), np.uint32))
            self.templates.append(_template(self.root, folder, suffix))


def find_images(root: Path) -> Images:
    """Every file below `root` that is named ID.jpg (or another suffix of images), in any folders.

    Raises:
        UserError: a folder cannot be read, its name is not UTF-8, or there is no image.
    """
    scan = _FolderScan(root)
    waiting = [""]
    while waiting:
        waiting += reversed(scan.scan(waiting.pop()))
    ids, template_of = np.concatenate(scan.ids), np.concatenate(scan.template_numbers)
    if not len(ids):
        raise _no_images(root, sorted(scan.archives))
    order = np.argsort(ids, kind="stable")
    ids, template_of = ids[order], template_of[order]
    first = np.ones(len(ids), np.bool_)
    first[1:] = ids[1:] != ids[:-1]
    doubled = len(ids) - int(first.sum())
    return Images(ids[first], template_of[first], scan.templates, doubled, sorted(scan.archives), scan.others)


def _template(root: Path, folder: str, suffix: str) -> str:
    """Path from an id, as `str.format` takes it."""
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the name of image folder {root / folder!r} is not UTF-8; rename it") from error
    return os.path.join(folder.replace("{", "{{").replace("}", "}}"), "{id:016x}" + suffix)


def _no_images(folder: Path, archives: list[str]) -> UserError:
    """What to do about a folder without images."""
    if archives:
        words = ("--manifest", "LABELS", "--tars", folder, "--leave-out", "--out", "DIR")
        command = command_line("prepare", "shard", *words)
        return UserError(
            f"{folder} holds {len(archives)} packed files ({archives[0]}, ...) and no images; "
            "unpack them, or prepare the labels with --images none and then pack the images straight from the tar "
            f"files: {command}"
        )
    return UserError(
        f"there is no image below {folder} that is named by an OpenImages id (16 hexadecimal digits and .jpg); "
        "give the folder of the images, or --images none for the labels alone"
    )
