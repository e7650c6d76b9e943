"""Maps as arrays for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from spml_fast.analysis.explain import Explained
from spml_fast.core.errors import UserError
from spml_fast.core.io import move_into_place, partial_path, write_json


class MapFolder:
    """Writes the maps that are drawn as float32 [h, w] .npy files with `maps.json` beside them.

    The folder appears when all is written.

    Args:
        out: folder to make; it must not exist, or be empty.
        metadata: entries of `maps.json` beside its list (run, alpha, ...).

    Raises:
        UserError: the folder is in use or cannot be written.
    """

    def __init__(self, out: Path, metadata: dict[str, Any]) -> None:
        self.out, self.metadata = out, metadata
        self.entries: list[dict[str, Any]] = []
        self._staging = partial_path(out)
        self._images = 0
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists and is not an empty folder; choose another --maps")
            self._staging.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{self._staging} is left from an interrupted run; delete it") from error
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error

    def add(self, image: Explained, classes: Sequence[str]) -> None:
        """Write the maps of one image."""
        for k, class_id in enumerate(image.classes.tolist()):
            name = f"{self._images:06d}-{class_id}.npy"
            try:
                np.save(self._staging / name, image.shown[k])
            except OSError as error:
                raise UserError(f"{self._staging / name} cannot be written: {error.strerror}") from error
            self.entries.append(
                {
                    "file": name,
                    # Escaped where the file name's bytes are not UTF-8, which JSON could not hold.
                    "path": image.path.encode("utf-8", "backslashreplace").decode(),
                    "class": classes[class_id],
                    "class_id": class_id,
                    "kind": image.kind,
                    "probability": float(image.probability[k]),
                    "logit": float(image.logit[k]),
                    "logit_alpha_1": float(image.plain[k]),
                    "positive_share": float(image.positive_fraction[k]),
                }
            )
        self._images += 1

    def __enter__(self) -> MapFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._staging)
            return
        try:
            write_json(self._staging / "maps.json", {**self.metadata, "maps": self.entries})
            move_into_place(self._staging, self.out)
        except OSError as problem:
            raise UserError(f"{self.out} cannot be written: {problem.strerror}") from problem
