"""Runs a DALI graph some batches ahead of the training loop, and names the image that it cannot decode.

Images that are files are read by DALI's threads. Images in tar shards are read ahead by threads of shards.py, and their
bytes are handed to DALI as they are (without a copy on the CPU): the same bytes, so the same batches.
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
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from spml_fast.core import env
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.dali_graph import GraphOptions, decode_graph, graph
from spml_fast.data.manifest import Split
from spml_fast.data.shards import RESTORE_SHARD, Encoded, PendingImages, ShardReader

# Input of the graph by name: an array with one row per image, or a list of arrays.
Inputs = dict[str, Any]

# Reading threads have this many images each ahead of DALI's queue, where images are read a batch at a time.
_IMAGES_PER_THREAD = 4


def _threads(config: DataConfig) -> int:
    """Decoding threads of this rank: as configured, or an equal part of the cores this process may use."""
    if config.threads > 0:
        return config.threads
    return max(1, len(os.sched_getaffinity(0)) // env.local_world_size())


def _device_id(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@dataclass(frozen=True)
class BatchRequest:
    """One batch to make.

    Attributes:
        key: which batch it is.
        index: int64 [n] sample indices.
        item: what the loader needs when the batch is done.
        group: consecutive requests with the same group are read from shards together, in the order of the disk.
    """

    key: tuple[int, ...]
    index: npt.NDArray[np.int64]
    item: Any
    group: tuple[int, ...]


class _ReadGroup:
    """Requests whose images are read from shards together."""

    def __init__(self, requests: Sequence[BatchRequest], reader: ShardReader) -> None:
        self.requests = deque(requests)
        self.reading: PendingImages = reader.submit(np.concatenate([request.index for request in self.requests]))
        self._used = 0

    def take(self) -> tuple[BatchRequest, list[Encoded | None]]:
        """Wait for the images, and take the next request with its own. `UserError` if one cannot be read."""
        images = self.reading.result()
        request = self.requests.popleft()
        first, self._used = self._used, self._used + len(request.index)
        taken = images[first : self._used]
        # Their memory is free as soon as the batch is done, not when the group is.
        images[first : self._used] = [None] * len(taken)
        return request, taken


class Stream:
    """A DALI pipeline with batches in flight.

    Requests that are not delivered yet are remembered, so a consumer may stop anywhere: the next `run` takes over those
    that are its own and throws the rest away.

    Args:
        split: the images.
        graph_options: what the graph makes.
        inputs: request -> the graph's inputs, but for `encoded`.
        batch_size: samples of the largest batch.
        config: the `data` section of the run.
        prefetch: batches in flight.
        device: where the views are made.
        windowed: requests come in large groups, the windows of a shuffle.
    """

    def __init__(
        self,
        split: Split,
        graph_options: GraphOptions,
        inputs: Callable[[BatchRequest], Inputs],
        *,
        batch_size: int,
        config: DataConfig,
        prefetch: int,
        device: torch.device,
        windowed: bool = False,
    ) -> None:
        self._split, self._graph_options, self._inputs, self._device = split, graph_options, inputs, device
        self._prefetch = prefetch
        self._pipeline_options = {
            "batch_size": batch_size,
            "num_threads": _threads(config),
            "device_id": _device_id(device) if graph_options.gpu else None,
            "prefetch_queue_depth": prefetch,
        }
        self._pipe: Any = None
        self._flight: deque[BatchRequest] = deque()
        # Encoded images of the batches in flight, which DALI reads in place.
        self._held: deque[list[Encoded | None]] = deque()
        self._current: object = None
        self._reader = ShardReader(split.shards, config.read_threads) if split.shards is not None else None
        # Groups being read and, at the front, being used up: a window and the one after it, or some batches.
        self._ahead: deque[_ReadGroup] = deque()
        self._groups = 2 if windowed else max(2, -(-_IMAGES_PER_THREAD * config.read_threads // batch_size))

    def _source(self, requests: Iterator[BatchRequest]) -> Iterator[list[BatchRequest]]:
        """Requests that are taken together: one by one, or the groups that are read from shards."""
        if self._reader is None:
            return ([request] for request in requests)
        return (list(group) for _, group in itertools.groupby(requests, key=lambda request: request.group))

    def _take(self, source: Iterator[list[BatchRequest]]) -> list[tuple[BatchRequest, Inputs]]:
        """The next requests that DALI's queue has room for, with their inputs.

        Images that are still being read are waited for only when there is nothing else to do.
        """
        count = self._prefetch - len(self._flight)
        # A new pipeline must have its queue filled at once.
        needed = count if self._pipe is None else int(not self._flight)
        if self._reader is None:
            return [(request, self._inputs(request)) for (request,) in itertools.islice(source, count)]
        taken: list[tuple[BatchRequest, Inputs]] = []
        try:
            while len(taken) < count:
                while len(self._ahead) < self._groups and (members := next(source, None)):
                    self._ahead.append(_ReadGroup(members, self._reader))
                if not self._ahead or (len(taken) >= needed and not self._ahead[0].reading.done()):
                    break
                request, encoded = self._ahead[0].take()
                if not self._ahead[0].requests:
                    self._ahead.popleft()
                taken.append((request, {"encoded": encoded, **self._inputs(request)}))
        except UserError:
            # Read again when it is asked for again: the shard may have been restored.
            self._stop_reading()
            raise
        return taken

    def _stop_reading(self) -> None:
        while self._ahead:
            self._ahead.popleft().reading.cancel()

    def _submit(self, taken: Sequence[tuple[BatchRequest, Inputs]]) -> None:
        """Hand batches to DALI and start them."""
        first = self._pipe is None
        try:
            if first:
                self._pipe = graph(options=self._graph_options, **self._pipeline_options)
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

    def _receive(self) -> tuple[BatchRequest, tuple[Tensor, ...]]:
        """Wait for the oldest batch in flight. `UserError` if an image in flight is missing or damaged."""
        try:
            if self._graph_options.gpu:
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
        """Throw the failed pipeline away and raise `UserError` naming the image that it failed on, or else `error`."""
        flight, self._pipe = list(self._flight), None
        self._flight.clear()
        self._held.clear()
        self._stop_reading()
        index = list(dict.fromkeys(itertools.chain.from_iterable(request.index.tolist() for request in flight)))
        for sample in index:
            _check_image(self._split, sample)
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
            # An image in a batch that is not wanted any more cannot be decoded; it is named if it is wanted again.
            self._pipe = None
            self._flight.clear()
            self._held.clear()

    def run(self, requests: Iterator[BatchRequest], count: int) -> Iterator[tuple[BatchRequest, tuple[Tensor, ...]]]:
        """Yield the first `count` batches of `requests`; those after them are started ahead of the next `run`."""
        current = self._current = object()
        started = [*self._flight, *itertools.chain.from_iterable(group.requests for group in self._ahead)]
        first = list(itertools.islice(requests, len(started)))
        if [request.key for request in first] != [request.key for request in started]:
            self._discard()
            requests = itertools.chain(first, requests)
        source = self._source(requests)
        for _ in range(count):
            if self._current is not current:
                raise RuntimeError("this epoch was abandoned: the loader has been asked for another one since")
            self._submit(self._take(source))
            out = self._receive()
            # Started before the consumer computes with this batch, so that both happen at the same time.
            self._submit(self._take(source))
            yield out


def _advice(split: Split) -> str:
    """What to do about an image that cannot be read."""
    return RESTORE_SHARD if split.shards is not None else "restore it, or prepare the data again to leave it out"


def read_size(split: Split, index: int, decode: bool = False) -> tuple[int, int]:
    """Width and height as shown of an image. `UserError` if it is missing, or (with `decode`) damaged."""
    try:
        source = split.path(index) if split.shards is None else io.BytesIO(split.read(index))
        if (os.stat(source).st_size if isinstance(source, str) else len(source.getbuffer())) == 0:
            raise UserError(f"image {split.place(index)} is empty; {_advice(split)}")
        with Image.open(source) as image:
            width, height = image.size
            if decode:
                image.load()
    except FileNotFoundError as error:
        raise UserError(f"image {split.place(index)} is missing; {_advice(split)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {split.place(index)} cannot be read ({error}); {_advice(split)}") from error
    return (width, height) if split.orientation[index] < 5 else (height, width)


def _check_image(split: Split, index: int) -> None:
    """Raise `UserError` if an image is missing, unreadable, damaged, or not the one that was prepared."""
    size = read_size(split, index, decode=True)
    known = int(split.width[index]), int(split.height[index])
    if all(known) and size != known:
        raise UserError(
            f"image {split.place(index)} is {size[0]} x {size[1]} pixels now and was {known[0]} x {known[1]} when "
            f"the data were prepared; {_advice(split)}"
        )


def _check_decoding(split: Split, index: Sequence[int]) -> None:
    """Raise `UserError` naming the first of the images that Pillow may read but DALI does not."""
    pipe = decode_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipe.build()
    for sample in index:
        encoded = split.read(sample)
        try:
            pipe.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
            pipe.run()
        except RuntimeError as error:
            with Image.open(io.BytesIO(encoded)) as image:
                kind = image.format
            raise UserError(
                f"image {split.place(sample)} is a {kind} file that DALI does not decode; convert it to JPEG or PNG, "
                "or prepare the data again to leave it out"
            ) from error
