"""The loaders: images in, normalised views on the device out.

sampler.py decides which images a rank sees, and augment.py how each is changed; the loaders hand those decisions to a
DALI graph (dali_graph.py) and keep `DataConfig.prefetch` batches in flight (dali_stream.py), also from one micro-step,
update and epoch to the next.

Views, all float32 [B, 3, S, S] in channels_last memory, (value / 255 - mean) / std:
    eval    the image resized to S x S, aspect ratio ignored, antialiased triangular filter as Pillow's bilinear
    weak    crop (with `train_crop: random_resized`), resize, horizontal flip
    strong  RandAugment on the image in its own size, crop (the weak view's box), resize, a flip of its own;
            with `strong_from: resized`, RandAugment behind crop and resize
RandAugment comes before the crop, as IGNORE's released code applies it to the whole image, and both views show the
same box, so that the prediction for one view and the loss of the other are about the same content. On a GPU the graph
makes the views; without one it decodes, and threads make them (cpu_views.py).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import MicroBatch
from spml_fast.core.config import DataConfig
from spml_fast.core.progress import watched
from spml_fast.data import augment
from spml_fast.data.bad_images import BadImages, BatchRequest
from spml_fast.data.cached_stream import CachedStream
from spml_fast.data.cpu_views import CpuViews
from spml_fast.data.dali_graph import GraphOptions
from spml_fast.data.dali_stream import Inputs, Stream, decoding_threads
from spml_fast.data.decoded_images import DecodedImages, room_for
from spml_fast.data.graph_inputs import (
    encoded_paths,
    is_oriented,
    sharpness_kernels,
    shown_sizes,
    smallest_sizes,
    turns,
)
from spml_fast.data.image_cache import CacheKind, ImageCache, Pixels, open_cache
from spml_fast.data.manifest import Split
from spml_fast.data.sampler import EvalBatchIndex, EvalSampler, MicroBatchIndex, TrainSampler, Windows
from spml_fast.data.view_checks import check_views


def _own_part(world_size: int | None, rank: int | None) -> tuple[int, int]:
    """Ranks of the data-parallel group and the number of this one; None asks torch.distributed."""
    return (
        distributed.world_size() if world_size is None else world_size,
        distributed.rank() if rank is None else rank,
    )


def _to_device(index: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Sample indices as a tensor, int64 [n]."""
    tensor = torch.from_numpy(np.array(index))
    if device.type == "cuda":
        # From pinned memory the copy does not make the host wait.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _open_cache(split: Split, config: DataConfig, device: torch.device) -> ImageCache | None:
    """The resized images of a Manifest's split, where `data.cache` says so; made if need be."""
    if config.cache == "none" or split.manifest_folder is None:
        return None
    packages = ("torch", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue

    def make() -> Iterator[Pixels]:
        # Grey levels, which are whole numbers.
        grey: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
        plain = dataclasses.replace(config, cache="none", decode="full")
        for batch in EvalLoader(split, plain, batch_size=32, device=device, world_size=1, rank=0, **grey):
            levels = batch.views["eval"][: batch.real].permute(0, 2, 3, 1)
            yield levels.to(torch.uint8).cpu().numpy()

    return open_cache(config.cache, split, CacheKind(config.image_size, device.type, versions), make)


def _make_stream(
    split: Split,
    options: GraphOptions,
    inputs: Callable[[BatchRequest], Inputs],
    cache: ImageCache | None,
    decoded: DecodedImages | None,
    **more: Any,
) -> Stream | CachedStream:
    """What makes batches of a split, or of its cache.

    Args:
        split: the images.
        options: of the views.
        inputs: request -> what the views need.
        cache: the resized images; None decodes.
        decoded: the decoded images that stay in memory.
        more: further arguments of `Stream`.
    """
    if cache is None or not options.in_threads:
        return Stream(split, options, inputs, cache=cache, decoded=decoded if options.in_threads else None, **more)
    views = CpuViews(options, more["batch_size"], decoding_threads(more["config"]))
    return CachedStream(cache, views, inputs, more["prefetch"])


class TrainLoader:
    """The training views of one rank.

    Args:
        split: the images.
        config: the `data` section of the run.
        views: ("weak",) or ("weak", "strong").
        batch_size: samples of one optimizer update over all ranks and accumulation steps.
        accumulation: micro-steps of one update.
        seed: of the run; samples and augmentation follow from it and the epoch alone.
        device: where the views are made; "cuda" decodes on the GPU.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        world_size: ranks of the data-parallel group; None asks torch.distributed.
        rank: of this process in that group; None asks torch.distributed.
        make_sampler: makes the sampler from the arguments of `TrainSampler`.

    Attributes:
        sampler: which samples come when.
        updates_per_epoch: optimizer updates of one epoch.
        bad_images: the images that this rank could not use so far (`data.bad_images`).
        decoded: those that stay in memory (`data.keep_decoded`), or None.

    Raises:
        UserError: the split is too small for the ranks, its views cannot be made of cached images, the cache cannot be
            made, or (while iterating) an image is missing or damaged, and is not replaced.
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
        make_sampler: Callable[..., TrainSampler] = TrainSampler,
    ) -> None:
        check_views(views, split, config, device)
        self.split, self.config, self.views, self.seed, self.device = split, config, views, seed, device
        self.sampler = make_sampler(
            len(split),
            batch_size,
            accumulation,
            *_own_part(world_size, rank),
            seed,
            Windows(config.shuffle_window, config.shuffle_block) if config.shuffle == "window" else None,
        )
        self.updates_per_epoch = self.sampler.updates_per_epoch
        cache = _open_cache(split, config, device)
        self._graph_options = self._options(mean, std, cache is not None)
        self.decoded = room_for(split, config)
        self.bad_images = BadImages(split, config.bad_images == "replace", config.bad_image_limit)
        self._stream = _make_stream(
            split,
            self._graph_options,
            self._inputs,
            cache,
            self.decoded,
            batch_size=self.sampler.largest_micro_batch,
            config=config,
            prefetch=max(1, config.prefetch),
            device=device,
            windowed=self.sampler.windows is not None,
            bad_images=self.bad_images,
            choose=self._stand_in,
        )
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None  # of the last epoch with a replaced image

    def _options(self, mean: Sequence[float], std: Sequence[float], cached: bool) -> GraphOptions:
        """What the views are made of, and how."""
        split, config = self.split, self.config
        return GraphOptions(
            self.views,
            config.image_size,
            tuple(mean),
            tuple(std),
            gpu=self.device.type == "cuda",
            sharded=split.shards is not None,
            cached=cached,
            reduced=not cached and config.decode == "reduced",
            oriented=not cached and is_oriented(split),
            flipped=config.hflip > 0,
            cropped=config.train_crop == "random_resized",
            randaugment_ops=config.randaugment_ops if config.randaugment in self.views else 0,
            randaugment_view=config.randaugment,
            randaugment_resized=config.randaugment == "weak" or config.strong_from == "resized",
            cutout=config.cutout > 0,
        )

    def _stand_in(self, request: BatchRequest, place: int, attempt: int) -> int:
        """Sample that takes the place of a bad one: of the same position in the update after it, or in a later one."""
        epoch, update, step = request.key
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.sampler.permutation(epoch)
        item: MicroBatchIndex = request.item
        row = self.sampler.stand_in_row(epoch, update, step, item.offset + place, attempt)
        return int(self._order[1][row])

    def _inputs(self, request: BatchRequest) -> Inputs:
        epoch, index, graph = request.key[0], request.index, self._graph_options
        inputs = {} if graph.cached else encoded_paths(self.split, index)
        if graph.oriented:
            inputs |= turns(self.split, index)
        if graph.flipped:
            for view in graph.views:
                flips = augment.flips(self.seed, epoch, index, view, self.config.hflip)
                inputs[f"flip_{view}"] = flips.astype(np.int32)
        if graph.cropped or (graph.randaugment_ops and not graph.randaugment_resized):
            width, height = shown_sizes(self.split, index)
        if graph.cropped:
            box = augment.crop_boxes(self.seed, epoch, index, width, height, self.config.crop_scale)
            inputs["crop_start"], inputs["crop_shape"] = box[:, :2].copy(), box[:, 2:].copy()
            if graph.reduced:
                inputs["full_shape"] = np.stack([height, width], 1)
        if graph.reduced:
            seen = inputs.get("crop_shape"), inputs.get("full_shape")
            inputs["smallest"] = smallest_sizes(self.split, index, graph.image_size, *seen)
        if graph.cutout:
            anchor, shape, colour = augment.cutouts(self.seed, epoch, index, graph.image_size, self.config.cutout)
            inputs |= {"cutout_anchor": anchor, "cutout_shape": shape, "cutout_fill_value": colour}
        if graph.randaugment_ops:
            if graph.randaugment_resized:
                width = height = np.full(len(index), graph.image_size)
            inputs |= self._operations(epoch, index, width, height)
        return inputs

    def _operations(
        self, epoch: int, index: npt.NDArray[np.int64], width: npt.NDArray[np.int64], height: npt.NDArray[np.int64]
    ) -> Inputs:
        """What RandAugment does to images, whose sides int64 [n] are those of the image that it changes."""
        graph, magnitude = self._graph_options, self.config.randaugment_magnitude
        inputs: Inputs = {}
        ops, signs = augment.randaugment_choice(self.seed, epoch, index, graph.randaugment_ops)
        for step in range(graph.randaugment_ops):
            op, sign = ops[:, step].copy(), signs[:, step]
            factor = augment.randaugment_factor(magnitude, sign)
            inputs[f"op{step}"] = op
            inputs[f"factor{step}"] = factor
            matrix = augment.randaugment_matrices(op, sign, magnitude, width, height)
            inputs[f"matrix{step}"] = matrix if graph.in_threads else matrix.astype(np.float32)
            inputs[f"kernel{step}"] = sharpness_kernels(factor)
            inputs[f"mask{step}"] = np.full(len(index), augment.posterize_mask(magnitude), np.uint8)
            inputs[f"threshold{step}"] = np.full(len(index), augment.solarize_threshold(magnitude), np.uint8)
        return inputs

    def _requests(self, epoch: int, start_update: int) -> Iterator[BatchRequest]:
        """All micro-batches from that update on, without end: epochs follow each other without a pause."""
        for current in itertools.count(epoch):
            start = start_update if current == epoch else 0
            for update, micro in enumerate(self.sampler.epoch(current, start), start):
                window = self.sampler.window(current, update)
                for step, batch in enumerate(micro):
                    key = (current, update, step)
                    yield BatchRequest(key, batch.index, batch, key if window is None else (current, window))

    def epoch(self, epoch: int, start_update: int = 0) -> Iterator[list[MicroBatch]]:
        """Yield the updates of `epoch` from `start_update` on: `accumulation` micro-batches each.

        The iterator may be left at any point. Starting another epoch ends this one.
        """
        steps = self.sampler.accumulation
        batches = self._stream.run(
            self._requests(epoch, start_update), max(0, self.updates_per_epoch - start_update) * steps
        )
        micro: list[MicroBatch] = []
        for request, tensors in batches:
            item: MicroBatchIndex = request.item
            views = dict(zip(self.views, tensors, strict=True))
            # Labels follow the images that are shown, which may stand in for others.
            index = _to_device(request.index, self.device)
            micro.append(MicroBatch(views, index, len(item.index), item.global_size, item.update_size))
            if len(micro) == steps:
                yield micro
                micro = []


class EvalLoader:
    """The evaluation views of one rank: every sample once over all ranks, padded batches, view "eval".

    Args:
        split: the images.
        config: the `data` section of the run.
        batch_size: samples of one batch of one rank.
        device: where the views are made.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        world_size: ranks of the data-parallel group; None asks torch.distributed.
        rank: of this process in that group; None asks torch.distributed.
        bad_images: those of a training split that is scored; another image is scored in the place of each. None stops
            at the first one: figures over fewer images would be other figures.
        decoded: the split's images that are in memory, which those that are decoded join; None keeps none.

    Raises:
        UserError: the split is empty, its cache cannot be made, or (while iterating) an image is missing or damaged.
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
        bad_images: BadImages | None = None,
        decoded: DecodedImages | None = None,
    ) -> None:
        self.split, self.device = split, device
        self.sampler = EvalSampler(
            len(split),
            batch_size,
            *_own_part(world_size, rank),
        )
        cache = _open_cache(split, config, device)
        self._graph_options = GraphOptions(
            ("eval",),
            config.image_size,
            tuple(mean),
            tuple(std),
            gpu=device.type == "cuda",
            sharded=split.shards is not None,
            cached=cache is not None,
            # A GPU decodes whole images.
            reduced=cache is None and config.decode == "reduced" and device.type != "cuda",
            oriented=cache is None and is_oriented(split),
        )
        self._stream = _make_stream(
            split,
            self._graph_options,
            self._inputs,
            cache,
            decoded,
            batch_size=min(batch_size, len(split)),
            config=config,
            # DALI wants its queue filled at the start, and an evaluation may be shorter than the queue.
            prefetch=min(max(1, config.prefetch), len(self.sampler)),
            device=device,
            bad_images=bad_images,
            choose=self._neighbour,
        )

    def _neighbour(self, request: BatchRequest, place: int, attempt: int) -> int:
        """Sample that is scored in the place of a bad one."""
        return (int(request.item.index[place]) + attempt) % len(self.split)

    def __len__(self) -> int:
        return len(self.sampler)

    def watched(self, task: str | None) -> AbstractContextManager[Iterator[MicroBatch]]:
        """The batches; inside, rank 0 shows how many images of all ranks are done (`task`; None shows nothing)."""
        shown = task is not None and distributed.is_main()
        return watched(self, task or "", enabled=shown, total=len(self.split), size=lambda batch: batch.global_size)

    def _inputs(self, request: BatchRequest) -> Inputs:
        inputs = {} if self._graph_options.cached else encoded_paths(self.split, request.index)
        if self._graph_options.oriented:
            inputs |= turns(self.split, request.index)
        if self._graph_options.reduced:
            inputs["smallest"] = smallest_sizes(self.split, request.index, self._graph_options.image_size)
        return inputs

    def __iter__(self) -> Iterator[MicroBatch]:
        requests = (BatchRequest((j,), b.index[: max(1, b.real)], b, (j,)) for j, b in enumerate(self.sampler))
        for request, (tensor,) in self._stream.run(requests, len(self.sampler)):
            batch: EvalBatchIndex = request.item
            missing = len(batch.index) - len(tensor)
            if missing:
                # The last view is repeated, not decoded again.
                tensor = torch.cat([tensor, tensor[-1:].expand(missing, -1, -1, -1)])
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            index = _to_device(batch.index, self.device)
            yield MicroBatch({"eval": tensor}, index, batch.real, batch.global_size, batch.global_size)
