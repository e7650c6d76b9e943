"""Files that wait for ever, never end, or claim to be huge: each is a sentence before any harm is done."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.image_check import check_image, check_images
from spml_fast.data.labels import SparseLabels
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets import coco, csv_table, voc
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.tar_source import read_members
from spml_fast.runs.recipe import read_recipe


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_huge_png(path: Path, side: int = 30_000) -> None:
    """A small file that says it has side x side RGB pixels, of which it holds some rows."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    rows = _chunk(b"IDAT", zlib.compress(bytes(3 * side + 1) * 64, 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + _chunk(b"IEND", b""))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def manifest_of(images: Path, known_sizes: bool = True) -> Manifest:
    names = sorted(p.name for p in images.iterdir())
    writer = ManifestWriter(images.parent / "m", "mine", ["x"], images)
    size = len(names)
    known = SparseLabels.from_positives([[0]] * size, 1, 0)
    width, height = ([60] * size, [40] * size) if known_sizes else ([0] * size, [0] * size)
    writer.add_split("test", known=known, width=width, height=height, paths=names)
    return writer.finish({})


def read_all(manifest: Manifest, **options: int) -> int:
    config = DataConfig(image_size=32, threads=1, **options)  # type: ignore[arg-type]
    mean = [0.5] * 3
    loader = EvalLoader(manifest.split("test"), config, batch_size=2, device=torch.device("cpu"), mean=mean, std=mean)
    return sum(batch.real for batch in loader)


def test_a_pipe_among_the_images(images):
    """Each of these waited for a writer for ever."""
    manifest = manifest_of(images)
    assert read_all(manifest) == 4
    (images / "c.png").unlink()
    os.mkfifo(images / "c.png")
    for level in ("decode", "header"):
        checked = check_image(str(images / "c.png"), level)
        assert checked.reason == "unreadable file" and "it is a named pipe, not a regular file" in checked.detail
    assert check_image("/dev/zero").reason == "unreadable file"
    with pytest.raises(UserError, match=r"image .*c\.png cannot be read \(it is a named pipe, not a regular file\)"):
        read_all(manifest)


def test_a_huge_image_is_not_decoded(images):
    """Prepared, it is left out with its size; swapped in later, it is named before memory is taken for its pixels."""
    manifest = manifest_of(images)
    write_huge_png(images / "b.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checked = check_images(1, lambda _: str(images / "b.png"), "decode", progress=False)
    assert checked.rejected[0][0] == "too many pixels"
    assert checked.rejected[0][1].startswith("30000 x 30000; at most 178,956,970 are decoded, see prepare --max-pixels")
    with pytest.raises(UserError, match=r"b\.png is 30000 x 30000 pixels now and was 60 x 40 when the data were prepa"):
        read_all(manifest)
    # Decoded, it takes 2.7 GB and more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


@pytest.mark.parametrize("limit", [60 * 40, 60 * 40 - 1])
def test_the_limit_is_an_option(images, limit):
    manifest = manifest_of(images, known_sizes=False)
    if limit == 60 * 40:
        assert read_all(manifest, max_pixels=limit) == 4
        assert check_images(1, lambda _: str(images / "a.png"), "header", progress=False, max_pixels=limit).ok.all()
        return
    with pytest.raises(UserError, match=r"a\.png is 60 x 40 pixels; at most 2,399 are decoded, see .*max_pixels"):
        read_all(manifest, max_pixels=limit)
    for level in ("decode", "header"):
        assert check_image(str(images / "a.png"), level, limit).reason == "too many pixels"
    # What the Manifest knows was accepted when it was prepared.
    assert read_all(manifest_of_known(images), max_pixels=limit) == 4


def manifest_of_known(images: Path) -> Manifest:
    (images.parent / "m").rename(images.parent / "other")
    return manifest_of(images)


def test_a_forged_size_in_a_tar(tmp_path):
    """The library counted blocks up to 2^50 after the file's end."""
    for size in ("1125899906842624", "1000000000"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in ("a.jpg", "b.jpg"):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = 3, {"size": size} if name == "a.jpg" else {}
                archive.addfile(info, io.BytesIO(b"abc"))
        (tmp_path / "a.tar").write_bytes(file.getvalue())
        with pytest.raises(
            UserError, match=r"a\.tar cannot be read beyond 'a\.jpg' \(the file ends [0-9,]+ bytes before"
        ):
            list(read_members(tmp_path / "a.tar"))
    (tmp_path / "b.tar").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "b.tar")
    with pytest.raises(UserError, match="named pipe, not a regular file"):
        list(read_members(tmp_path / "b.tar"))


def test_tables_that_are_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for reader in (
        lambda p: csv_table.read_table(p, "error"),
        csv_table.read_classes,
        coco.read_instances,
        voc.read_flags,
        lambda p: voc.read_annotation(p, {}),
        lambda p: read_recipe(str(p)),
    ):
        with pytest.raises(UserError, match="it is a named pipe, not a regular file"):
            reader(tmp_path / "pipe")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"has more than 100,000 values"),
        ("a: &a [*a]\n", "is nested more than 50 levels deep"),
        ("a: " + "[" * 5000, "is nested more than 50 levels deep"),
        ("{" * 30_000, "is nested more than 50 levels deep"),
        ("- " * 20_000, "is nested more than 50 levels deep"),
        ("a: 2001-99-99\n", "is not valid YAML: month must be"),
        ("a: " + "9" * 5000, "is not valid YAML: "),
        ("a: \x07", "is not valid YAML"),
        ("a: [\n", "is not valid YAML in line 2"),
        ("a: !!python/object/apply:os.system [x]", "is not valid YAML in line 1"),
    ],
    ids=["aliases", "circle", "flow", "maps", "block", "date", "digits", "control", "cut", "tag"],
)
def test_hostile_recipes(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(str(tmp_path / "a.yaml"))


def test_recipes_with_aliases_are_read(tmp_path):
    """PyYAML writes them itself where a list is used twice."""
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfdata: {mean: &m [0.5, 0.5], std: *m}\n")
    assert read_recipe(str(tmp_path / "a.yaml")) == {"data": {"mean": [0.5, 0.5], "std": [0.5, 0.5]}}
    (tmp_path / "a.yaml").write_bytes(b"data: \xff")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 6\)"):
        read_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", "1" + "0" * 400, "-Infinity"])
def test_boxes_that_are_no_pixels(tmp_path, value):
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, "BOX", 4]}
    values = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [entry],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(values).replace('"BOX"', value))
    with pytest.raises(UserError, match=r"annotation 0 has .* as its 'bbox'") as caught:
        coco.read_split(coco.read_instances(tmp_path / "a.json"), tmp_path / "a.json", "train", {1: 0}, "")
    assert len(str(caught.value)) < 400
    box = "".join(f"<{side}>{value.replace('Infinity', 'inf')}</{side}>" for side in ("xmin", "ymin", "xmax", "ymax"))
    (tmp_path / "a.xml").write_text(f"<a><object><name>cat</name><bndbox>{box}</bndbox></object></a>")
    with pytest.raises(UserError, match="holds a box or size that is no number"):
        voc.read_annotation(tmp_path / "a.xml", {"cat": 0})


def test_hostile_json(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ("[" * 100_000, "is not valid JSON: it is nested too deeply"),
        ('{"images": [{"id": 1, "file_name": "\\ud800"}]}', r"entry 0 of 'images' has '\\ud800' as its 'file_name'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            coco.read_instances(path)
    with pytest.raises(UserError, match="class 1 has an unusable name"):
        ManifestWriter(tmp_path / "m", "mine", ["\ud800"])
