"""Which images pass the check, and that the loader decodes those that do."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from spml_fast.core import workers
from spml_fast.core.errors import UserError
from spml_fast.data.image_check import check_image, check_images, choose_level
from tests.support import data as make


@pytest.mark.parametrize("level", ["decode", "header"])
def test_good_images_pass(tmp_path, level):
    make.write_files(tmp_path, make.good_images())
    for name in make.good_images():
        checked = check_image(str(tmp_path / name), level)
        assert checked.reason is None, (name, checked)
        assert (checked.width, checked.height) == (make.WIDTH, make.HEIGHT), name
        assert checked.orientation == {"turned.jpg": 6, "turned.png": 8, "turned.tif": 6}.get(name, 1), name


def test_bad_images_are_named(tmp_path):
    make.write_files(tmp_path, {name: data for name, (data, _) in make.bad_images().items()})
    for name, (_, reason) in make.bad_images().items():
        checked = check_image(str(tmp_path / name))
        assert checked.reason is not None and reason in checked.reason, (name, checked)
    assert check_image(str(tmp_path / "absent.jpg")).reason == "missing file"
    assert check_image(str(tmp_path / "a.gif" / "below.jpg")).reason == "missing file"
    assert check_image(str(tmp_path)).reason == "a folder, not a file"
    assert check_image("nul\0byte.jpg").reason == "unusable file name"
    # Headers alone show kinds that the loader does not read, and not that the end is missing.
    assert "GIF" in (check_image(str(tmp_path / "a.gif"), "header").reason or "")
    assert check_image(str(tmp_path / "empty.jpg"), "header").reason == "empty file"
    assert check_image(str(tmp_path / "truncated a little.jpg"), "header").reason is None


def test_loader_decodes_what_passes(tmp_path):
    from nvidia.dali import fn, pipeline_def, types

    make.write_files(tmp_path, make.good_images())
    names = list(make.good_images())

    @pipeline_def(batch_size=len(names), num_threads=2, device_id=None)
    def read():
        path = fn.external_source(name="path", dtype=types.UINT8)
        return fn.decoders.image(fn.io.file.read(path), output_type=types.RGB, adjust_orientation=False)

    pipeline = read()
    pipeline.build()
    pipeline.feed_input("path", [np.frombuffer(os.fsencode(tmp_path / name), np.uint8) for name in names])
    (decoded,) = pipeline.run()
    for i, name in enumerate(names):
        pixels = np.asarray(decoded.at(i))
        assert pixels.shape == (make.HEIGHT, make.WIDTH, 3), name
        if name not in ("grey16.png", "one bit.png", "cmyk.jpg", "palette.png") and "grey" not in name:
            assert np.abs(pixels.astype(int) - make.pixels()).mean() < 12, name


def test_verify_images_in_processes(tmp_path):
    files = {f"{i:03d}.jpg": make.encoded(make.drawn_image(16 + i, 20)) for i in range(150)}
    files["070.jpg"] = b""
    files["149.jpg"] = files["149.jpg"][:-30]
    make.write_files(tmp_path, files)
    checked = check_images(151, lambda i: str(tmp_path / f"{i:03d}.jpg"), "decode", workers=2, progress=False)
    assert np.nonzero(~checked.ok)[0].tolist() == [70, 149, 150]
    assert {i: reason for i, (reason, _) in checked.rejected.items()} == {
        70: "empty file",
        149: "damaged or truncated",
        150: "missing file",
    }
    kept = np.nonzero(checked.ok)[0]
    assert np.array_equal(checked.width[kept], 16 + kept) and (checked.height[kept] == 20).all()


def test_processes_that_die_at_once_are_one_sentence(monkeypatch):
    class Broken(workers.ProcessPoolExecutor):
        def submit(self, *_: object, **__: object):
            raise BrokenProcessPool

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Broken)
    with pytest.raises(UserError, match=r"a process that was checking images died near 0\.jpg"):
        check_images(100, lambda i: f"{i}.jpg", "header", workers=2, progress=False)


def test_level_by_number():
    assert choose_level(None, 200_000) == "decode" and choose_level(None, 200_001) == "header"
    assert choose_level("none", 5) == "none"
