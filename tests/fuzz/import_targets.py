"""Targets of the importers of other programs' data sets: name, seeds, parser, words."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spml_fast.prepare.boxes import turn_fractions
from spml_fast.prepare.datasets import coco_detection, fiftyone, huggingface, labelstudio, yolo
from spml_fast.prepare.datasets.base import Dataset
from tests.support.paths import ROOT

Entry = tuple[str, Sequence[bytes], Callable[[Path, bytes], object], Sequence[bytes]]
HUB = ROOT / "tests" / "fixtures" / "huggingface"


def _read(dataset: type[Dataset], *words: object) -> None:
    """Read a data set as its command does, and use what comes of it."""
    parser = argparse.ArgumentParser()
    dataset.add_options(parser)
    raw = dataset().read(parser.parse_args([str(word) for word in words]))
    for split in raw.splits:
        split.select(np.arange(len(split)))
        if split.boxes is not None and split.boxes_as_shown:
            turned = np.full(len(split), 6, np.uint8)
            boxes = turn_fractions(split.boxes, turned, turned)
            assert ((boxes[:, 1:] >= 0) & (boxes[:, 1:] <= 1)).all() and (boxes[:, 1:3] < boxes[:, 3:]).all()
    if raw.make_images is not None and raw.image_root is None:
        folder = Path(words[1]).parent / "images" if words else Path()
        folder.mkdir()
        raw.make_images(folder)


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _yolo(folder: Path, data: bytes) -> None:
    """data.yaml, or a label file; the first byte says which."""
    labels = data[:1] == b"l"
    for name in ("images/train/a.jpg", "images/val/b.png", "train.txt"):
        _write(folder, name, b"./images/train/a.jpg\n")
    _write(folder, "labels/train/a.txt", data[1:] if labels else b"0 0.5 0.5 1 1\n")
    _write(folder, "labels/val/b.txt", b"1 0.5 0.5 1 1\n")
    _write(folder, "data.yaml", _YOLO if labels else data[1:])
    _read(yolo.Yolo, "--data", folder)


def _coco_detection(folder: Path, data: bytes) -> None:
    path = _write(folder, "train.json", data)
    _read(coco_detection.CocoDetection, "--train", path, "--test", path, "--test-images", folder.parent)


def _fiftyone(folder: Path, data: bytes) -> None:
    """samples.json, or labels.json; the first byte says which."""
    _write(folder, "data/a.jpg", b"")
    _write(folder, "data/b.jpg", b"")
    _write(folder, "labels.json" if data[:1] == b"l" else "samples.json", data[1:])
    _read(fiftyone.FiftyOne, "--data", folder)


def _labelstudio(folder: Path, data: bytes) -> None:
    _read(labelstudio.LabelStudio, "--export", _write(folder, "project.json", data), "--images", folder)


def _metadata(folder: Path, data: bytes) -> None:
    """metadata.csv or metadata.jsonl; the first byte says which."""
    name = "train/metadata.csv" if data[:1] == b"c" else "metadata.jsonl"
    _write(folder, name, data[1:])
    _read(huggingface.HuggingFace, "--data", folder, "--labels", "labels")


def _hub_parquet(folder: Path, data: bytes) -> None:
    _read(huggingface.HuggingFace, "--data", _write(folder, "train.parquet", data))


def _hub_saved(folder: Path, data: bytes) -> None:
    """The Arrow file or state.json of a split; the first byte says which."""
    root = folder / "saved"
    state = data[:1] == b"s"
    _write(root, "state.json", data[1:] if state else (HUB / "saved" / "test" / "state.json").read_bytes())
    arrow = (HUB / "saved" / "test" / "data-00000-of-00001.arrow").read_bytes()
    _write(root, "data-00000-of-00001.arrow", arrow if state else data[1:])
    _read(huggingface.HuggingFace, "--data", root)


_YOLO = b"path: .\ntrain: images/train\nval: [images/val]\nnames: {0: cat, 1: dog}\n"
_COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 20}, {"id": "2", "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3.5, 4], "iscrowd": 1}],
    "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}
_DETECTION = {"_cls": "Detection", "label": "cat", "bounding_box": [0.1, 0.2, 0.3, 0.4]}
_SAMPLES = {
    "samples": [
        {"filepath": "data/a.jpg", "tags": ["train"], "x": {"_cls": "Detections", "detections": [_DETECTION]}},
        {"filepath": "data/b.jpg", "tags": ["valid"], "x": {"_cls": "Classification", "label": "dog"}},
    ]
}
_LABELS = {"classes": ["cat", "dog"], "labels": {"a": [0, 1], "b": [{"label": 1, "bounding_box": [0, 0, 1, 1]}]}}
_BOX = {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["cat"]}
_TASKS = [
    {
        "data": {"image": "/data/upload/3/a.jpg"},
        "annotations": [
            {
                "created_at": "2026-01-01",
                "result": [
                    {"type": "choices", "value": {"choices": ["cat", "dog"]}},
                    {"type": "rectanglelabels", "value": _BOX},
                ],
            }
        ],
    },
    {"data": {"image": "/data/local-files/?d=b%20c.jpg"}, "annotations": []},
]


def importer_targets() -> list[Entry]:
    """Every target of an importer."""
    arrow = (HUB / "saved" / "test" / "data-00000-of-00001.arrow").read_bytes()
    parquet = (HUB / "parquet" / "data" / "test-00000-of-00001.parquet").read_bytes()
    state = (HUB / "saved" / "test" / "state.json").read_bytes()
    return [
        (
            "yolo",
            [b"y" + _YOLO, b"ytrain: train.txt\nnames: [cat, 7]\n", b"l0 0.5 0.5 1 1\n1 0 0 1 0 1 1\n"],
            _yolo,
            (b"names:", b"train:", b"path:", b"kpt_shape:", b"../", b"./", b" 0.5"),
        ),
        ("coco_detection", [json.dumps(_COCO).encode()], _coco_detection, (b'"bbox"', b'"name"', b'"iscrowd"')),
        (
            "fiftyone",
            [b"s" + json.dumps(_SAMPLES).encode(), b"l" + json.dumps(_LABELS).encode()],
            _fiftyone,
            (b'"_cls"', b'"label"', b'"tags"', b'"classes"', b'"bounding_box"'),
        ),
        (
            "labelstudio",
            [json.dumps(_TASKS).encode()],
            _labelstudio,
            (b'"data"', b'"result"', b'"value"', b"http://", b"/data/local-files/?d=", b"%00", b"http://[::1"),
        ),
        (
            "hub_metadata",
            [
                b'j{"file_name": "train/a.jpg", "labels": ["cat"]}\n'
                b'{"file_name": "test/b.jpg", "labels": ["dog", "cat"]}\n',
                b'j{"file_name": "a.jpg", "labels": [0, 2]}\n{"file_name": "b.jpg", "labels": [1]}\n',
                b"cfile_name,labels,x\na.jpg,\"['cat', 'dog']\",1\nb.jpg,cat;dog,\n",
            ],
            _metadata,
            (b'"file_name"', b'"labels"', b"[1, 0]", b"true", b"NaN", b"('a',)"),
        ),
        ("hub_parquet", [parquet], _hub_parquet, (b"PAR1", b"huggingface", b'"ClassLabel"', b"labels", b'"names"')),
        (
            "hub_saved",
            [b"a" + arrow, b"s" + state],
            _hub_saved,
            (b"huggingface", b'"names"', b'"_data_files"', b"path"),
        ),
    ]
