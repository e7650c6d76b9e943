"""`data.decode reduced`: the views against Pillow's reduced decoding and those of whole images."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from spml_fast.core.errors import UserError
from spml_fast.data import reduced_decoding
from spml_fast.data.cpu_views import IntArray as Ints
from spml_fast.data.cpu_views import _scaled
from spml_fast.data.manifest import Split
from spml_fast.data.reduced_decoding import decode_reduced
from spml_fast.prepare.pack import PackOptions, pack
from tests.support.loading import (
    SIDE,
    by_index,
    data_config,
    distances,
    eval_loader,
    flat,
    reference_views,
    train_loader,
)
from tests.support.paths import ROOT, need_data
from tests.support.pil import make_split, photo
from tests.support.runs import environment

# To a half, an eighth (the most), a quarter, whole; the last is a view of an odd size to a half.
SIZES = [(160, 120), (800, 500), (300, 200), (90, 130), (97, 141)]


def save(image: Image.Image, path: Path, turn: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(path, quality=92, exif=exif)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Photographs of several sizes, all orientations."""
    root = tmp_path_factory.mktemp("large")
    names, turns = [], []
    for i in range(40):
        names.append(f"{i}.jpg")
        turns.append(i // len(SIZES) + 1)
        save(photo(i, *SIZES[i % len(SIZES)]), root / names[-1], turns[-1])
    return make_split(root / "manifest", root, names, orientation=turns)


def drafted(path: str, side: int) -> Image.Image:
    """An image as shown, decoded by Pillow at the smallest size that is not below the view's."""
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        # Pillow keeps the tag.
        return ImageOps.exif_transpose(image).convert("RGB")


def test_eval_view_is_that_of_pillows_draft(photos: Split) -> None:
    reduced = by_index(eval_loader(photos, data_config(decode="reduced")), "eval")
    whole = by_index(eval_loader(photos), "eval")
    assert sorted(reduced) == list(range(len(photos)))
    differs = 0
    for i, ours in reduced.items():
        image = drafted(photos.path(i), SIDE)
        if image.size[0] == int(photos.width[i]):
            assert torch.equal(ours, whole[i])
            continue
        differs += 1
        expected = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        assert (ours - expected).abs().max() <= 1.0
        assert (ours - whole[i]).abs().mean() < 2.5
    assert differs == 32


def test_real_photographs_change_little(tmp_path: Path) -> None:
    root = need_data("coco_mini", "images")
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))[:24]
    split = make_split(tmp_path / "manifest", root, names)
    whole, reduced = (
        by_index(eval_loader(split, data_config(image_size=128, decode=decode)), "eval")
        for decode in ("full", "reduced")
    )
    change = torch.stack([(whole[i] - reduced[i]).abs().mean() for i in whole])
    assert 0.1 < change.mean() < 2.0


@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_training_views_show_the_same(crop: str, photos: Split) -> None:
    config = data_config(train_crop=crop, crop_scale=0.3, decode="reduced", strong_from="resized", randaugment_ops=2)
    batches = flat(train_loader(photos, config).epoch(1))
    reference = reference_views(photos, config, 1)
    weak = by_index(batches, "weak")
    distance = distances(weak, reference, "weak")
    # Crops begin at pixels of the reduced image.
    assert distance.mean() < (1.5 if crop == "squash" else 2.0) and distance.max() < 6
    again = flat(train_loader(photos, config).epoch(1))
    for view in ("weak", "strong"):
        first, second = by_index(batches, view), by_index(again, view)
        assert all(torch.equal(first[i], second[i]) for i in first)


def test_a_small_crop_of_a_large_image_is_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view shows no fewer pixels than it has, whatever is cropped."""
    names = [f"{i}.jpg" for i in range(24)]
    for i, name in enumerate(names):
        save(photo(i, 170, 150), tmp_path / name, 1 + i % 8)
    split = make_split(tmp_path / "manifest", tmp_path, names, orientation=[1 + i % 8 for i in range(24)])
    shapes = []

    def noted(start: Ints, shape: Ints, full: Ints, reduced: tuple[int, ...]) -> tuple[Ints, Ints]:
        first, size = _scaled(start, shape, full, reduced)
        shapes.append((size.tolist(), max(reduced)))
        return first, size

    monkeypatch.setattr("spml_fast.data.cpu_views._scaled", noted)
    config = data_config(train_crop="random_resized", crop_scale=0.1, decode="reduced", strong_from="resized")
    flat(train_loader(split, config, views=("weak",)).epoch(0))
    assert {longest for _, longest in shapes} == {170, 85}
    for (height, width), longest in shapes:
        assert longest == 170 or min(height, width) >= SIDE - 1


def test_scaled_crops_stay_inside() -> None:
    full, reduced = np.array([101, 64]), (13, 8)
    for start, shape in (((0, 0), (101, 64)), ((100, 63), (1, 1)), ((50, 3), (51, 61)), ((97, 60), (4, 2))):
        first, size = _scaled(np.array(start), np.array(shape), full, reduced)
        assert (first >= 0).all() and (size >= 1).all() and (first + size <= reduced).all()
    first, size = _scaled(np.array([0, 0]), np.array([101, 64]), full, reduced)
    assert first.tolist() == [0, 0] and size.tolist() == [13, 8]


def test_shards_give_the_same_bits(photos: Split, tmp_path: Path) -> None:
    config = data_config(decode="reduced")
    packed = pack(PackOptions(manifest=photos.manifest_folder, out=tmp_path / "packed")).split("train")
    files, shards = (by_index(eval_loader(split, config), "eval") for split in (photos, packed))
    assert all(torch.equal(files[i], shards[i]) for i in files)


def test_other_images_are_those_of_dali(tmp_path: Path) -> None:
    """PNG, WebP, CMYK and a JPEG that Pillow does not decode to its end."""
    photo(0, 200, 150).save(tmp_path / "a.png")
    photo(1, 200, 150).save(tmp_path / "b.webp", lossless=True)
    photo(2, 200, 150).convert("CMYK").save(tmp_path / "c.jpg", quality=90)
    photo(3, 200, 150).convert("L").save(tmp_path / "d.jpg", quality=90)
    names = ["a.png", "b.webp", "c.jpg", "d.jpg"]
    split = make_split(tmp_path / "manifest", tmp_path, names)
    whole, reduced = (
        by_index(eval_loader(split, data_config(decode=decode)), "eval") for decode in ("full", "reduced")
    )
    assert all(torch.equal(whole[i], reduced[i]) for i in range(3))
    assert 0 < (whole[3] - reduced[3]).abs().mean() < 2.5 and torch.equal(reduced[3][0], reduced[3][2])


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_what_is_decoded() -> None:
    def nothing(_: bytes, limit: int) -> np.ndarray:
        raise RuntimeError("asked for another decoder")

    content = encoded(photo(0, 641, 480), progressive=True)
    shapes = {side: decode_reduced(content, (side, side), 10**6, nothing).shape for side in (240, 121, 60, 1)}
    assert shapes == {
        240: (240, 321, 3),
        121: (240, 321, 3),
        60: (60, 81, 3),
        1: (60, 81, 3),
    }
    with pytest.raises(RuntimeError, match="641 x 480 pixels is too large"):
        decode_reduced(content, (60, 60), 641 * 480 - 1, nothing)
    for other in (content[: len(content) // 2], content[:20], b"", b"text"):
        with pytest.raises(RuntimeError, match="asked for another"):
            decode_reduced(other, (60, 60), 10**6, nothing)
    with pytest.raises(RuntimeError, match="asked for another"):
        decode_reduced(content, (241, 241), 10**6, nothing)


@pytest.mark.parametrize("problem", ["missing", "empty", "text", "larger", "larger PNG", "larger CMYK"])
def test_bad_images_are_told_of_as_ever(problem: str, tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(12)]
    for i, name in enumerate(names):
        save(photo(i, 120, 100), tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    bad = tmp_path / "7.jpg"
    if problem == "missing":
        bad.unlink()
    elif problem.startswith("larger"):
        # The loader goes by content, not by names.
        kind, mode = ("PNG" if "PNG" in problem else "JPEG"), ("CMYK" if "CMYK" in problem else "RGB")
        photo(7, 500, 400).convert(mode).save(bad, kind)
    else:
        bad.write_bytes(b"" if problem == "empty" else b"no image")
    sentences = []
    for decode in ("full", "reduced"):
        with pytest.raises(UserError) as caught:
            list(eval_loader(split, data_config(decode=decode)))
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and "7.jpg" in sentences[1]
    config = data_config(decode="reduced", bad_images="replace")
    loader = train_loader(split, config, views=("weak",), batch_size=4)
    assert sum(batch.real for batch in flat(loader.epoch(0))) == 12 and list(loader.bad_images.reasons) == [7]


def test_decoders_that_failed_are_not_used_again(photos: Split) -> None:
    dali = reduced_decoding._Dali()
    with pytest.raises(RuntimeError):
        dali.decode(b"no image", 10**6)
    assert not dali.idle
    content = Path(photos.path(0)).read_bytes()
    size = 160 * 120
    assert dali.decode(content, size).shape == (120, 160, 3)
    (pipe,) = dali.idle
    assert np.array_equal(dali.decode(content, size), dali.decode(content, size)) and list(dali.idle) == [pipe]
    with pytest.raises(RuntimeError):
        dali.decode(content, size - 1)
    assert not dali.idle


def test_a_program_ends_as_it_wants_while_images_are_decoded(tmp_path: Path) -> None:
    """Also where an error keeps a loader."""
    names = [f"{i}.png" for i in range(40)]
    for i, name in enumerate(names):
        photo(i, 300, 200).save(tmp_path / name)
    (tmp_path / names[9]).write_bytes(b"")
    make_split(tmp_path / "manifest", tmp_path, names, sizes=[(300, 200)] * 40)
    program = """if True:
        import sys
        from spml_fast.data.manifest import Manifest
        from tests.support.loading import data_config, eval_loader

        loader = eval_loader(Manifest(sys.argv[1]).split("train"), data_config(decode="reduced", prefetch=4))
        batches = iter(loader)
        next(batches)
        if sys.argv[2] == "error":
            try:
                list(batches)
            except Exception as error:
                kept = error
        sys.exit(5)
    """
    for way in ("early", "error"):
        words = [sys.executable, "-c", program, str(tmp_path / "manifest"), way]
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 5 and "terminate" not in done.stderr, done.stderr


def test_a_process_can_be_forked_while_images_are_decoded(photos: Split) -> None:
    """As loaders of other programs do; the child has none of the threads."""
    loader = eval_loader(photos, data_config(decode="reduced"))
    views = iter(loader)
    next(views)
    child = os.fork()
    if child == 0:
        os._exit(7)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 7
    assert len(list(views)) == len(loader) - 1


def test_what_cannot_be_reduced_is_refused(photos: Split) -> None:
    with pytest.raises(UserError, match=r"changes the original ones; set data\.decode full, or data\.strong_from"):
        train_loader(photos, data_config(decode="reduced"))
    train_loader(photos, data_config(decode="reduced", randaugment_ops=0))
    train_loader(photos, data_config(decode="reduced"), views=("weak",))
    with pytest.raises(UserError, match=r"for training without a GPU.*set data\.decode full"):
        train_loader(photos, data_config(decode="reduced"), views=("weak",), device=torch.device("cuda"))


def test_caches_hold_whole_images(photos: Split, tmp_path: Path) -> None:
    config = data_config(decode="reduced", cache=str(tmp_path / "cache"))
    cached, whole = by_index(eval_loader(photos, config), "eval"), by_index(eval_loader(photos), "eval")
    assert all(torch.equal(cached[i], whole[i]) for i in whole)
