"""The DALI pipeline against Pillow and torchvision, and what it promises about batches, resume and bad files."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image, ImageOps
from torch import Tensor

from spml_fast.core.batch import MicroBatch
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import augment, dali_graph, dali_stream
from spml_fast.data import loader as loaders
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Split
from tests.support.paths import need_data
from tests.support.pil import ReferenceViews, make_split, photo

CPU = torch.device("cpu")
# Views in grey levels.
GREY = {"device": CPU, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
SIDE = 48
SIZES = [(160, 120), (90, 130), (64, 64), (200, 77), (48, 48), (33, 150)]


def _config(**changes) -> DataConfig:
    return DataConfig(**{"image_size": SIDE, "threads": 2, **changes})


def _train(split: Split, config: DataConfig | None = None, **changes) -> TrainLoader:
    options = {"views": ("weak", "strong"), "batch_size": 8, "accumulation": 1, "seed": 5, "world_size": 1, "rank": 0}
    return TrainLoader(split, config or _config(), **{**options, **GREY, **changes})


def _eval(split: Split, config: DataConfig | None = None, **changes) -> EvalLoader:
    return EvalLoader(split, config or _config(), **{"batch_size": 4, "world_size": 1, "rank": 0, **GREY, **changes})


def _by_index(batches, view: str) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for views in batches:
        for position in range(views.real):
            index = int(views.index[position])
            assert index not in found
            found[index] = views.views[view][position].clone()
    return found


def _flat(updates) -> list[MicroBatch]:
    return list(itertools.chain.from_iterable(updates))


def _distance(ours: dict[int, Tensor], reference: ReferenceViews, view: str) -> Tensor:
    """Mean distance in grey levels per sample, in index order."""
    return torch.stack([(ours[i] - reference.view(reference.image(i), view, i)).abs().mean() for i in sorted(ours)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    """29 noisy JPEG images of several sizes; the last batches are smaller."""
    root = tmp_path_factory.mktemp("photos")
    names = []
    for i in range(29):
        names.append(f"{i}.jpg")
        photo(i, *SIZES[i % len(SIZES)]).save(root / names[-1], quality=92)
    return make_split(root / "manifest", root, names)


def _reference(split: Split, config: DataConfig | None = None, epoch: int = 0, seed: int = 5) -> ReferenceViews:
    return ReferenceViews(split, config or _config(), ("eval",), seed, epoch, GREY["mean"], GREY["std"])


# --- Views against Pillow and torchvision ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["generated", "coco_mini"])
def test_eval_view_is_pillows_bilinear(source, photos, tmp_path):
    split, side = photos, SIDE
    if source == "coco_mini":
        root = need_data("coco_mini", "images")
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))[:24]
        split, side = make_split(tmp_path / "manifest", root, names), 224
    config = _config(image_size=side)
    ours = _by_index(_eval(split, config), "eval")
    distance = _distance(ours, _reference(split, config), "eval")
    assert sorted(ours) == list(range(len(split)))
    assert distance.mean() < 0.5 and distance.max() < 1.0


@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_training_views_are_torchvisions(crop, photos):
    config = _config(train_crop=crop, crop_scale=0.3)
    loader = _train(photos, config)
    for epoch in range(2):
        batches = _flat(loader.epoch(epoch))
        reference = _reference(photos, config, epoch)
        weak, strong = _by_index(batches, "weak"), _by_index(batches, "strong")
        assert sorted(weak) == list(range(len(photos)))
        assert _distance(weak, reference, "weak").max() < 1.0
        assert _distance(strong, reference, "strong").mean() < 1.0
        assert _distance(strong, reference, "strong").max() < 2.5


def _use_gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the expressions that are meant for the GPU on the CPU."""
    randaugment = dali_graph._randaugment

    def forced(image, step, gpu):
        return randaugment(image, step, True)

    monkeypatch.setattr(dali_graph, "_randaugment", forced)
    monkeypatch.setattr(dali_graph, "_placed", lambda value, gpu: value)


def _one_op(split: Split, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Distances when sample i gets operation i % 14 once, with a minus sign from 14 on."""

    def choice(seed, epoch, index, num_ops):
        index = np.asarray(index)
        ops = (index % 14).astype(np.int32)[:, None]
        signed = (ops >= 1) & (ops <= 9)
        return ops, np.where(signed & (index[:, None] >= 14), -1, 1).astype(np.int32)

    monkeypatch.setattr(augment, "randaugment_choice", choice)
    strong = _by_index(_flat(_train(split, config).epoch(0)), "strong")
    return _distance(strong, _reference(split, config), "strong")


@pytest.mark.parametrize("magnitude, arithmetic", [(5, "cpu"), (15, "cpu"), (30, "cpu"), (9, "gpu"), (30, "gpu")])
def test_every_randaugment_operation_is_torchvisions(magnitude, arithmetic, tmp_path, monkeypatch):
    if arithmetic == "gpu":
        _use_gpu_arithmetic(monkeypatch)
    # At their own size images are not blurred by the resize, so every pixel of the operation is compared.
    names = [f"{i}.png" for i in range(28)]
    for i, name in enumerate(names):
        photo(i % 14, 96, 96).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = _config(image_size=96, randaugment_ops=1, randaugment_magnitude=magnitude, hflip=0.0)
    distance = _one_op(split, config, monkeypatch)
    # A rotation by an angle that no float holds exactly moves single pixels of the nearest-pixel rule.
    allowed = torch.tensor([0.6 if i % 14 in (5, 9) else 0.35 if i % 14 == 13 else 0.1 for i in range(28)])
    assert (distance <= allowed).all(), list(zip(augment.RANDAUGMENT_OPS * 2, distance.tolist(), strict=True))


def test_randaugment_of_other_shapes(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(28)]
    for i, name in enumerate(names):
        photo(i, 60 + 7 * i, 150 - 4 * i).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = _config(randaugment_ops=1, randaugment_magnitude=9)
    assert _one_op(split, config, monkeypatch).max() < 1.0


@pytest.mark.parametrize("arithmetic", ["cpu", "gpu"])
def test_equalize_and_autocontrast_of_poor_images(arithmetic, tmp_path, monkeypatch):
    """Flat images, images that are nearly all white, and single pixels: Pillow's special cases."""
    if arithmetic == "gpu":
        _use_gpu_arithmetic(monkeypatch)
    rng = np.random.default_rng(0)
    flat = np.full((40, 40, 3), 77, np.uint8)
    few = np.full((40, 40, 3), 255, np.uint8)
    few[:10, :10] = rng.integers(0, 255, (10, 10, 3))
    some = np.full((40, 40, 3), 255, np.uint8)
    some[:20, :30] = rng.integers(0, 255, (20, 30, 3))
    dark = rng.integers(20, 60, (40, 40, 3), dtype=np.uint8)
    images = [flat, few, some, dark, rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)]
    names = [f"{i}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    split = make_split(tmp_path / "manifest", tmp_path, names)
    config = _config(image_size=40, randaugment_ops=1)
    for op in (12, 13):
        monkeypatch.setattr(
            augment,
            "randaugment_choice",
            lambda seed, epoch, index, num_ops, op=op: (
                np.full((len(index), 1), op, np.int32),
                np.ones((len(index), 1), np.int32),
            ),
        )
        strong = _by_index(_flat(_train(split, config).epoch(0)), "strong")
        assert _distance(strong, _reference(split, config), "strong").max() < 0.6


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips(hflip, photos):
    plain = _by_index(_eval(photos), "eval")
    weak = _by_index(_flat(_train(photos, _config(hflip=hflip), views=("weak",)).epoch(0)), "weak")
    for i, ours in weak.items():
        torch.testing.assert_close(ours, plain[i].flip(-1) if hflip else plain[i], rtol=0, atol=0)


def test_both_views_without_operations_differ_by_their_flips(photos):
    batches = _flat(_train(photos, _config(randaugment_ops=0)).epoch(3))
    weak, strong = _by_index(batches, "weak"), _by_index(batches, "strong")
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
    ours = _by_index(_eval(split), "eval")
    for i, image in enumerate(upright):
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (ours[i] - expected).abs().mean() < 1.0, i + 1
    # Augmentation and crops are of the image as shown.
    config = _config(train_crop="random_resized")
    batches = _flat(_train(split, config).epoch(0))
    for view in ("weak", "strong"):
        assert _distance(_by_index(batches, view), _reference(split, config), view).max() < 2.0
    # The Manifest decides: where it says 1, the file's own tag is not looked at.
    plain = make_split(tmp_path / "plain", tmp_path, names)
    raw = _by_index(_eval(plain), "eval")
    assert (raw[7] - ours[7]).abs().mean() > 5
    assert not loaders._is_oriented(plain) and loaders._is_oriented(split)


def test_normalisation_and_memory_layout(photos):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    raw = next(iter(_eval(photos))).views["eval"]
    ours = next(iter(_eval(photos, mean=mean, std=std))).views["eval"]
    expected = (raw / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    train = _flat(_train(photos).epoch(0))[-1].views
    padded = list(_eval(photos, batch_size=20))[-1].views["eval"]
    for view in (ours, train["weak"], train["strong"], padded):
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.stride() == (3 * SIDE * SIDE, 1, 3 * SIDE, 3)


# --- Who sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_evaluation(world, photos):
    single = {tuple(v.index.tolist()): v.views["eval"].clone() for v in _eval(photos)}
    loaders = [_eval(photos, world_size=world, rank=r) for r in range(world)]
    for _ in range(2):
        seen: list[int] = []
        for step in zip(*loaders, strict=True):
            for views in step:
                assert views.views["eval"].shape == (4, 3, SIDE, SIDE) and views.index.dtype == torch.int64
                assert views.global_size == sum(v.real for v in step)
                seen += views.index[: views.real].tolist()
                if views.real:
                    assert torch.equal(views.views["eval"], single[tuple(views.index.tolist())])
        assert sorted(seen) == list(range(len(photos)))


@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_two_ranks_make_the_views_of_one(crop, photos):
    config = _config(train_crop=crop)
    one = _flat(_train(photos, config, accumulation=1).epoch(1))
    two = [_flat(_train(photos, config, accumulation=2, world_size=2, rank=r).epoch(1)) for r in range(2)]
    for view in ("weak", "strong"):
        alone, shared = _by_index(one, view), _by_index(two[0] + two[1], view)
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[i], shared[i]) for i in alone)
    # Four micro-batches of two images each make an update of eight.
    assert [(v.real, v.global_size, v.update_size) for v in two[0][:2]] == [(2, 4, 8)] * 2
    first = torch.cat([two[0][0].index, two[1][0].index, two[0][1].index, two[1][1].index])
    assert torch.equal(first, one[0].index)


def test_resume_gives_the_rest_of_the_epoch(photos):
    whole = list(_train(photos, accumulation=2).epoch(4))
    rest = list(_train(photos, accumulation=2).epoch(4, start_update=1))
    assert len(whole) == len(rest) + 1 == _train(photos).updates_per_epoch
    for theirs, ours in zip(_flat(whole[1:]), _flat(rest), strict=True):
        assert torch.equal(theirs.index, ours.index)
        assert all(torch.equal(theirs.views[name], ours.views[name]) for name in ("weak", "strong"))


def test_an_epoch_may_be_left_at_any_point(photos):
    fresh = {epoch: [v.index.tolist() for v in _flat(_train(photos).epoch(epoch))] for epoch in range(3)}
    expected = _by_index(_flat(_train(photos).epoch(2)), "strong")
    loader = _train(photos)
    left = loader.epoch(0)
    next(left)
    left.close()
    abandoned = loader.epoch(1)
    assert next(abandoned)[0].index.tolist() == fresh[1][0]
    # Going on where the consumer stopped, and again from the start.
    assert [u[0].index.tolist() for u in loader.epoch(1, 1)] == fresh[1][1:]
    assert [u[0].index.tolist() for u in loader.epoch(1)] == fresh[1]
    with pytest.raises(RuntimeError, match="abandoned"):
        next(abandoned)
    ours = _by_index(_flat(loader.epoch(2)), "strong")
    assert all(torch.equal(ours[i], expected[i]) for i in expected)
    evaluation = _eval(photos)
    for _ in range(2):
        next(iter(evaluation))
    assert len(_by_index(evaluation, "eval")) == len(photos)


def test_batches_stay_in_flight(photos):
    loader = _train(photos, _config(prefetch=3), accumulation=2)
    last = loader.updates_per_epoch - 1
    for update, _ in enumerate(loader.epoch(0)):
        flight = [request.key for request in loader._stream._flight]
        assert len(flight) == 3
        # What follows the last update is the next epoch.
        assert flight[0] == ((0, update + 1, 0) if update < last else (1, 0, 0))
    first = next(loader.epoch(1))
    assert first[0].index.tolist() == next(_train(photos, accumulation=2).epoch(1))[0].index.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("crop", ["squash", "random_resized"])
def test_gpu_makes_the_same_views(crop, photos):
    config = _config(train_crop=crop)
    device = torch.device("cuda")
    here, there = ([*_flat(_train(photos, config, device=d).epoch(0))] for d in (CPU, device))
    for ours, theirs in zip(there, here, strict=True):
        assert ours.index.device.type == "cuda" and torch.equal(ours.index.cpu(), theirs.index)
        for name, view in ours.views.items():
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert (view.cpu() - theirs.views[name]).abs().mean() < 2.0
    pairs = zip(_eval(photos, device=device), _eval(photos), strict=True)
    assert all((a.views["eval"].cpu() - b.views["eval"]).abs().mean() < 2.0 for a, b in pairs)


@pytest.mark.parametrize("full", [False, True])
def test_gpu_graph_holds_together(full):
    """Declared without a GPU: every operator exists there, images stay there, and its numbers come from the CPU."""
    plan = dali_graph.Plan(("weak", "strong"), SIDE, (0.5,) * 3, (0.2,) * 3, gpu=True)
    if full:
        plan = dataclasses.replace(plan, sharded=True, oriented=True, flipped=True, cropped=True, randaugment_ops=2)
    graph = dali_graph.graph(plan, batch_size=4, num_threads=1, device_id=0)
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


def test_views_outlive_later_batches(photos):
    loader = _train(photos)
    kept = [(v, v.views["weak"].clone()) for v in _flat(loader.epoch(0))]
    list(loader.epoch(1))
    assert all(torch.equal(v.views["weak"], copy) for v, copy in kept)


def test_batch_of_one(photos):
    views = _flat(_train(photos, batch_size=1).epoch(0))
    assert len(views) == len(photos) and views[0].views["weak"].shape == (1, 3, SIDE, SIDE)
    assert len(list(_eval(photos, batch_size=1))) == len(photos)


def test_a_split_of_one_image(tmp_path):
    photo(0).save(tmp_path / "only.jpg")
    split = make_split(tmp_path / "manifest", tmp_path, ["only.jpg"])
    assert len(_flat(_train(split, batch_size=16).epoch(0))) == 1
    (views,) = _eval(split, batch_size=16)
    assert views.real == 1 and views.views["eval"].shape[0] == 16


# --- Files -----------------------------------------------------------------------------------------------------------


def test_awkward_names(tmp_path):
    names = ["with space.jpg", "été 日本.jpg", os.fsdecode(b"not \xff utf8.jpg"), "sub/quote'\".jpg"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), os.fsencode(name)), "wb") as file:
            photo(i).save(file, "JPEG")
    split = make_split(tmp_path / "manifest", tmp_path, names, sizes=[(160, 120)] * len(names))
    ours = _by_index(_eval(split), "eval")
    assert _distance(ours, _reference(split), "eval").max() < 1.0


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
    distance = _distance(_by_index(_eval(split), "eval"), _reference(split), "eval")
    assert distance.max() < 1.0, dict(zip(written, distance.tolist(), strict=True))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    """Pillow clips 16-bit grey to white when asked for RGB; here the high byte is what one sees."""
    grey = np.array(photo(1, 60, 44).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "flat.png")
    split = make_split(tmp_path / "manifest", tmp_path, ["deep.png", "flat.png"])
    ours = _by_index(_eval(split), "eval")
    assert (ours[0] - ours[1]).abs().max() <= 1


def _spoiled(tmp_path: Path, photos: Split, spoil) -> Split:
    """A copy of some photographs, prepared and then spoiled at sample 13."""
    names = [f"{i} ü.jpg" for i in range(20)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(Path(photos.path(i)).read_bytes())
    split = make_split(tmp_path / "manifest", tmp_path, names)
    spoil(tmp_path / names[13])
    return split


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _shrink(path: Path) -> None:
    photo(3, 9, 7).save(path)


def _to_gif(path: Path) -> None:
    with Image.open(path) as image:
        size = image.size
    photo(3, *size).save(path, "GIF")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (_remove, "is missing; restore it, or prepare the data again"),
        (_truncate, "cannot be read .*; restore it, or prepare the data again"),
        (_empty, "is empty; restore it"),
        (_to_gif, "is a GIF file that DALI does not decode; convert it"),
    ],
)
def test_bad_images_are_named(spoil, says, tmp_path, photos):
    split = _spoiled(tmp_path, photos, spoil)
    with pytest.raises(UserError, match=rf"13 ü\.jpg {says}"):
        list(_eval(split))
    loader = _train(split)
    with pytest.raises(UserError, match=rf"13 ü\.jpg {says}"):
        list(loader.epoch(0))
    # The loader lives on: put right, the next epoch runs.
    (tmp_path / "13 ü.jpg").write_bytes(Path(photos.path(13)).read_bytes())
    assert len(_by_index(_flat(loader.epoch(1)), "weak")) == 20


def test_a_replaced_image_is_named_where_its_size_matters(tmp_path, photos):
    split = _spoiled(tmp_path, photos, _shrink)
    with pytest.raises(UserError, match=r"13 ü\.jpg is 9 x 7 pixels now and was 90 x 130"):
        list(_train(split, _config(train_crop="random_resized"), views=("weak",)).epoch(0))


def test_sizes_that_preparation_did_not_read(photos):
    names = [photos.relative_path(i) for i in range(len(photos))]
    folder = photos.folder.parent.with_name("unread")
    unread = make_split(folder, Path(photos.image_root), names, sizes=[(0, 0)] * len(names))
    config = _config(train_crop="random_resized")
    known, ours = (_by_index(_flat(_train(s, config).epoch(0)), "strong") for s in (photos, unread))
    assert all(torch.equal(known[i], ours[i]) for i in known)


def test_threads_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert dali_stream._threads(DataConfig(threads=3)) == 3
    assert dali_stream._threads(DataConfig()) == 12
    for ranks, threads in (("4", 3), ("8", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert dali_stream._threads(DataConfig()) == threads


def test_unknown_views_are_refused(photos):
    with pytest.raises(ValueError, match="strong"):
        _train(photos, views=("strong",))
