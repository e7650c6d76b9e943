"""What threads make of decoded images: Pillow's resize, memory that is used again, errors that arrive."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.data import cpu_views
from spml_fast.data.cpu_views import CpuViews
from spml_fast.data.dali_graph import GraphOptions
from tests.support.pil import photo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("size", [(640, 480), (150, 33), (448, 448), (17, 300), (1, 1)])
@pytest.mark.parametrize("side", [64, 224])
def test_the_resize_is_pillows(size, side):
    image = photo(1, *size)
    ours = cpu_views._resized(np.array(image), side)
    theirs = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(ours - theirs)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    assert difference.max() <= 1
    # Tall images Pillow resizes in the other order, first the columns and then the rows.
    assert difference.mean() < (0.25 if size == (17, 300) else 0.02)


def _views(**options) -> CpuViews:
    return CpuViews(GraphOptions(("eval",), 8, MEAN, STD, gpu=False, **options), 3, 2)


def _pixels(place: int) -> np.ndarray:
    return np.array(photo(place, 8, 8))


def test_normalisation():
    (batch,) = _views().submit(_pixels, 3, {}).result()
    expected = torch.stack([torch.from_numpy(_pixels(i)) for i in range(3)]).permute(0, 3, 1, 2) / 255
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("job_bytes", [1, 5 * 8 * 8 * 3 * 4, 1 << 18])
def test_images_that_share_a_job(job_bytes, monkeypatch):
    """However many images a job makes, each becomes what it becomes alone."""
    monkeypatch.setattr(cpu_views, "_JOB_BYTES", job_bytes)
    flips = {"flip_weak": np.arange(67) % 2, "flip_strong": np.arange(67) % 3 == 0}
    views = CpuViews(GraphOptions(("weak", "strong"), 8, MEAN, STD, gpu=False, flipped=True), 67, 2)
    pending = views.submit(_pixels, 67, flips)
    assert len(pending._futures) == {1: 67, 1 << 18: 9}.get(job_bytes, 14)
    batches = [batch.clone() for batch in pending.result()]
    for place in range(67):
        own = {name: values[place:] for name, values in flips.items()}
        alone = views.submit(lambda _, place=place: _pixels(place), 1, own).result()
        for batch, image in zip(batches, alone, strict=True):
            assert torch.equal(batch[place], image[0])


def test_memory_is_used_again_when_nobody_has_it():
    views = _views()
    (first,) = views.submit(_pixels, 3, {}).result()
    place = first.data_ptr()
    (second,) = views.submit(_pixels, 2, {}).result()
    assert second.data_ptr() != place
    # Any tensor of it holds it, and what was computed from it does not.
    part, mean = first[1:], float(first.mean())
    del first
    (third,) = views.submit(_pixels, 3, {}).result()
    assert third.data_ptr() != place and float(third.mean()) == mean
    del part
    (fourth,) = views.submit(_pixels, 3, {}).result()
    assert fourth.data_ptr() == place
    # Consumers that keep everything get new memory every time, and no more is kept for them.
    kept = [views.submit(_pixels, 3, {}).result()[0] for _ in range(10)]
    assert len({batch.data_ptr() for batch in kept}) == 10
    assert len(views._batches[0]._kept) == cpu_views._KEPT


@pytest.mark.parametrize("fewer", [0, 1])
def test_memory_in_use_is_never_given_again(fewer, monkeypatch):
    """Versions of Python count differently: from 3.14 on a loop and a call hold no reference of their own."""

    def count(batch: object) -> int:
        # One is of this function.
        return sys.getrefcount(batch) - 1 - fewer

    monkeypatch.setattr(cpu_views, "sys", SimpleNamespace(getrefcount=count))
    views = _views()
    (first,) = views.submit(_pixels, 3, {}).result()
    (second,) = views.submit(_pixels, 3, {}).result()
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    del first
    assert views.submit(_pixels, 3, {}).result()[0].data_ptr() == place


def test_errors_arrive():
    def broken(place: int) -> np.ndarray:
        if place == 1:
            raise ZeroDivisionError
        return _pixels(place)

    with pytest.raises(ZeroDivisionError):
        _views().submit(broken, 3, {}).result()
    inputs = {"crop_start": np.array([[0, 0]] * 3), "crop_shape": np.array([[8, 8], [9, 8], [8, 8]])}
    with pytest.raises(RuntimeError, match="a crop of 8 x 9 pixels lies outside"):
        _views(cropped=True).submit(_pixels, 3, inputs).result()
