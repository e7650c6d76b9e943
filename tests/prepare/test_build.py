"""From a raw data set to a Manifest: images that are left out, boxes that turn with their images."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from spml_fast.prepare.boxes import turn_boxes
from tests.support import data as make
from tests.support.prepare import prepare, report_of


def test_boxes_turn_with_the_image():
    # A white box in a black image, turned by Pillow, must be where turn_boxes says.
    box = np.array([[3, 0.25, 0.125, 0.5, 0.25]], np.float32)
    pixels = np.zeros((32, 64), np.uint8)
    pixels[4:8, 16:32] = 255
    for orientation in range(1, 9):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        upright = np.asarray(ImageOps.exif_transpose(image))
        rows, columns = np.nonzero(upright)
        height, width = upright.shape
        seen = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        turned = turn_boxes(box, np.array([orientation], np.uint8))
        assert np.allclose(turned[0], [3, *seen]), orientation


def test_a_bad_image_changes_no_other_row(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012")
    whole = prepare("voc", "--root", root, "--out", tmp_path / "whole")
    victim = root / "JPEGImages" / "2008_000004.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    (root / "JPEGImages" / "2009_000001.jpg").unlink()
    holed = prepare("voc", "--root", root, "--out", tmp_path / "holed")
    for name in ("train", "val", "test"):
        columns = []
        for manifest in (whole, holed):
            split = manifest.split(name)
            observed, known = (s.rows(range(len(split))).tolist() for s in (split.observed, split.known))
            assert split.boxes is not None
            boxes = [split.boxes[1][a:b].tolist() for a, b in zip(split.boxes[0], split.boxes[0][1:], strict=False)]
            columns.append({split.relative_path(i): (observed[i], known[i], boxes[i]) for i in range(len(split))})
        before, after = columns
        assert (
            before.keys() - after.keys()
            == {"train": {"2008_000004.jpg"}, "val": set(), "test": {"2009_000001.jpg"}}[name]
        )
        assert all(before[path] == row for path, row in after.items())
    report = report_of(holed)
    assert report["left_out"]["reasons"] == {"damaged or truncated": 1, "missing file": 1}
    assert {(p["split"], p["path"]) for p in report["left_out"]["images"]} == {
        ("train", "2008_000004.jpg"),
        ("test", "2009_000001.jpg"),
    }
