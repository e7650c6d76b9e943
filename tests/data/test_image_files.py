"""Images that are found in directories."""

from __future__ import annotations

from spml_fast.data.image_files import find_images, images_below
from tests.support import data as make


def test_skipped_formats_are_named(tmp_path):
    make.write_files(tmp_path, {name: b"" for name in ("a.jpg", "b.HEIC", "sub/c.heic", "sub/d.gif", "e.txt")})
    notes: list[str] = []
    assert find_images([str(tmp_path)], notes.append) == [str(tmp_path / "a.jpg")]
    assert notes == [f"{tmp_path}: images of formats that are not read are skipped (1 .gif, 2 .heic); convert them"]
    assert images_below(str(tmp_path), frozenset({".gif", ".heic"})) == [
        str(tmp_path / name) for name in ("b.HEIC", "sub/c.heic", "sub/d.gif")
    ]
