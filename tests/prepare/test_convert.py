"""Images that the loader does not read: named when they are left out, and copied with --convert."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from spml_fast.core.errors import UserError
from spml_fast.data.image_check import check_bytes
from spml_fast.prepare.convert import _plain, encode
from tests.support import data as make
from tests.support.paths import ROOT
from tests.support.prepare import prepare, report_of

if ".avif" not in Image.registered_extensions():
    pytest.skip("this Pillow has no AVIF", allow_module_level=True)

HEIC = ROOT / "tests" / "fixtures" / "drawn.heic"
DRAWN = make.drawn_image()


def moving_gif() -> bytes:
    """Two frames, the first of which is the drawn image in 64 colours."""
    frames = [DRAWN.quantize(64), Image.new("P", DRAWN.size)]
    return make.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def transparent() -> Image.Image:
    """The drawn image, half of it invisible."""
    image = DRAWN.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.where(np.arange(48) < 24, 0, 255).astype(np.uint8), (32, 1))))
    return image


OTHERS = {
    "sub/a.gif": moving_gif(),
    "b.avif": make.encoded(DRAWN, "AVIF", quality=90, exif=make.exif(6)),
    "c.ico": make.encoded(transparent(), "ICO", sizes=[(32, 32)]),
    "e.avif": make.encoded(transparent(), "AVIF"),
}


def write(root: Path, **more: bytes) -> tuple[object, ...]:
    """A table and its images: four that the loader reads, and those of OTHERS and `more`."""
    files = {f"{i}.jpg": make.encoded() for i in range(4)} | OTHERS | {k.replace("_", "."): v for k, v in more.items()}
    make.write_files(root / "photos", files)
    kinds = [("cat", "train"), ("dog", "val"), *[("dog", "train")] * (len(files) - 2)]
    rows = "".join(f"{name},{label},{split}\n" for name, (label, split) in zip(files, kinds, strict=True))
    (root / "table.csv").write_text(f"path,positives,split\n{rows}")
    return "csv", "--table", root / "table.csv", "--images", root / "photos"


def test_they_are_named_when_they_are_left_out(tmp_path, capsys):
    manifest = prepare(*write(tmp_path, h_heic=HEIC.read_bytes()), "--out", tmp_path / "m")
    text = capsys.readouterr().out
    for count, kind in ((1, "GIF"), (2, "AVIF"), (1, "ICO"), (1, "HEIC")):
        assert f"  {count}  format {kind} is not read by the loader; convert it to JPEG or PNG" in text
    assert "left out: 5 images" in text and "--convert makes JPEG or PNG copies of 5 of them" in text
    assert len(manifest.split("train")) == 3 and "converted" not in report_of(manifest)


def test_copies(tmp_path, capsys):
    """First frame, transparency, orientation; in the Manifest, and nothing of the user's is touched."""
    arguments = write(tmp_path, f_tif=make.encoded(DRAWN.convert("F"), "TIFF"), g_gif=OTHERS["sub/a.gif"][:200])
    before = {p: p.read_bytes() for p in (tmp_path / "photos").rglob("*") if p.is_file()}
    manifest = prepare(*arguments, "--convert", "--out", tmp_path / "m")
    assert {p: p.read_bytes() for p in (tmp_path / "photos").rglob("*") if p.is_file()} == before
    train = manifest.split("train")
    paths = {Path(train.path(i)).name: i for i in range(len(train))}
    copies = ["a.gif.png", "b.avif.jpg", "c.ico.png", "e.avif.png"]
    assert list(paths) == ["0.jpg", "2.jpg", "3.jpg", *copies]
    folder = tmp_path / "m" / "converted" / "train"
    assert all(Path(train.path(i)).is_relative_to(folder) for name, i in paths.items() if name in copies)
    with Image.open(train.path(3)) as gif, Image.open(io.BytesIO(OTHERS["sub/a.gif"])) as source:
        assert np.array_equal(np.asarray(gif), np.asarray(source.convert("RGB")))
    with Image.open(train.path(4)) as avif:
        assert avif.format == "JPEG" and avif.size == DRAWN.size
        assert np.abs(np.asarray(avif).astype(int) - make.pixels()).mean() < 4
    with Image.open(train.path(5)) as icon, Image.open(train.path(6)) as half:
        assert icon.mode == half.mode == "RGBA"
        assert np.asarray(half)[0, 0, 3] == 0 and np.asarray(half)[0, 40, 3] == 255
    # The copy of a turned image is turned once, by the loader.
    assert train.orientation.tolist() == [1, 1, 1, 1, 6, 1, 1]
    assert (train.width[4], train.height[4]) == (DRAWN.height, DRAWN.width)
    report, text = report_of(manifest), capsys.readouterr().out
    assert report["converted"]["kinds"] == {"GIF": 1, "AVIF": 2, "ICO": 1} and report["left_out"]["total"] == 2
    assert "converted into JPEG or PNG copies: 1 GIF, 2 AVIF, 1 ICO" in text
    # 32-bit pixels have no fixed white, and damage stays damage.
    assert sorted(r.split(",")[0] for r in report["left_out"]["reasons"])[0].startswith("TIFF with 32 bits")
    assert train.known.row_counts(1).tolist() == [1] * 7


def test_many_in_processes(tmp_path):
    make.write_files(tmp_path / "photos", {f"{i}.gif": OTHERS["sub/a.gif"] for i in range(20)})
    (tmp_path / "t.csv").write_text("path,positives\n" + "".join(f"{i}.gif,cat\n" for i in range(20)))
    manifest = prepare(
        *("csv", "--table", tmp_path / "t.csv", "--images", tmp_path / "photos", "--convert", "--workers", 2),
        *("--out", tmp_path / "m"),
    )
    assert sum(len(split) for split in manifest.splits.values()) == 20
    assert len(list((tmp_path / "m" / "converted").rglob("*.png"))) == 20


def test_heic_needs_a_library(tmp_path, monkeypatch):
    """Without pillow-heif a sentence with the command that installs it; with it, a copy."""
    arguments = write(tmp_path, h_heic=HEIC.read_bytes())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"needs pillow-heif for HEIC images: pip install 'spml_fast\[heic\]'"):
        prepare(*arguments, "--convert", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.undo()
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    manifest = prepare(*arguments, "--convert", "--out", tmp_path / "m")
    train = manifest.split("train")
    with Image.open(train.path(len(train) - 1)) as copy:
        assert copy.format == "JPEG" and np.abs(np.asarray(copy).astype(int) - make.pixels()).mean() < 6


@pytest.mark.parametrize("transparent", [False, True])
def test_profiles_become_srgb(transparent):
    """A profile whose red is sRGB's green: red pixels come out green, and as transparent as they were."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)}
    red, green = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 100)) if transparent else Image.new("RGB", (8, 8), (255, 0, 0))
    data, ending = encode(make.encoded(image, "AVIF", icc_profile=bytes(profile), quality=100), 100)
    with Image.open(io.BytesIO(data)) as copy:
        pixel = np.asarray(copy)[4, 4].astype(int)
    assert ending == (".png" if transparent else ".jpg") and pixel[1] > 220 and pixel[0] < 40
    assert pixel[3:].tolist() == ([100] if transparent else [])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBa", "CMYK"])
def test_a_profile_of_other_colours_changes_nothing(mode):
    """sRGB is what pixels become; a profile that says so, or that is of another kind of colours, leaves them."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = make.drawn_image().convert("RGBA" if mode == "RGBa" else "L" if mode == "LA" else "RGB").convert(mode)
    plain, same = _plain(image, None), _plain(image, profile)
    assert same.getbands() == plain.getbands()
    assert np.abs(np.asarray(same).astype(int) - np.asarray(plain).astype(int)).max() <= 1


def test_limits():
    with pytest.raises(ValueError, match=r"48 x 32; at most 100 are decoded"):
        encode(OTHERS["sub/a.gif"], 100)
    with pytest.raises(UserError, match="leave out --verify none"):
        prepare("digits", "--convert", "--verify", "none", "--out", "nowhere")
    result = check_bytes(HEIC.read_bytes(), "header")
    assert result.reason == "format HEIC is not read by the loader; convert it to JPEG or PNG"


@pytest.mark.parametrize("path", ["/abs/a.gif", "../a.gif"])
def test_images_outside_of_the_folder(tmp_path, path):
    """Absolute paths, and such that leave the folder, are copied under a number."""
    file = tmp_path / "photos" / path if path.startswith(".") else tmp_path / "abs" / "a.gif"
    make.write_files(tmp_path / "photos", {"0.jpg": make.encoded(), "1.jpg": make.encoded()})
    make.write_files(file.parent, {"a.gif": OTHERS["sub/a.gif"]})
    named = path if path.startswith(".") else str(file)
    (tmp_path / "t.csv").write_text(f"path,positives,split\n0.jpg,cat,train\n{named},dog,train\n1.jpg,cat,val\n")
    manifest = prepare(
        *("csv", "--table", tmp_path / "t.csv", "--images", tmp_path / "photos", "--convert", "--out", tmp_path / "m")
    )
    assert Path(manifest.split("train").path(1)) == tmp_path / "m" / "converted" / "train" / "00000001.png"


def test_a_turned_tiff_is_turned_once():
    # Pillow turns the pixels of this format itself when it loads them.
    image = Image.new("1", (40, 20))
    image.paste(1, (0, 0, 10, 5))
    exif = Image.Exif()
    exif[0x112] = 6
    data = io.BytesIO()
    image.save(data, "TIFF", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data.getvalue())))
    copy = Image.open(io.BytesIO(encode(data.getvalue(), 10**6)[0]))
    assert ImageOps.exif_transpose(copy).convert("1").tobytes() == shown.convert("1").tobytes()
    assert shown.size == (20, 40)
