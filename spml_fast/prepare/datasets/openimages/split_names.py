"""Which split a label file of OpenImages belongs to: as the user says, or as its name does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from spml_fast.core.errors import UserError

# Our name of each split, and OpenImages' own.
SPLITS = {"train": "train", "val": "validation", "test": "test"}
SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def split_files(arguments: Sequence[str], splits: Sequence[str] | None, option: str) -> dict[str, list[Path]]:
    """Split name (train, val, test) -> its files.

    Args:
        arguments: paths, or SPLIT=path each.
        splits: splits of the paths without SPLIT=, one for each or one for all. Without it their names tell: train,
            val, validation or test as a word in the file's name, or as the folder's name.
        option: that the arguments come from, for messages.

    Raises:
        UserError: a file's split cannot be told.
    """
    out: dict[str, list[Path]] = {}
    plain = [argument for argument in arguments if _prefix(argument) is None]
    if splits and len(splits) not in (1, len(plain)):
        raise UserError(f"--split names {len(splits)} splits for {len(plain)} files of {option}; give one for each")
    chosen = iter(splits if splits and len(splits) == len(plain) else list(splits or [""]) * len(plain))
    for argument in arguments:
        split, path = _prefix(argument), Path(argument)
        if split is not None:
            path = Path(argument.partition("=")[2])
        else:
            split = SPLIT_WORDS.get(next(chosen)) or _split_of_name(path)
        if split is None and len(arguments) == 1:
            split = "train"
        if split is None:
            raise UserError(f"{option}: the name {path.name} does not tell the split; write train={path} or the like")
        out.setdefault(split, []).append(path)
    return {name: out[name] for name in SPLITS if name in out}


def _prefix(argument: str) -> str | None:
    """The split that an argument such as `train=labels.csv` names."""
    name, equals, _ = argument.partition("=")
    return SPLIT_WORDS.get(name) if equals else None


def _split_of_name(path: Path) -> str | None:
    """The split that a word in a file's name tells, or else its folder's whole name."""
    splits = {SPLIT_WORDS[word] for word in re.split("[^a-z]+", path.name.lower()) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else SPLIT_WORDS.get(path.absolute().parent.name.lower())
