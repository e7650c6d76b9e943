"""Data sets in the forms that Hugging Face's `datasets` writes and reads, without that library.

- `save_to_disk`: dataset_dict.json (or one split alone), a folder of Arrow files for each split, listed in state.json.
- `to_parquet` and the Hub: Parquet files named by their split, with images in them as {bytes, path}.
- An image folder: images, and metadata.csv, .jsonl or .parquet beside them with a column `file_name`.

What the columns are stands in the files' own schema.

Source: the writers and readers of datasets 5.2 (arrow_dataset.py, data_files.py, folder_based_builder.py), read for the
formats alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.text import parse_json
from spml_fast.prepare.image_table import SPLIT_NAMES, read_json
from spml_fast.prepare.table_files import ARROW, PARQUET, table_schema

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class HubFiles:
    """The tables of a data set.

    Attributes:
        root: folder that all lie in.
        splits: name -> tables in order; an image folder's tables name their splits by the images' folders, and are all
            under `train`.
        features: column -> what the data set says of it.
        embedded: images are in the tables, or named in them by a column `image`; else an image folder.
    """

    root: Path
    splits: dict[str, list[Path]]
    features: dict[str, Any] = field(default_factory=dict)
    embedded: bool = True


def split_of(parts: Sequence[str]) -> str | None:
    """The split that folders and a file's name tell, such as `data/train-00000-of-00002`; the innermost counts."""
    for part in reversed(parts):
        for word in re.split(r"[^a-zA-Z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def find_tables(path: Path) -> HubFiles:
    """The tables of a data set: a folder of one of the three forms, or a single Parquet or Arrow file.

    Raises:
        UserError: there are none, or a file that says which there are is damaged.
    """
    if path.is_file() and path.suffix.lower() in PARQUET + ARROW:
        return _with_features(HubFiles(path.parent, {"train": [path]}))
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a Parquet or Arrow file")
    if (path / "dataset_dict.json").is_file():
        listed = read_json(path / "dataset_dict.json", "list of splits")
        names = listed.get("splits") if isinstance(listed, dict) else None
        if not isinstance(names, list) or not names or not all(_is_name(name) for name in names):
            raise UserError(f"{path / 'dataset_dict.json'} names no splits; it must hold a list 'splits'")
        return _with_features(HubFiles(path, _by_split((name, _saved(path / name)) for name in names)))
    if (path / "state.json").is_file():
        return _with_features(HubFiles(path, {"train": _saved(path)}))
    below = sorted(Path(top) / name for top, _, files in os.walk(path) for name in files)
    metadata = [file for file in below if file.name.lower() in METADATA]
    if metadata:
        return HubFiles(path, {"train": metadata}, embedded=False)
    tables = [file for file in below if file.suffix.lower() in PARQUET]
    if not tables:
        raise UserError(
            f"{path} holds no data set of Hugging Face: no dataset_dict.json or state.json of save_to_disk, no Parquet "
            f"files, and no {', '.join(METADATA)} beside images"
        )
    split = (split_of(table.relative_to(path).with_suffix("").parts) or "train" for table in tables)
    return _with_features(HubFiles(path, _by_split((name, [t]) for name, t in zip(split, tables, strict=True))))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w][\w.\-]*", name) is not None


def _by_split(tables: Any) -> dict[str, list[Path]]:
    """Tables by our names of the splits."""
    out: dict[str, list[Path]] = {}
    for name, paths in tables:
        out.setdefault(SPLIT_NAMES.get(name.lower(), name), []).extend(paths)
    return out


def _saved(folder: Path) -> list[Path]:
    """Arrow files of a split that `save_to_disk` wrote. Raises `UserError`."""
    path = folder / "state.json"
    state = read_json(path, "list of a split's files")
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not all(isinstance(f, dict) and _is_name(f.get("filename")) for f in files):
        raise UserError(f"{path} has no list '_data_files' of file names")
    if not files:
        raise UserError(f"{path} lists no file; the split is empty")
    return [folder / file["filename"] for file in files]


def _with_features(files: HubFiles) -> HubFiles:
    """Read what the first table's schema says of its columns."""
    first = next(iter(files.splits.values()))[0]
    schema = table_schema(first)
    text = (schema.metadata or {}).get(b"huggingface")
    if text:
        try:
            files.features = dict(parse_json(text)["info"]["features"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{first}: what its schema says of the columns (huggingface) is damaged") from error
    return files


def feature_at(features: dict[str, Any], column: str) -> Any:
    """What the data set says of a column, or of a part of it (`objects.category`), without its lists, or None."""
    node: Any = features
    for name in column.split("."):
        node = _inner(node)
        node = node.get(name) if isinstance(node, dict) else None
    return _inner(node)


def _inner(node: Any) -> Any:
    """A feature without the lists around it: List, LargeList, Sequence of several releases, or a list of JSON."""
    for _ in range(100):
        if isinstance(node, list) and len(node) == 1:
            node = node[0]
        elif isinstance(node, dict) and node.get("_type") in ("List", "LargeList", "Sequence") and "feature" in node:
            node = node["feature"]
        else:
            break
    return node


def kind_name(feature: Any) -> str:
    """Name of a feature's type, such as ClassLabel or Image; empty where it has none."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else ""


def value_at(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a part of it, which may be a struct of lists or a list of structs."""
    node: Any = row
    for name in column.split("."):
        if isinstance(node, list):
            node = [entry.get(name) if isinstance(entry, dict) else None for entry in node]
        else:
            node = node.get(name) if isinstance(node, dict) else None
    return node


def shown_columns(columns: Sequence[str]) -> str:
    """Names of columns for a message."""
    return json.dumps(list(columns), ensure_ascii=False)[1:-1][:300] or "none"
