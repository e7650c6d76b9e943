"""The input pipeline: pictures in, normalised views on the device out. The only file that imports nvidia.dali.

`order.py` decides which pictures a rank sees and how each is changed; this file hands those decisions to a DALI
pipeline through `fn.external_source` and keeps `DataConfig.prefetch` batches in flight, also from one micro-step,
update and epoch to the next. One decode serves all views of a picture. With a GPU, nvJPEG decodes and everything after
it runs on the GPU; without one the same pipeline runs on the CPU.

Pictures that are files are read by DALI's threads. Pictures in tar shards are read ahead by threads of `shards.py`,
and their bytes are handed to DALI as they are (without a copy on the CPU): the same bytes, so the same batches.

Views, all float32 [B, 3, S, S] in channels_last memory, (value / 255 - mean) / std:
    eval    the picture resized to S x S, aspect ratio ignored, antialiased triangular filter as Pillow's bilinear
    weak    crop (with `train_crop: random_resized`), resize, horizontal flip
    strong  RandAugment on the picture in its own size, crop (the weak view's box), resize, a flip of its own
RandAugment comes before the crop, as IGNORE's released code applies it to the whole picture, and both views show the
same box, so that what one view's prediction says about the other is about the same content.
"""

from __future__ import annotations

import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from spml_fast.core import distributed
from spml_fast.core.batch import Views
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import sampler
from spml_fast.data.manifest import Split
from spml_fast.data.shards import MEND as _MEND_SHARD
from spml_fast.data.shards import Encoded, Reading, ShardReader

Inputs = dict[str, Any]


def _threads(config: DataConfig) -> int:
    """Decoding threads of this rank: as configured, or an even share of the cores this process may use."""
    if config.threads > 0:
        return config.threads
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _device_id(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# --- The graph -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a pipeline is built for."""

    views: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gpu: bool
    sharded: bool = False
    oriented: bool = False
    flipped: bool = False
    cropped: bool = False
    randaugment_ops: int = 0


def _scalar(name: str, dtype: Any = types.INT32) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=0)


# RandAugment. Pillow's blends cut fractions off while DALI rounds, so half a grey level (less a little, so that whole
# values stay whole) is taken off first. Every operation has a branch for the CPU where named arguments may come from
# the picture itself, which is faster; on the GPU they may not, and plain arithmetic does the same.
_CUT = 0.4999
# From this many pixels a step on, Pillow's whole-number step changes no value by more than a grey level.
_FINE_STEP = 255.0


def _white() -> Any:
    return types.Constant(255, dtype=types.UINT8)


def _placed(value: Any, gpu: bool) -> Any:
    """A number of the sample where arithmetic with the picture needs it."""
    return value.gpu() if gpu else value


def _grey(picture: Any) -> Any:
    return fn.color_space_conversion(picture, image_type=types.RGB, output_type=types.GRAY)


def _contrast(picture: Any, factor: Any, gpu: bool) -> Any:
    centre = math.floor(fn.reductions.mean(_grey(picture)) + 0.5)
    if gpu:
        scale = _placed(factor, gpu)
        return fn.cast(picture * scale + (centre * (1.0 - scale) - _CUT), dtype=types.UINT8)
    return fn.brightness_contrast(
        picture, contrast=factor, contrast_center=centre, brightness_shift=-_CUT / 255.0, dtype=types.UINT8
    )


def _color(picture: Any, factor: Any, gpu: bool) -> Any:
    grey = fn.color_space_conversion(_grey(picture), image_type=types.GRAY, output_type=types.RGB)
    scale = _placed(factor, gpu)
    return fn.cast(picture * scale + (grey * (1.0 - scale) - _CUT), dtype=types.UINT8)


def _auto_contrast(picture: Any, gpu: bool) -> Any:
    low = fn.reductions.min(picture, axes=[0, 1], keep_dims=True)
    width = fn.reductions.max(picture, axes=[0, 1], keep_dims=True) - low
    # A channel with one value only stays as it is.
    varied = width > 0
    start = fn.cast(varied * low, dtype=types.FLOAT)
    unit = varied * (width / 255.0) + (varied ^ True) * 1.0
    if gpu:
        return fn.cast((picture - start) / unit - _CUT, dtype=types.UINT8)
    return fn.normalize(picture, mean=start, stddev=unit, shift=-_CUT, dtype=types.UINT8, axes=[0, 1])


def _equalize(picture: Any, gpu: bool) -> Any:
    """Pillow's equalize by OpenCV's.

    Pillow counts the pixels below a value, OpenCV those up to it: the same thing on the negative. What is left is that
    Pillow divides by a whole number of pixels a step, which is put right where it shows.
    """
    even = fn.equalize(picture ^ _white()) ^ _white()
    high = fn.reductions.max(picture, axes=[0, 1], keep_dims=True)
    below = fn.reductions.sum(fn.cast(picture < high, dtype=types.FLOAT), axes=[0, 1], keep_dims=True)
    step = math.floor(below / 255.0)
    if gpu:
        return _whole_step(picture, even, below, step)
    if fn.reductions.min(step) < _FINE_STEP:
        even = _whole_step(picture, even, below, step)
    return even


def _whole_step(picture: Any, even: Any, below: Any, step: Any) -> Any:
    """Scale an equalized picture to Pillow's whole step; a channel with fewer than 255 pixels to share out is kept."""
    usable = step > 0
    scale = usable * (below / (255.0 * math.max(step, types.Constant(1.0))))
    return fn.cast(even * scale + picture * (usable ^ True), dtype=types.UINT8)


def _randaugment(picture: Any, step: int, gpu: bool) -> Any:
    """Apply the `step`-th operation that order.py chose for each picture."""
    op = _scalar(f"op{step}")
    factor = _scalar(f"factor{step}", types.FLOAT)
    matrix = fn.external_source(name=f"matrix{step}", dtype=types.FLOAT, ndim=2)
    kernel = fn.external_source(name=f"kernel{step}", dtype=types.FLOAT, ndim=2)
    mask, threshold = _scalar(f"mask{step}", types.UINT8), _scalar(f"threshold{step}", types.UINT8)
    # Comparisons with numbers, because this function is rewritten into a graph; the ids are those of RANDAUGMENT_OPS.
    if op > 0:
        if op <= 5:
            picture = fn.warp_affine(
                picture, matrix=matrix, inverse_map=True, interp_type=types.INTERP_NN, fill_value=0
            )
        elif op == 6:
            picture = fn.brightness_contrast(picture, brightness=factor, brightness_shift=-_CUT / 255.0)
        elif op == 7:
            picture = _color(picture, factor, gpu)
        elif op == 8:
            picture = _contrast(picture, factor, gpu)
        elif op == 9:
            # Rounded where Pillow cuts off, and mirrored at the border where Pillow leaves one row of pixels alone.
            picture = fn.filter(picture, _placed(kernel, gpu))
        elif op == 10:
            picture = picture & _placed(mask, gpu)
        elif op == 11:
            picture = picture ^ (_white() * (picture >= _placed(threshold, gpu)))
        elif op == 12:
            picture = _auto_contrast(picture, gpu)
        else:
            picture = _equalize(picture, gpu)
    return picture


@pipeline_def(enable_conditionals=True)
def _graph(plan: _Plan) -> Any:
    """Declare the pipeline; its inputs are those that the loaders' `_inputs` make, its outputs the views in order."""
    if plan.sharded:
        # `_Stream` keeps the arrays until a batch is handed out. On a GPU it may not be finished then, so DALI copies.
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=not plan.gpu)
    else:
        encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
    picture = fn.decoders.image(
        encoded, device="mixed" if plan.gpu else "cpu", output_type=types.RGB, adjust_orientation=False
    )
    if plan.oriented:
        # Only pictures that need it pay for it.
        turn = _scalar("turn")
        if turn > 0:
            if turn == 2:
                picture = fn.transpose(picture, perm=[1, 0, 2], transpose_layout=False)
            picture = fn.flip(picture, horizontal=_scalar("turn_horizontal"), vertical=_scalar("turn_vertical"))
    if plan.cropped:
        crop_start = fn.external_source(name="crop_start", dtype=types.INT32, ndim=1)
        crop_shape = fn.external_source(name="crop_shape", dtype=types.INT32, ndim=1)
    outputs = []
    for view in plan.views:
        out = picture
        if view == "strong":
            for step in range(plan.randaugment_ops):
                out = _randaugment(out, step, plan.gpu)
        if plan.cropped:
            out = fn.slice(out, start=crop_start, shape=crop_shape, axes=[0, 1])
        out = fn.resize(
            out, size=[plan.image_size, plan.image_size], interp_type=types.INTERP_TRIANGULAR, antialias=True
        )
        outputs.append(
            # The mirror is free here, and the output is written once, in the layout that channels_last needs.
            fn.crop_mirror_normalize(
                out,
                mirror=_scalar(f"flip_{view}") if plan.flipped else 0,
                mean=[255.0 * m for m in plan.mean],
                std=[255.0 * s for s in plan.std],
                output_layout="HWC",
                dtype=types.FLOAT,
            )
        )
    return tuple(outputs)


# --- Feeding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """One batch to make.

    Attributes:
        key: which batch it is.
        index: int64 [n] sample indices.
        item: what the loader needs when the batch is done.
        group: requests in a row with the same group are read from shards together, in the order of the disk.
    """

    key: tuple[int, ...]
    index: npt.NDArray[np.int64]
    item: Any
    group: tuple[int, ...]


class _Group:
    """Requests whose pictures are read from shards together."""

    def __init__(self, requests: Sequence[_Request], reader: ShardReader) -> None:
        self.requests = deque(requests)
        self.reading: Reading = reader.submit(np.concatenate([request.index for request in self.requests]))
        self._used = 0

    def take(self) -> tuple[_Request, list[Encoded | None]]:
        """Wait for the pictures, and take the next request with its own. `UserError` if one cannot be read."""
        pictures = self.reading.result()
        request = self.requests.popleft()
        first, self._used = self._used, self._used + len(request.index)
        taken = pictures[first : self._used]
        # Their memory is free as soon as the batch is done, not when the group is.
        pictures[first : self._used] = [None] * len(taken)
        return request, taken


# Reading threads have this many pictures each ahead of DALI's queue, where pictures are read a batch at a time.
_AHEAD = 4


class _Stream:
    """A DALI pipeline with batches in flight.

    What was asked for and not yet delivered is remembered here, so a consumer may stop anywhere: the next `run` takes
    over what fits its own requests and throws the rest away.
    """

    def __init__(
        self,
        split: Split,
        plan: _Plan,
        inputs: Callable[[_Request], Inputs],
        *,
        batch_size: int,
        config: DataConfig,
        prefetch: int,
        device: torch.device,
        windowed: bool = False,
    ) -> None:
        self._split, self._plan, self._inputs, self._device = split, plan, inputs, device
        self._prefetch = prefetch
        self._options = {
            "batch_size": batch_size,
            "num_threads": _threads(config),
            "device_id": _device_id(device) if plan.gpu else None,
            "prefetch_queue_depth": prefetch,
        }
        self._pipe: Any = None
        self._flight: deque[_Request] = deque()
        # Encoded pictures of the batches in flight, which DALI reads in place.
        self._held: deque[list[Encoded | None]] = deque()
        self._current: object = None
        self._reader = ShardReader(split.shards, config.read_threads) if split.shards is not None else None
        # Groups being read and, at the front, being used up: a window and the one after it, or some batches.
        self._ahead: deque[_Group] = deque()
        self._groups = 2 if windowed else max(2, -(-_AHEAD * config.read_threads // batch_size))

    def _source(self, requests: Iterator[_Request]) -> Iterator[list[_Request]]:
        """Requests that are taken together: one by one, or the groups that are read from shards."""
        if self._reader is None:
            return ([request] for request in requests)
        return (list(group) for _, group in itertools.groupby(requests, key=lambda request: request.group))

    def _take(self, source: Iterator[list[_Request]]) -> list[tuple[_Request, Inputs]]:
        """The next requests that DALI's queue has room for, with what it is fed for them.

        Pictures that are still being read are waited for only when there is nothing else to do.
        """
        count = self._prefetch - len(self._flight)
        # A new pipeline must have its queue filled at once.
        needed = count if self._pipe is None else int(not self._flight)
        if self._reader is None:
            return [(request, self._inputs(request)) for (request,) in itertools.islice(source, count)]
        taken: list[tuple[_Request, Inputs]] = []
        try:
            while len(taken) < count:
                while len(self._ahead) < self._groups and (members := next(source, None)):
                    self._ahead.append(_Group(members, self._reader))
                if not self._ahead or (len(taken) >= needed and not self._ahead[0].reading.done()):
                    break
                request, encoded = self._ahead[0].take()
                if not self._ahead[0].requests:
                    self._ahead.popleft()
                taken.append((request, {"encoded": encoded, **self._inputs(request)}))
        except UserError:
            # Read again when it is asked for again: the shard may have been put right.
            self._stop_reading()
            raise
        return taken

    def _stop_reading(self) -> None:
        while self._ahead:
            self._ahead.popleft().reading.cancel()

    def _submit(self, taken: Sequence[tuple[_Request, Inputs]]) -> None:
        """Hand batches to DALI and start them."""
        first = self._pipe is None
        try:
            if first:
                self._pipe = _graph(plan=self._plan, **self._options)
                self._pipe.build()
            for request, arrays in taken:
                for name, value in arrays.items():
                    self._pipe.feed_input(name, value)
                self._flight.append(request)
                self._held.append(arrays.get("encoded", []))
            # The first run of a pipeline starts as many batches as its queue is deep; each later one starts one.
            for _ in range(1 if first else len(taken)):
                self._pipe.schedule_run()
        except RuntimeError as error:
            self._fail(error)

    def _receive(self) -> tuple[_Request, tuple[Tensor, ...]]:
        """Wait for the oldest batch in flight. `UserError` if a picture in flight is missing or damaged."""
        try:
            if self._plan.gpu:
                shared = self._pipe.share_outputs(cuda_stream=torch.cuda.current_stream(self._device))
            else:
                shared = self._pipe.share_outputs()
            # The tensors keep DALI's memory alive; releasing only tells the executor that there is room again.
            views = tuple(from_dlpack(out.as_tensor()).permute(0, 3, 1, 2) for out in shared)
            self._pipe.release_outputs()
        except RuntimeError as error:
            self._fail(error)
        self._held.popleft()
        return self._flight.popleft(), views

    def _fail(self, error: RuntimeError) -> NoReturn:
        """Throw the dead pipeline away and say which picture killed it; the error itself if none did."""
        flight, self._pipe = list(self._flight), None
        self._flight.clear()
        self._held.clear()
        self._stop_reading()
        index = list(dict.fromkeys(itertools.chain.from_iterable(request.index.tolist() for request in flight)))
        for sample in index:
            _check_picture(self._split, sample)
        _check_decoding(self._split, index)
        raise error

    def _discard(self) -> None:
        """Wait for everything in flight and throw it away."""
        self._stop_reading()
        try:
            while self._flight:
                self._pipe.share_outputs()
                self._pipe.release_outputs()
                self._held.popleft()
                self._flight.popleft()
        except RuntimeError:
            # A bad picture in a batch that nobody asks for any more; it will be named if it is asked for again.
            self._pipe = None
            self._flight.clear()
            self._held.clear()

    def run(self, requests: Iterator[_Request], count: int) -> Iterator[tuple[_Request, tuple[Tensor, ...]]]:
        """Yield the first `count` batches of `requests`; those after them are started ahead of the next `run`."""
        ticket = self._current = object()
        known = [*self._flight, *itertools.chain.from_iterable(group.requests for group in self._ahead)]
        taken = list(itertools.islice(requests, len(known)))
        if [r.key for r in taken] != [r.key for r in known]:
            self._discard()
            requests = itertools.chain(taken, requests)
        source = self._source(requests)
        for _ in range(count):
            if self._current is not ticket:
                raise RuntimeError("this epoch was abandoned: the loader has been asked for another one since")
            self._submit(self._take(source))
            out = self._receive()
            # Started before the consumer gets to work, so that decoding goes on meanwhile.
            self._submit(self._take(source))
            yield out


def _mend(split: Split) -> str:
    return _MEND_SHARD if split.shards is not None else "restore it, or prepare the data again to leave it out"


def _read_size(split: Split, index: int, decode: bool = False) -> tuple[int, int]:
    """Width and height as shown of a picture. `UserError` if it is missing, or (with `decode`) damaged."""
    try:
        source = split.path(index) if split.shards is None else io.BytesIO(split.read(index))
        if (os.stat(source).st_size if isinstance(source, str) else len(source.getbuffer())) == 0:
            raise UserError(f"picture {split.place(index)} is empty; {_mend(split)}")
        with Image.open(source) as picture:
            width, height = picture.size
            if decode:
                picture.load()
    except FileNotFoundError as error:
        raise UserError(f"picture {split.place(index)} is missing; {_mend(split)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {split.place(index)} cannot be read ({error}); {_mend(split)}") from error
    return (width, height) if split.orientation[index] < 5 else (height, width)


def _check_picture(split: Split, index: int) -> None:
    """Raise `UserError` if a picture is missing, unreadable, damaged, or not the one that was prepared."""
    size = _read_size(split, index, decode=True)
    known = int(split.width[index]), int(split.height[index])
    if all(known) and size != known:
        raise UserError(
            f"picture {split.place(index)} is {size[0]} x {size[1]} pixels now and was {known[0]} x {known[1]} when "
            f"the data were prepared; {_mend(split)}"
        )


@pipeline_def
def _decode_graph() -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)


def _check_decoding(split: Split, index: Sequence[int]) -> None:
    """Raise `UserError` naming the first of the pictures that Pillow may read but DALI does not."""
    pipe = _decode_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipe.build()
    for sample in index:
        encoded = split.read(sample)
        try:
            pipe.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
            pipe.run()
        except RuntimeError as error:
            with Image.open(io.BytesIO(encoded)) as picture:
                kind = picture.format
            raise UserError(
                f"picture {split.place(sample)} is a {kind} file that DALI does not decode; convert it to JPEG or PNG, "
                "or prepare the data again to leave it out"
            ) from error


def _paths(split: Split, index: npt.NDArray[np.int64]) -> Inputs:
    """File names as DALI wants them: bytes, whatever they are. Nothing where `_Stream` hands in the pictures."""
    if split.shards is not None:
        return {}
    return {"path": [np.frombuffer(split.path(i).encode("utf-8", "surrogateescape"), np.uint8) for i in index.tolist()]}


def _is_oriented(split: Split) -> bool:
    """Whether any picture of the split has to be turned."""
    return bool((split.orientation != 1).any())


# EXIF orientation 1..8 as an optional swap of rows and columns and then mirrors: (turn: 0 nothing, 1 mirrors only,
# 2 swap and mirrors; mirror horizontally; mirror vertically).
_TURNS = np.array(
    [(0, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (2, 0, 0), (2, 1, 0), (2, 1, 1), (2, 0, 1)], np.int32
)


def _turns(split: Split, index: npt.NDArray[np.int64]) -> Inputs:
    turns = _TURNS[np.asarray(split.orientation[index])]
    return {
        name: np.ascontiguousarray(turns[:, k]) for k, name in enumerate(("turn", "turn_horizontal", "turn_vertical"))
    }


def _sharpness_kernels(factor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Filters that blend a picture with Pillow's smoothed one, float32 [n, 3, 3]."""
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
    same = np.zeros((3, 3), np.float32)
    same[1, 1] = 1
    return factor[:, None, None] * same + (1 - factor)[:, None, None] * smooth


def _sizes(split: Split, index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Widths and heights as shown, int64 [n] each; data prepared without looking at the pictures are looked at here."""
    width, height = split.width[index].astype(np.int64), split.height[index].astype(np.int64)
    for position in np.flatnonzero((width <= 0) | (height <= 0)).tolist():
        sample = int(index[position])
        width[position], height[position] = _read_size(split, sample)
    return width, height


def _to_device(index: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.array(index))
    if device.type == "cuda":
        # From pinned memory the copy does not make the host wait.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class TrainLoader:
    """The training views of one rank.

    Args:
        split: the pictures.
        config: the `data` section of the run.
        views: ("weak",) or ("weak", "strong").
        batch_size: samples of one optimizer update over all ranks and accumulation steps.
        accumulation: micro-steps of one update.
        seed: of the run; order and augmentation follow from it and the epoch alone.
        device: where the views are made; "cuda" decodes on the GPU.
        mean, std: per channel, in 0..1.
        world_size, rank: of the data-parallel group; None asks torch.distributed.
        make_order: gives the order to follow from the arguments of `TrainOrder`.

    Attributes:
        order: the `TrainOrder` followed.
        updates_per_epoch: optimizer updates of one epoch.

    Raises:
        UserError: the split is too small for the ranks, or (while iterating) a picture is missing or damaged.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        *,
        views: tuple[str, ...],
        batch_size: int,
        accumulation: int,
        seed: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        world_size: int | None = None,
        rank: int | None = None,
        make_order: Callable[..., sampler.TrainOrder] = sampler.TrainOrder,
    ) -> None:
        if views not in (("weak",), ("weak", "strong")):
            raise ValueError(f"views {views!r}")
        self.split, self.config, self.views, self.seed, self.device = split, config, views, seed, device
        self.order = make_order(
            len(split),
            batch_size,
            accumulation,
            distributed.world_size() if world_size is None else world_size,
            distributed.rank() if rank is None else rank,
            seed,
            sampler.Windows(config.shuffle_window, config.shuffle_block) if config.shuffle == "window" else None,
        )
        self.updates_per_epoch = self.order.updates_per_epoch
        self._plan = _Plan(
            views,
            config.image_size,
            tuple(mean),
            tuple(std),
            gpu=device.type == "cuda",
            sharded=split.shards is not None,
            oriented=_is_oriented(split),
            flipped=config.hflip > 0,
            cropped=config.train_crop == "random_resized",
            randaugment_ops=config.randaugment_ops if "strong" in views else 0,
        )
        self._stream = _Stream(
            split,
            self._plan,
            self._inputs,
            batch_size=self.order.largest_micro_batch,
            config=config,
            prefetch=max(1, config.prefetch),
            device=device,
            windowed=self.order.windows is not None,
        )

    def _inputs(self, request: _Request) -> Inputs:
        epoch, index, plan = request.key[0], request.index, self._plan
        inputs = _paths(self.split, index)
        if plan.oriented:
            inputs |= _turns(self.split, index)
        if plan.flipped:
            for view in plan.views:
                flips = sampler.flips(self.seed, epoch, index, view, self.config.hflip)
                inputs[f"flip_{view}"] = flips.astype(np.int32)
        if plan.cropped or plan.randaugment_ops:
            width, height = _sizes(self.split, index)
        if plan.cropped:
            box = sampler.crop_boxes(self.seed, epoch, index, width, height, self.config.crop_scale)
            inputs["crop_start"], inputs["crop_shape"] = box[:, :2].copy(), box[:, 2:].copy()
        if plan.randaugment_ops:
            magnitude = self.config.randaugment_magnitude
            ops, signs = sampler.randaugment_choice(self.seed, epoch, index, plan.randaugment_ops)
            for step in range(plan.randaugment_ops):
                op, sign = ops[:, step].copy(), signs[:, step]
                factor = sampler.randaugment_factor(magnitude, sign)
                inputs[f"op{step}"] = op
                inputs[f"factor{step}"] = factor
                inputs[f"matrix{step}"] = sampler.randaugment_matrices(op, sign, magnitude, width, height)
                inputs[f"kernel{step}"] = _sharpness_kernels(factor)
                inputs[f"mask{step}"] = np.full(len(index), sampler.posterize_mask(magnitude), np.uint8)
                inputs[f"threshold{step}"] = np.full(len(index), sampler.solarize_threshold(magnitude), np.uint8)
        return inputs

    def _requests(self, epoch: int, start_update: int) -> Iterator[_Request]:
        """All micro-batches from there on, without end: what follows an epoch is started while its tail is used."""
        for current in itertools.count(epoch):
            start = start_update if current == epoch else 0
            for update, micro in enumerate(self.order.epoch(current, start), start):
                window = self.order.window(update)
                for step, batch in enumerate(micro):
                    key = (current, update, step)
                    yield _Request(key, batch.index, batch, key if window is None else (current, window))

    def epoch(self, epoch: int, start_update: int = 0) -> Iterator[list[Views]]:
        """Yield the updates of `epoch` from `start_update` on: `accumulation` micro-batches each.

        The iterator may be left at any point. Starting another epoch ends this one.
        """
        steps = self.order.accumulation
        batches = self._stream.run(
            self._requests(epoch, start_update), max(0, self.updates_per_epoch - start_update) * steps
        )
        micro: list[Views] = []
        for request, tensors in batches:
            item: sampler.MicroBatch = request.item
            views = dict(zip(self.views, tensors, strict=True))
            index = _to_device(item.index, self.device)
            micro.append(Views(views, index, len(item.index), item.global_size, item.update_size))
            if len(micro) == steps:
                yield micro
                micro = []


class EvalLoader:
    """The evaluation views of one rank: every sample once over all ranks, padded batches, view "eval".

    Args:
        split, config, device, mean, std, world_size, rank: as in `TrainLoader`.
        batch_size: samples of one batch of one rank.

    Raises:
        UserError: the split is empty, or (while iterating) a picture is missing or damaged.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        *,
        batch_size: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.split, self.device = split, device
        self.order = sampler.EvalOrder(
            len(split),
            batch_size,
            distributed.world_size() if world_size is None else world_size,
            distributed.rank() if rank is None else rank,
        )
        self._plan = _Plan(
            ("eval",),
            config.image_size,
            tuple(mean),
            tuple(std),
            gpu=device.type == "cuda",
            sharded=split.shards is not None,
            oriented=_is_oriented(split),
        )
        self._stream = _Stream(
            split,
            self._plan,
            self._inputs,
            batch_size=min(batch_size, len(split)),
            config=config,
            # DALI wants its queue filled at the start, and an evaluation may be shorter than the queue.
            prefetch=min(max(1, config.prefetch), len(self.order)),
            device=device,
        )

    def __len__(self) -> int:
        return len(self.order)

    def _inputs(self, request: _Request) -> Inputs:
        inputs = _paths(self.split, request.index)
        if self._plan.oriented:
            inputs |= _turns(self.split, request.index)
        return inputs

    def __iter__(self) -> Iterator[Views]:
        requests = (_Request((j,), b.index[: max(1, b.real)], b, (j,)) for j, b in enumerate(self.order))
        for request, (tensor,) in self._stream.run(requests, len(self.order)):
            batch: sampler.EvalBatch = request.item
            missing = len(batch.index) - len(tensor)
            if missing:
                # Padding is repeated here, not decoded again.
                tensor = torch.cat([tensor, tensor[-1:].expand(missing, -1, -1, -1)])
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            index = _to_device(batch.index, self.device)
            yield Views({"eval": tensor}, index, batch.real, batch.global_size, batch.global_size)
