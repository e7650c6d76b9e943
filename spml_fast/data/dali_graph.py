"""The DALI graphs: on a GPU decode, resize, flip, RandAugment, normalise; without one, decode alone.

With a GPU, nvJPEG decodes and everything after it runs on the GPU; one decode serves all views of an image. Without
one, cpu_views.py makes the views, faster than DALI's operators do on the CPU, which still run the whole graph in tests.

Source: docs/sources.md#randaugment. RandAugment follows torchvision's operations on Pillow images: Pillow's blends cut
fractions off while DALI rounds, so half a grey level (less a little, so that whole values stay whole) is taken off
first. Named arguments may not come from the image itself on a GPU, so what depends on it is plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvidia.dali import fn, math, pipeline_def, types

# What is taken off a grey level before it is rounded, so that fractions are cut off.
_CUT = 0.4999


@dataclass(frozen=True)
class GraphOptions:
    """What a graph is built for.

    Attributes:
        views: the views to make, "eval", "weak" or "strong".
        image_size: width and height of the views in pixels.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        gpu: run on the GPU.
        sharded: encoded images are handed in; else their paths are.
        cached: resized images are handed in, and neither decoded nor resized.
        reduced: JPEGs are decoded at a fraction of their size, by threads (reduced_decoding.py).
        oriented: some images must be turned.
        flipped: some images are mirrored.
        cropped: images are cropped.
        randaugment_ops: RandAugment operations of the view that has them.
        randaugment_view: that view.
        randaugment_resized: it has them behind its crop and resize; else before.
        cutout: a square of the weak view is covered.
    """

    views: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gpu: bool
    sharded: bool = False
    cached: bool = False
    reduced: bool = False
    oriented: bool = False
    flipped: bool = False
    cropped: bool = False
    randaugment_ops: int = 0
    randaugment_view: str = "strong"
    randaugment_resized: bool = False
    cutout: bool = False

    @property
    def in_threads(self) -> bool:
        """Whether DALI decodes alone, and threads make the views (cpu_views.py)."""
        return not self.gpu

    @property
    def has_branches(self) -> bool:
        """Whether images of a batch take different ways: only then must DALI rewrite the code, which takes a second."""
        augmented = self.randaugment_view in self.views and self.randaugment_ops > 0
        return self.oriented or (augmented and not self.in_threads)


def _scalar(name: str, dtype: Any = types.INT32) -> Any:
    """An input with one number per image."""
    return fn.external_source(name=name, dtype=dtype, ndim=0)


def _white() -> Any:
    return types.Constant(255, dtype=types.UINT8)


def _on_device(value: Any, gpu: bool) -> Any:
    """An input where arithmetic with the image needs it."""
    return value.gpu() if gpu else value


def _grey(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _contrast(image: Any, factor: Any, gpu: bool) -> Any:
    centre = math.floor(fn.reductions.mean(_grey(image)) + 0.5)
    scale = _on_device(factor, gpu)
    return fn.cast(image * scale + (centre * (1.0 - scale) - _CUT), dtype=types.UINT8)


def _color(image: Any, factor: Any, gpu: bool) -> Any:
    grey = fn.color_space_conversion(_grey(image), image_type=types.GRAY, output_type=types.RGB)
    scale = _on_device(factor, gpu)
    return fn.cast(image * scale + (grey * (1.0 - scale) - _CUT), dtype=types.UINT8)


def _auto_contrast(image: Any) -> Any:
    low = fn.reductions.min(image, axes=[0, 1], keep_dims=True)
    width = fn.reductions.max(image, axes=[0, 1], keep_dims=True) - low
    # A channel with one value only stays as it is.
    varied = width > 0
    start = fn.cast(varied * low, dtype=types.FLOAT)
    unit = varied * (width / 255.0) + (varied ^ True) * 1.0
    return fn.cast((image - start) / unit - _CUT, dtype=types.UINT8)


def _equalize(image: Any) -> Any:
    """Pillow's equalize by OpenCV's.

    Pillow counts the pixels below a value, OpenCV those up to it: the same on the negative. Besides, Pillow divides by
    a whole number of pixels per step.
    """
    even = fn.equalize(image ^ _white()) ^ _white()
    high = fn.reductions.max(image, axes=[0, 1], keep_dims=True)
    below = fn.reductions.sum(fn.cast(image < high, dtype=types.FLOAT), axes=[0, 1], keep_dims=True)
    return _whole_step(image, even, below, math.floor(below / 255.0))


def _whole_step(image: Any, even: Any, below: Any, step: Any) -> Any:
    """Scale an equalized image to Pillow's whole step; a channel with fewer than 255 pixels to distribute is kept."""
    usable = step > 0
    scale = usable * (below / (255.0 * math.max(step, types.Constant(1.0))))
    return fn.cast(even * scale + image * (usable ^ True), dtype=types.UINT8)


def _randaugment(image: Any, step: int, gpu: bool) -> Any:
    """Apply the `step`-th operation that augment.py chose for each image."""
    op = _scalar(f"op{step}")
    factor = _scalar(f"factor{step}", types.FLOAT)
    matrix = fn.external_source(name=f"matrix{step}", dtype=types.FLOAT, ndim=2)
    kernel = fn.external_source(name=f"kernel{step}", dtype=types.FLOAT, ndim=2)
    mask, threshold = _scalar(f"mask{step}", types.UINT8), _scalar(f"threshold{step}", types.UINT8)
    # Comparisons with numbers, because this function is rewritten into a graph; the ids are those of RANDAUGMENT_OPS.
    if op > 0:
        if op <= 5:
            image = fn.warp_affine(image, matrix=matrix, inverse_map=True, interp_type=types.INTERP_NN, fill_value=0)
        elif op == 6:
            image = fn.brightness_contrast(image, brightness=factor, brightness_shift=-_CUT / 255.0)
        elif op == 7:
            image = _color(image, factor, gpu)
        elif op == 8:
            image = _contrast(image, factor, gpu)
        elif op == 9:
            # Rounded where Pillow cuts off, and mirrored at the border where Pillow leaves one row of pixels alone.
            image = fn.filter(image, _on_device(kernel, gpu))
        elif op == 10:
            image = image & _on_device(mask, gpu)
        elif op == 11:
            image = image ^ (_white() * (image >= _on_device(threshold, gpu)))
        elif op == 12:
            image = _auto_contrast(image)
        else:
            image = _equalize(image)
    return image


def _cutout(image: Any) -> Any:
    inputs = {
        name: fn.external_source(name=f"cutout_{name}", dtype=types.FLOAT, ndim=1)
        for name in ("anchor", "shape", "fill_value")
    }
    return fn.erase(image, axes=[0, 1], **inputs)


def _within_limit(encoded: Any, max_pixels: Any) -> Any:
    """The encoded image, or an error where its header claims more pixels than allowed: before memory is taken for them.

    There is no operator that fails on purpose, so the bytes of such an image are asked for with one too many.
    """
    shape = fn.peek_image_shape(encoded, dtype=types.INT64, adjust_orientation=False)
    too_large = fn.cast(shape[0] * shape[1] > max_pixels, dtype=types.INT32)
    size = fn.cast(encoded.shape(dtype=types.INT64), dtype=types.INT32)
    return fn.slice(encoded, start=size * 0, shape=size + too_large, axes=[0], out_of_bounds_policy="error")


# Inputs of `_upright`, and of the decoders of reduced images and of those that stay in memory; the views have more.
DECODING_INPUTS = frozenset(
    {"sample", "path", "encoded", "max_pixels", "smallest", "turn", "turn_horizontal", "turn_vertical"}
)


def _upright(options: GraphOptions) -> Any:
    """Read, decode and turn: uint8 [H, W, 3]."""
    if options.sharded:
        # `Stream` keeps the arrays until a batch is handed out. On a GPU it may not be finished then, so DALI copies.
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=not options.gpu)
    else:
        encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
    encoded = _within_limit(encoded, _scalar("max_pixels", types.INT64))
    image = fn.decoders.image(
        encoded, device="mixed" if options.gpu else "cpu", output_type=types.RGB, adjust_orientation=False
    )
    if options.oriented:
        # Only images that need it pay for it.
        turn = _scalar("turn")
        if turn > 0:
            if turn == 2:
                image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False)
            image = fn.flip(image, horizontal=_scalar("turn_horizontal"), vertical=_scalar("turn_vertical"))
    return image


@pipeline_def(enable_conditionals=True)
def graph(options: GraphOptions) -> Any:
    """Declare the pipeline; its inputs are those that the loaders' `_inputs` make, its outputs the views in order."""
    if options.cached:
        image = _on_device(fn.external_source(name="resized", dtype=types.UINT8, ndim=3, layout="HWC"), options.gpu)
    else:
        image = _upright(options)
    if options.in_threads:
        return image
    crop = {}
    if options.cropped:
        crop = {
            "start": fn.external_source(name="crop_start", dtype=types.INT32, ndim=1),
            "shape": fn.external_source(name="crop_shape", dtype=types.INT32, ndim=1),
        }
    outputs = []
    for view in options.views:
        out = image
        augmented = view == options.randaugment_view
        if augmented and not options.randaugment_resized:
            for step in range(options.randaugment_ops):
                out = _randaugment(out, step, options.gpu)
        if options.cropped:
            out = fn.slice(out, axes=[0, 1], **crop)
        if not options.cached:
            out = fn.resize(
                out, size=[options.image_size, options.image_size], interp_type=types.INTERP_TRIANGULAR, antialias=True
            )
        if view == "weak" and options.cutout:
            out = _cutout(out)
        if augmented and options.randaugment_resized:
            for step in range(options.randaugment_ops):
                out = _randaugment(out, step, options.gpu)
        outputs.append(
            # The mirror is free here, and the output is written once, in the layout that channels_last needs.
            fn.crop_mirror_normalize(
                out,
                mirror=_scalar(f"flip_{view}") if options.flipped else 0,
                mean=[255.0 * m for m in options.mean],
                std=[255.0 * s for s in options.std],
                output_layout="HWC",
                dtype=types.FLOAT,
            )
        )
    return tuple(outputs)


@pipeline_def
def decode_graph(limited: bool = False) -> Any:
    """Declare a pipeline that decodes alone: its input is `encoded`, its output the images uint8 [H, W, 3].

    With `limited`, `max_pixels` is another input, and an image of more pixels an error.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    if limited:
        encoded = _within_limit(encoded, _scalar("max_pixels", types.INT64))
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
