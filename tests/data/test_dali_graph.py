"""The views against Pillow and torchvision, those that threads make and those of the whole DALI graph; its GPU form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image, ImageOps
from torch import Tensor

from spml_fast.core.config import DataConfig
from spml_fast.data import augment, dali_graph
from spml_fast.data.graph_inputs import is_oriented
from spml_fast.data.manifest import Split
from tests.support.loading import (
    CPU,
    SIDE,
    by_index,
    data_config,
    distances,
    eval_loader,
    flat,
    make_photos,
    reference_views,
    train_loader,
)
from tests.support.paths import need_data
from tests.support.pil import make_split, photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("source", ["generated", "coco_mini"])
def test_eval_view_is_pillows_bilinear(source, photos, tmp_path):
    split, side = photos, SIDE
    if source == "coco_mini":
        root = need_data("coco_mini", "images")
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))[:24]
        split, side = make_split(tmp_path / "manifest", root, names), 224
    config = data_config(image_size=side)
    ours = by_index(eval_loader(split, config), "eval")
    distance = distances(ours, reference_views(split, config), "eval")
    assert sorted(ours) == list(range(len(split)))
    assert distance.mean() < 0.5 and distance.max() < 1.0


@pytest.mark.parametrize("strong_from", ["original", "resized"])
@pytest.mark.parametrize("crop", ["squash", "random_resized"])
@pytest.mark.parametrize("arithmetic", ["cpu", "gpu"])
def test_training_views_are_torchvisions(arithmetic, crop, strong_from, photos, monkeypatch):
    if arithmetic == "gpu":
        _use_dali_alone(monkeypatch)
    config = data_config(train_crop=crop, crop_scale=0.3, strong_from=strong_from)
    loader = train_loader(photos, config)
    for epoch in range(2):
        batches = flat(loader.epoch(epoch))
        reference = reference_views(photos, config, epoch)
        weak, strong = by_index(batches, "weak"), by_index(batches, "strong")
        assert sorted(weak) == list(range(len(photos)))
        assert distances(weak, reference, "weak").max() < 1.0
        assert distances(strong, reference, "strong").mean() < 1.0
        assert distances(strong, reference, "strong").max() < 2.5


def _use_dali_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the graph that is meant for the GPU on the CPU: DALI makes the views."""
    monkeypatch.setattr(dali_graph.GraphOptions, "in_threads", False)


def _one_op(split: Split, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Distances when sample i gets operation i % 14 once, with a minus sign from 14 on."""

    def choice(seed, epoch, index, num_ops):
        index = np.asarray(index)
        ops = (index % 14).astype(np.int32)[:, None]
        signed = (ops >= 1) & (ops <= 9)
        return ops, np.where(signed & (index[:, None] >= 14), -1, 1).astype(np.int32)

    monkeypatch.setattr(augment, "randaugment_choice", choice)
    strong = by_index(flat(train_loader(split, config).epoch(0)), "strong")
    return distances(strong, reference_views(split, config), "strong")


@pytest.mark.parametrize("magnitude, arithmetic", [(5, "cpu"), (15, "cpu"), (30, "cpu"), (9, "gpu"), (30, "gpu")])
def test_every_randaugment_operation_is_torchvisions(magnitude, arithmetic, tmp_path, monkeypatch):
    if arithmetic == "gpu":
        _use_dali_alone(monkeypatch)
    # At their own size images are not blurred by the resize, so every pixel of the operation is compared.
    names = [f"{i}.png" for i in range(28)]
    for i, name in enumerate(names):
        photo(i % 14, 96, 96).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = data_config(image_size=96, randaugment_ops=1, randaugment_magnitude=magnitude, hflip=0.0)
    distance = _one_op(split, config, monkeypatch)
    # A rotation by an angle that no float holds exactly moves single pixels of the nearest-pixel rule.
    allowed = torch.tensor([0.6 if i % 14 in (5, 9) else 0.35 if i % 14 == 13 else 0.1 for i in range(28)])
    assert (distance <= allowed).all(), list(zip(augment.RANDAUGMENT_OPS * 2, distance.tolist(), strict=True))


def test_randaugment_of_other_shapes(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(28)]
    for i, name in enumerate(names):
        photo(i, 60 + 7 * i, 150 - 4 * i).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = data_config(randaugment_ops=1, randaugment_magnitude=9)
    assert _one_op(split, config, monkeypatch).max() < 1.0


@pytest.mark.parametrize("arithmetic", ["cpu", "gpu"])
def test_equalize_and_autocontrast_of_poor_images(arithmetic, tmp_path, monkeypatch):
    """Flat images, images that are nearly all white, and single pixels: Pillow's special cases."""
    if arithmetic == "gpu":
        _use_dali_alone(monkeypatch)
    rng = np.random.default_rng(0)
    one_value = np.full((40, 40, 3), 77, np.uint8)
    few = np.full((40, 40, 3), 255, np.uint8)
    few[:10, :10] = rng.integers(0, 255, (10, 10, 3))
    some = np.full((40, 40, 3), 255, np.uint8)
    some[:20, :30] = rng.integers(0, 255, (20, 30, 3))
    dark = rng.integers(20, 60, (40, 40, 3), dtype=np.uint8)
    images = [one_value, few, some, dark, rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)]
    names = [f"{i}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = data_config(image_size=40, randaugment_ops=1)
    for op in (12, 13):
        monkeypatch.setattr(
            augment,
            "randaugment_choice",
            lambda seed, epoch, index, num_ops, op=op: (
                np.full((len(index), 1), op, np.int32),
                np.ones((len(index), 1), np.int32),
            ),
        )
        strong = by_index(flat(train_loader(split, config).epoch(0)), "strong")
        assert distances(strong, reference_views(split, config), "strong").max() < 0.6


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips(hflip, photos):
    plain = by_index(eval_loader(photos), "eval")
    weak = by_index(flat(train_loader(photos, data_config(hflip=hflip), views=("weak",)).epoch(0)), "weak")
    for i, ours in weak.items():
        torch.testing.assert_close(ours, plain[i].flip(-1) if hflip else plain[i], rtol=0, atol=0)


def test_both_views_without_operations_differ_by_their_flips(photos):
    batches = flat(train_loader(photos, data_config(randaugment_ops=0)).epoch(3))
    weak, strong = by_index(batches, "weak"), by_index(batches, "strong")
    flips = [augment.flips(5, 3, np.arange(len(photos)), view, 0.5) for view in ("weak", "strong")]
    assert (flips[0] != flips[1]).any() and (flips[0] == flips[1]).any()
    for i in weak:
        assert torch.equal(weak[i], strong[i].flip(-1) if flips[0][i] != flips[1][i] else strong[i])


def test_all_orientations(tmp_path):
    names, upright = [f"{i}.jpg" for i in range(1, 9)], []
    for turn, name in enumerate(names, 1):
        exif = Image.Exif()
        exif[0x0112] = turn
        photo(turn, 90, 60).save(tmp_path / name, quality=95, exif=exif)
        with Image.open(tmp_path / name) as stored:
            upright.append(
                ImageOps.exif_transpose(stored).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            )
    split = make_split(tmp_path / "manifest", tmp_path, names, orientation=list(range(1, 9)))
    assert split.width.tolist() == [90] * 4 + [60] * 4
    ours = by_index(eval_loader(split), "eval")
    for i, image in enumerate(upright):
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (ours[i] - expected).abs().mean() < 1.0, i + 1
    # Augmentation and crops are of the image as shown.
    config = data_config(train_crop="random_resized")
    batches = flat(train_loader(split, config).epoch(0))
    for view in ("weak", "strong"):
        assert distances(by_index(batches, view), reference_views(split, config), view).max() < 2.0
    # The Manifest decides: where it says 1, the file's own tag is not looked at.
    plain = make_split(tmp_path / "plain", tmp_path, names)
    raw = by_index(eval_loader(plain), "eval")
    assert (raw[7] - ours[7]).abs().mean() > 5
    assert not is_oriented(plain) and is_oriented(split)


def test_normalisation_and_memory_layout(photos):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    raw = next(iter(eval_loader(photos))).views["eval"]
    ours = next(iter(eval_loader(photos, mean=mean, std=std))).views["eval"]
    expected = (raw / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    train = flat(train_loader(photos).epoch(0))[-1].views
    padded = list(eval_loader(photos, batch_size=20))[-1].views["eval"]
    for view in (ours, train["weak"], train["strong"], padded):
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.stride() == (3 * SIDE * SIDE, 1, 3 * SIDE, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_gpu_makes_the_same_views(crop, photos):
    config = data_config(train_crop=crop)
    device = torch.device("cuda")
    on_cpu, on_gpu = ([*flat(train_loader(photos, config, device=d).epoch(0))] for d in (CPU, device))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.index.device.type == "cuda" and torch.equal(ours.index.cpu(), theirs.index)
        for name, view in ours.views.items():
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert (view.cpu() - theirs.views[name]).abs().mean() < 2.0
    pairs = zip(eval_loader(photos, device=device), eval_loader(photos), strict=True)
    assert all((a.views["eval"].cpu() - b.views["eval"]).abs().mean() < 2.0 for a, b in pairs)


@pytest.mark.parametrize("full", [False, True])
def test_gpu_graph_holds_together(full):
    """Declared without a GPU: every operator exists there, images stay there, and its numbers come from the CPU."""
    options = dali_graph.GraphOptions(("weak", "strong"), SIDE, (0.5,) * 3, (0.2,) * 3, gpu=True)
    if full:
        options = dataclasses.replace(
            options, sharded=True, oriented=True, flipped=True, cropped=True, randaugment_ops=2
        )
    graph = dali_graph.graph(options, batch_size=4, num_threads=1, device_id=0)
    graph._build_graph()
    known = {
        "cpu": backend.RegisteredCPUOps(),
        "gpu": backend.RegisteredGPUOps(),
        "mixed": backend.RegisteredMixedOps(),
    }
    devices = set()
    for instance in graph._ops:
        name, device, spec = instance._op.schema.Name(), instance._op.device, instance.spec
        devices.add(device)
        assert name in known[device], f"{name} does not exist on the {device}"
        given = [spec.InputDevice(i) for i in range(spec.NumInput())]
        regular, numbers = given[: spec.NumRegularInput()], given[spec.NumRegularInput() :]
        assert set(regular) <= ({"gpu"} if device == "gpu" else {"cpu"}), f"{name} on the {device} takes {given}"
        assert set(numbers) <= {"cpu"}, f"{name} on the {device} takes {given}"
    assert devices == {"cpu", "gpu", "mixed"}
    assert [node.device for node in graph._graph_outputs] == ["gpu", "gpu"]


def test_formats_and_modes_are_pillows_rgb(tmp_path):
    base = photo(1, 60, 44)
    clear = base.copy()
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    written = {
        "progressive.jpg": (base, {"progressive": True}),
        "grey.jpg": (base.convert("L"), {}),
        "cmyk.jpg": (base.convert("CMYK"), {}),
        "alpha.png": (clear, {}),
        "palette.png": (base.quantize(64), {}),
        "palette_clear.png": (base.quantize(64), {"transparency": 3}),
        "grey_alpha.png": (clear.convert("LA"), {}),
        "bits.png": (base.convert("1"), {}),
        "lossy.webp": (base, {}),
        "alpha.webp": (clear, {"lossless": True}),
        "plain.bmp": (base, {}),
        "plain.tif": (base, {}),
        "lzw.tif": (base, {"compression": "tiff_lzw"}),
    }
    for name, (image, options) in written.items():
        image.save(tmp_path / name, **options)
    split = make_split(tmp_path / "manifest", tmp_path, list(written))
    distance = distances(by_index(eval_loader(split), "eval"), reference_views(split), "eval")
    assert distance.max() < 1.0, dict(zip(written, distance.tolist(), strict=True))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    """Pillow clips 16-bit grey to white when asked for RGB; here the high byte is what one sees."""
    grey = np.array(photo(1, 60, 44).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "flat.png")
    split = make_split(tmp_path / "manifest", tmp_path, ["deep.png", "flat.png"])
    ours = by_index(eval_loader(split), "eval")
    assert (ours[0] - ours[1]).abs().max() <= 1
