"""Every parser of files that come from anywhere, as a function of bytes: seeds, and how they are parsed.

A target is given a folder of its own and the input; it may raise `UserError` and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.data.image_check import check_bytes
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.shard_check import check_shards
from spml_fast.data.shards import ShardFile, Shards
from spml_fast.prepare.boxes import pixels_to_fractions
from spml_fast.prepare.datasets import coco, csv_table, cub, id_lists, nuswide, voc
from spml_fast.prepare.datasets.openimages import class_files, image_lists, label_files
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.tar_source import MemberIndex, member_bytes, read_members
from spml_fast.runs.read import read_classes, read_epochs, read_results, read_run
from spml_fast.runs.recipe import check_keys, chosen_method, named_plugins, read_recipe
from spml_fast.training.checkpoint import read_mark, read_position
from tests.fuzz.import_targets import importer_targets

Parse = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: of the target, and of its folder in corpus/.
        seeds: inputs that are right, or nearly.
        parse: parses an input in a folder.
        words: of its format.
    """

    name: str
    seeds: Sequence[bytes]
    parse: Parse
    words: Sequence[bytes] = ()


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _table(folder: Path, data: bytes, name: str = "labels.csv") -> None:
    path = _written(folder, name, data)
    options = argparse.Namespace(
        table=path, images=folder, classes=None, conflicts="positive", unlisted=None, unlisted_eval=None
    )
    raw = csv_table.Csv().read(options)
    for split in raw.splits:
        split.select(np.arange(len(split)))


def _jsonl_table(folder: Path, data: bytes) -> None:
    _table(folder, data, "labels.jsonl")


def _parquet_table(folder: Path, data: bytes) -> None:
    _table(folder, data, "labels.parquet")


def _parquet_seed() -> bytes:
    file = io.BytesIO()
    columns = {"path": ["a.jpg", "b.jpg"], "positives": [["cat", "dog"], ["cat"]], "split": ["train", "val"]}
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def _id_list(folder: Path, data: bytes) -> None:
    id_lists.read_list(_written(folder, "list.txt", data), 5)


def _class_lists(folder: Path, data: bytes) -> None:
    path = _written(folder, "classes.txt", data)
    for reader in (csv_table.read_classes, class_files.read_classes, class_files.read_descriptions, cub.read_numbered):
        try:
            reader(path)
        except UserError:
            continue


def _coco(folder: Path, data: bytes) -> None:
    path = _written(folder, "instances.json", data)
    options = argparse.Namespace(
        annotations=path, images=folder, test_annotations=path, test_images=None, val_fraction="0"
    )
    raw = coco.Coco().read(options)
    for split in raw.splits:
        assert split.boxes is not None and split.width is not None and split.height is not None
        width = np.maximum(np.asarray(split.width, np.int32), 1)
        height = np.maximum(np.asarray(split.height, np.int32), 1)
        upright = np.ones(len(split), np.uint8)
        pixels_to_fractions(split.boxes, width, height, upright, upright)


def _boxes(folder: Path, data: bytes) -> None:
    """One box and size, as numbers in JSON and in XML."""
    fields = (data.decode("utf-8", "replace").split() + ["1"] * 6)[:6]
    box, (width, height) = ", ".join(fields[:4]), fields[4:]
    _coco(
        folder,
        (
            f'{{"images": [{{"id": 1, "file_name": "a", "width": {width}, "height": {height}}}], '
            f'"annotations": [{{"image_id": 1, "category_id": 1, "bbox": [{box}]}}], '
            f'"categories": [{{"id": 1, "name": "cat"}}]}}'
        ).encode("utf-8", "surrogatepass"),
    )


def _voc_xml(folder: Path, data: bytes) -> None:
    (width, height), boxes = voc.read_annotation(_written(folder, "a.xml", data), {"cat": 0, "dog": 1})
    np.array([width, height]).astype(np.int32)
    np.array(boxes, np.float64).reshape(-1, 5)


def _voc_flags(folder: Path, data: bytes) -> None:
    voc.read_flags(_written(folder, "cat_train.txt", data))


def _openimages(folder: Path, data: bytes) -> None:
    kind, data = data[:1], data[1:]
    path = _written(folder, "labels.csv.gz" if kind == b"z" else "labels.csv", data)
    if kind == b"r":
        for _ in image_lists.read_rotations(path):
            pass
    elif kind == b"m":
        label_files.read_labels([path], ["/m/01", "/m/02"], 0.5)
    else:
        label_files.read_labels([path], ["/m/01", "/m/02"])


def _cub(folder: Path, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cub.read_attributes(_written(folder, "labels.txt", data), 3, 4)


def _nuswide(folder: Path, data: bytes) -> None:
    nuswide.labels_of_array(_written(folder, "labels.npy", data), 2)


def _tar(folder: Path, data: bytes) -> None:
    path = _written(folder, "a.tar", data)
    for archive, member, ignored in read_members(path):
        if not ignored:
            member_bytes(path, archive, member)


def _npy(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def _pack(files: dict[str, bytes]) -> bytes:
    """Several small files as one input: names and sizes in a line, then their bytes."""
    head = json.dumps({name: len(data) for name, data in files.items()}).encode()
    return head + b"\n" + b"".join(files.values())


def _unpack(folder: Path, data: bytes, names: Sequence[str]) -> None:
    """Write the files of `_pack`, or of what a mutation has made of it: the last takes what is left."""
    head, _, rest = data.partition(b"\n")
    try:
        sizes = [int(size) for size in json.loads(head).values()]
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        sizes = []
    for place, name in enumerate(names):
        size = sizes[place] if place < len(sizes) and place < len(names) - 1 else len(rest)
        size = min(max(size, 0), len(rest))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rest[:size])
        rest = rest[size:]


SHARD_FILES = ("train/shards.json", "train/shard_index.npy", "train-00000.tar")


def _shards(folder: Path, data: bytes) -> None:
    _unpack(folder, data, SHARD_FILES)
    shards = Shards(folder / "train", folder)
    if len(shards):
        shards.read_many(range(len(shards)))
    check_shards(shards, 1)


def _manifest_files(folder: Path) -> dict[str, bytes]:
    """Every file of a small Manifest."""
    writer = ManifestWriter(folder / "seed", "mine", ["ant", "bee"], folder)
    known = SparseLabels.from_entries([0, 1, 1], [0, 0, 1], [1, 0, 1], 3, 2)
    boxes = np.array([0, 1, 1, 1]), np.array([[0, 0, 0, 1, 1]])
    writer.add_split("train", known=known, width=[1, 2, 3], height=[3, 2, 1], paths=["a", "b", "c"], boxes=boxes)
    templates = ["{split}/{id:016x}.jpg", "{id}"]
    writer.add_split(
        "val",
        known=known,
        width=[1] * 3,
        height=[1] * 3,
        ids=[1, 2, 3],
        template=templates,
        template_of=np.arange(3) % 2,
    )
    writer.finish({})
    root = folder / "seed"
    # Small files first: mutations of an input's beginning are likelier to be met.
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _make_manifest_target(folder: Path) -> Target:
    files = _manifest_files(folder)
    names = list(files)

    def parse(target: Path, data: bytes) -> None:
        """One file is the input; the first byte says which."""
        changed = names[data[0] % len(names)] if data else names[0]
        for name, content in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[1:] if name == changed else content)
        manifest = Manifest(target)
        for split in manifest.splits.values():
            _use_split(split)

    seeds = [bytes([place]) + content for place, content in enumerate(files.values())]
    return Target(
        "manifest", seeds, parse, (b'"size"', b'"template"', b'"constant"', b"{id:9d}", b"<i8", b">i8", b"|O", b"(9,)")
    )


def _use_split(split: Split) -> None:
    """Touch every array of a split that may be large only in name."""
    if len(split) > 100:
        return
    for index in range(len(split)):
        split.path(index)
    for labels in (split.known, split.observed):
        if labels.num_classes < 1000:
            labels.rows(range(len(split)))
    assert split.boxes is None or len(split.boxes) == 2
    assert len(split.width) == len(split.height) == len(split.orientation) == len(split)
    MemberIndex([split])


def _recipe(folder: Path, data: bytes) -> None:
    path = str(_written(folder, "a.yaml", data))
    recipe = read_recipe(path)
    named_plugins(recipe)
    check_keys(recipe, path, chosen_method(recipe, path))


TAG = "finetune-e0001-u000000-w1"
RUN_FILES = (
    "metrics.jsonl",
    "results.json",
    "classes.txt",
    "checkpoints/newest.json",
    f"checkpoints/{TAG}/mark.json",
)


def _run_files(folder: Path, data: bytes) -> None:
    _unpack(folder, data, RUN_FILES)
    (folder / "config.yaml").write_text("method: {name: an}\n", encoding="utf-8")
    run = read_run(folder)
    assert run.figures is not None and run.headline != ""
    for reader in (
        read_epochs,
        read_results,
        lambda f: read_position(f / RUN_FILES[3]),
        lambda f: read_mark(f / "checkpoints", TAG),
    ):
        try:
            reader(folder)
        except UserError:
            continue
    # Documented: its callers name the file.
    with contextlib.suppress(UnicodeDecodeError):
        read_classes(folder / "classes.txt")


def _image(folder: Path, data: bytes) -> None:
    check_bytes(data, "header")
    check_bytes(data)


def _tar_seed(compression: str = "", **pax: str) -> bytes:
    file = io.BytesIO()
    mode: Any = f"w:{compression}"
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("a/1.jpg", b"one"), ("2.jpg", b"two" * 300), ("ü" * 60 + ".jpg", b"")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), pax
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _image_seeds() -> list[bytes]:
    out = []
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8))
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"):
        file = io.BytesIO()
        image.save(file, kind)
        out.append(file.getvalue())
    return out


def _labels_csv(rows: str) -> bytes:
    return f"ImageID,Source,LabelName,Confidence\n{rows}".encode()


_COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 20}, {"id": "2", "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3.5, 4]}, {"image_id": "2", "category_id": 8}],
    "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}
_XML = (
    b"<annotation><size><width>500</width><height>375</height></size><object><name>cat</name><bndbox><xmin>1</xmin>"
    b"<ymin>2</ymin><xmax>30.5</xmax><ymax>40</ymax></bndbox></object></annotation>"
)
_HUMAN = "000002b66c9c498e,verification,/m/01,1\n000002b66c9c498e,verification,/m/02,0\n"
_METRICS = (
    b'{"kind": "update", "phase": "finetune", "epoch": 0, "update": 3, "loss": 0.5}\n'
    b'{"kind": "epoch", "phase": "finetune", "epoch": 1, "loss": 0.4, "val_map": 80.5, "seconds": 3.5, '
    b'"images_per_second": 9, "data_wait": 0.1, "memory_gib": 1.5}\n'
)
_POSITION = b'{"phase": "finetune", "epoch": 1, "update": 0, "world_size": 1, "zero_stage": 0}'
_RECIPE = (
    b"data:\n  dir: data/x\n  mean: &m [0.5, 0.5, 0.5]\n  std: *m\nmodel: {head: cam, alpha_train: 5.0}\n"
    b"method:\n  name: ll_r\ntrain: {epochs: 10, lr: 1.0e-5}\nrun:\n  plugins: [a, b]\n"
)


def make_targets(folder: Path) -> dict[str, Target]:
    """Every target by name; `folder` is used for what the seeds are made of."""
    table = [ShardFile("train-00000.tar", 30, 2, hashlib.sha256(b"x" * 30).hexdigest())]
    shard = _pack(
        {
            SHARD_FILES[0]: json.dumps([vars(file) for file in table]).encode(),
            SHARD_FILES[1]: _npy(np.array([[0, 0, 10], [0, 12, 18]])),
            SHARD_FILES[2]: b"x" * 30,
        }
    )
    human = _labels_csv(_HUMAN)
    machine = b"m" + human.replace(b"verification", b"machine").replace(b",1\n", b",0.9\n")
    rotations = b"rImageID,Subset,Rotation\n000002b66c9c498e,train,90.0\n000002b66c9c498f,train,\n"
    run = _pack(
        {
            RUN_FILES[0]: _METRICS,
            RUN_FILES[1]: b'{"split": "test", "alpha": {"1": {"map": 90.0}}, "best_val_map": 80}',
            RUN_FILES[2]: b"cat\ndog\n",
            RUN_FILES[3]: _POSITION,
            RUN_FILES[4]: _POSITION[:-1]
            + b', "serial": 3, "files": {"a.pt": {"size": 5, "crc32": "0a"}}, "best": null}',
        }
    )
    tars = [_tar_seed(), _tar_seed("gz"), _tar_seed("bz2"), _tar_seed("xz"), _tar_seed(size="3")]
    targets = [
        Target(
            "csv_table",
            [
                b"path,positives,negatives,unknowns,split\na.jpg,cat;dog,,bird,train\nb.jpg,dog,cat,,val\n",
                '\ufeffpath,positives\r\nü.jpg,cat\r\n"a,b","c""d"\r\n'.encode(),
            ],
            _table,
            (b"path", b"positives", b"split", b";", b'""'),
        ),
        Target(
            "jsonl_table",
            [
                b'{"path": "a.jpg", "positives": ["cat", "dog"], "split": "train"}\n'
                b'{"path": "b", "positives": "cat", "split": "val"}\n',
                b'{"path": "a.jpg", "positives": "cat;dog", "negatives": null}\n',
            ],
            _jsonl_table,
            (b'"path"', b'"positives"', b'"split"', b'["a"]'),
        ),
        Target("parquet_table", [_parquet_seed()], _parquet_table, (b"PAR1", b"path", b"positives")),
        Target("id_list", [b"a.jpg,0 2\nb/c d.jpg,4\n"], _id_list),
        Target(
            "class_lists",
            [b"cat\ndog\n", b"/m/01\n/m/02\n", b'LabelName,DisplayName\n/m/01,Cat\n/m/02,"A, b"\n', b"1 cat\n2 dog\n"],
            _class_lists,
        ),
        Target("coco", [json.dumps(_COCO).encode()], _coco, (b'"bbox"', b'"id"', b'"images"', b'"width"')),
        Target("boxes", [b"1 2 3 4 10 20", b"-1.5 2e3 1e-5 0 1 1"], _boxes),
        Target(
            "voc_xml",
            [_XML, b'<?xml version="1.0" encoding="utf-8"?>' + _XML],
            _voc_xml,
            (b"<object>", b"<bndbox>", b"encoding='utf-16'"),
        ),
        Target("voc_flags", [b"2008_000001 1\n2008_000002 -1\n2008_000003  0\n"], _voc_flags),
        Target(
            "openimages",
            [b"h" + human, machine, rotations, b"z" + gzip.compress(human, mtime=0)],
            _openimages,
            (b"/m/01", b"verification", b"ImageID", b"Rotation", b'"'),
        ),
        Target("cub", [b"1 1 0 3 2.5\n1 2 1 4 1\n2 4 1 1 0\n"], _cub),
        Target(
            "nuswide",
            [_npy(np.eye(2, 81)), _npy(np.zeros((2, 81), np.uint8))],
            _nuswide,
            (b"'descr'", b"'|O'", b"(2, 81)"),
        ),
        Target(
            "tar", tars, _tar, (b"size=1125899906842624\n", b"28 size=1125899906842624\n", b"GNU.sparse.size", b"path=")
        ),
        Target("shards", [shard], _shards, (b'"size"', b'"samples"', b"'<i8'")),
        _make_manifest_target(folder),
        Target(
            "recipe",
            [_RECIPE, b"{}\n", b"data: null\n"],
            _recipe,
            (b"&a [*a]", b"!!float", b"!!int", b"<<:", b"1:60:60"),
        ),
        Target("run_files", [run], _run_files, (b'"kind"', b'"epoch"', b'"phase"', b'"alpha"', b'"update"')),
        Target("images", _image_seeds(), _image),
        *(Target(*entry) for entry in importer_targets()),
    ]
    return {target.name: target for target in targets}
