"""Runs a DALI graph some batches ahead of the training loop, and names the image that it cannot decode.

Where the graph decodes alone, what it decoded goes to the threads of cpu_views.py, one batch ahead of the consumer;
DALI decodes the batches behind it at the same time. With `data.decode reduced` threads decode in its place.

Images that are files are read by DALI's threads. Images in tar shards are read ahead by threads of shards.py, and their
bytes are handed to DALI as they are (without a copy on the CPU): the same bytes, so the same batches.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from spml_fast.core import env
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError, is_out_of_memory
from spml_fast.core.io import require_regular
from spml_fast.core.spans import DECODING, VIEWS, span
from spml_fast.data.bad_images import (
    BadImages,
    BatchRequest,
    Choice,
    NoReplacementError,
    advice,
    find_bad,
    find_unreadable,
    pixel_limits,
)
from spml_fast.data.cpu_views import CpuViews, PendingViews
from spml_fast.data.dali_graph import DECODING_INPUTS, GraphOptions, graph
from spml_fast.data.decoded_images import DecodedImages, KeepingDecoder
from spml_fast.data.image_cache import ImageCache
from spml_fast.data.manifest import Split
from spml_fast.data.pipelines import built
from spml_fast.data.read_retry import RETRY_PAUSES, may_pass
from spml_fast.data.reduced_decoding import ReducingDecoder
from spml_fast.data.remote.shards import RemoteShards
from spml_fast.data.remote.store import StoreError
from spml_fast.data.shards import Encoded, PendingImages, ShardReader

# Input of the graph by name: an array with one row per image, or a list of arrays.
Inputs = dict[str, Any]

# Reading threads have this many images each ahead of DALI's queue, where images are read a batch at a time.
_IMAGES_PER_THREAD = 4


def decoding_threads(config: DataConfig) -> int:
    """Decoding threads of this rank: as configured, or an equal part of the cores this process may use."""
    if config.threads > 0:
        return config.threads
    return max(1, len(os.sched_getaffinity(0)) // env.local_world_size())


def _device_id(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# Streams whose pipelines may run. DALI's threads must be gone before the interpreter is, which ends the process else.
_open: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_open):
        stream._forget()


class _ReadGroup:
    """Requests whose images are read from shards together."""

    def __init__(self, requests: Sequence[BatchRequest], reader: ShardReader, decoded: DecodedImages | None) -> None:
        self.requests = deque(requests)
        samples = np.concatenate([request.index for request in self.requests])
        # Places of those that are read: not of those that are decoded already.
        self._places = np.arange(len(samples)) if decoded is None else decoded.missing(samples)
        self.reading: PendingImages = reader.submit(samples[self._places])
        self._used = 0

    def take(self) -> tuple[BatchRequest, list[Encoded | None]]:
        """Wait for the images, and take the next request with its own. `UserError` if one cannot be read."""
        images = self.reading.result()
        request = self.requests.popleft()
        first, self._used = self._used, self._used + len(request.index)
        taken: list[Encoded | None] = [None] * len(request.index)
        for row in range(*np.searchsorted(self._places, (first, self._used)).tolist()):
            # Their memory is free as soon as the batch is done, not when the group is.
            taken[self._places[row] - first], images[row] = images[row], None
        return request, taken


def _make_pipeline(options: GraphOptions, pipeline_options: dict[str, Any], depth: int) -> Any:
    """A DALI pipeline whose queue holds `depth` batches."""
    more = {"prefetch_queue_depth": depth, "enable_conditionals": options.has_branches}
    return built(graph(options=options, **more, **pipeline_options))


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
        bad_images: what happens to images that cannot be used; None raises `UserError` at the first one.
        choose: which image stands in for one that cannot be used; needed where they are replaced.
        cache: resized images that take the place of the split's, where DALI makes the views.
        decoded: images that are in memory, which those that are decoded join, where threads make the views.
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
        bad_images: BadImages | None = None,
        choose: Choice | None = None,
        cache: ImageCache | None = None,
        decoded: DecodedImages | None = None,
    ) -> None:
        self._cache, self._decoded = cache, decoded
        self._split, self._graph_options, self._inputs, self._device = split, graph_options, inputs, device
        self._bad, self._choose = bad_images or BadImages(split), choose
        self._prefetch, self._max_pixels = prefetch, config.max_pixels
        # Files that have been seen to be regular ones: a pipe would keep DALI waiting for ever.
        self._regular = np.zeros(len(split) if split.shards is None else 0, np.bool_)
        self._decoding_threads = decoding_threads(config)
        self._pipeline_options = {
            "batch_size": batch_size,
            "num_threads": self._decoding_threads,
            "device_id": _device_id(device) if graph_options.gpu else None,
        }
        self._pipe: Any = None
        # Batches that the pipeline's queue holds: `prefetch`, or fewer where one is built near the end of a pass.
        self._depth = prefetch
        # Failures since the last batch that was made.
        self._failures = 0
        # Requests that are being handed to DALI.
        self._taken: deque[BatchRequest] = deque()
        self._flight: deque[BatchRequest] = deque()
        # Encoded images of the batches in flight, which DALI reads in place.
        self._held: deque[list[Encoded | None]] = deque()
        # Behind those: what threads make of images that DALI has decoded.
        self._views = (
            CpuViews(graph_options, batch_size, decoding_threads(config)) if graph_options.in_threads else None
        )
        self._viewing: deque[tuple[BatchRequest, PendingViews]] = deque()
        # What the views of the batches in `_flight` need, where threads make them.
        self._given: deque[Inputs] = deque()
        self._current: object = None
        shards = split.shards if cache is None else None
        self._reader = ShardReader(shards, config.read_threads) if shards is not None else None
        ahead = _IMAGES_PER_THREAD
        if isinstance(shards, RemoteShards):
            shards.use_cache(config.shuffle_block, int(config.cache_size * 1e9))
            # A thread fetches a whole piece.
            ahead = config.shuffle_block
        # Groups being read and, at the front, being used up: a window and the one after it, or some batches.
        self._ahead: deque[_ReadGroup] = deque()
        self._groups = 2 if windowed else max(2, -(-ahead * config.read_threads // batch_size))
        _open.add(self)

    def _source(self, requests: Iterator[BatchRequest]) -> Iterator[list[BatchRequest]]:
        """Requests that are taken together: one by one, or the groups that are read from shards."""
        if self._choose is not None:
            requests = map(self._without_bad, requests)
        if self._reader is None:
            return ([request] for request in requests)
        return (list(group) for _, group in itertools.groupby(requests, key=lambda request: request.group))

    def _take(self, source: Iterator[list[BatchRequest]]) -> list[Inputs]:
        """The inputs of the next requests that DALI's queue has room for; the requests are in `_taken`.

        Images that are still being read are waited for only when there is nothing else to do.
        """
        count = (self._depth if self._pipe is not None else self._prefetch) - len(self._flight)
        # A new pipeline must have its queue filled at once.
        needed = count if self._pipe is None else int(not self._undelivered)
        taken: list[Inputs] = []
        if self._reader is None:
            for (request,) in itertools.islice(source, count):
                self._taken.append(request)
                if self._cache is None:
                    self._require_files(request.index)
                taken.append(self._all_inputs(request))
            return taken
        while len(taken) < count:
            while len(self._ahead) < self._groups and (members := next(source, None)):
                self._ahead.append(_ReadGroup(members, self._reader, self._decoded))
            if not self._ahead or (len(taken) >= needed and not self._ahead[0].reading.done()):
                break
            request, encoded = self._ahead[0].take()
            if not self._ahead[0].requests:
                self._ahead.popleft()
            self._taken.append(request)
            taken.append({"encoded": encoded, **self._all_inputs(request)})
        return taken

    def _all_inputs(self, request: BatchRequest) -> Inputs:
        """The graph's inputs, but for `encoded`."""
        if self._cache is not None:
            return {"resized": [self._cache.image(i) for i in request.index.tolist()], **self._inputs(request)}
        inputs = {"max_pixels": pixel_limits(self._split, request.index, self._max_pixels), **self._inputs(request)}
        return inputs if self._decoded is None else {"sample": request.index, **inputs}

    def _require_files(self, index: npt.NDArray[np.int64]) -> None:
        """Raise `UserError` where one of the samples is a pipe, device or folder. What is missing DALI finds itself."""
        for sample in index[~self._regular[index]].tolist():
            try:
                require_regular(self._split.path(sample))
            except FileNotFoundError:
                continue
            except OSError as error:
                if may_pass(error):
                    continue
                raise UserError(
                    f"image {self._split.place(sample)} cannot be read ({error.strerror}); {advice(self._split)}"
                ) from error
            self._regular[sample] = True

    def _stop_reading(self) -> None:
        while self._ahead:
            self._ahead.popleft().reading.cancel()

    def _submit(self, taken: Sequence[Inputs]) -> None:
        """Hand batches to DALI and start them."""
        first = self._pipe is None
        if first:
            if not taken:
                return
            self._depth = len(taken)
            make = partial(_make_pipeline, self._graph_options, self._pipeline_options)
            if self._graph_options.reduced:
                self._pipe = ReducingDecoder(self._decoding_threads)
            elif self._decoded is not None:
                self._pipe = KeepingDecoder(self._decoded, make)
            else:
                self._pipe = make(self._depth)
        for arrays in taken:
            for name, value in arrays.items():
                if self._views is None or name in DECODING_INPUTS:
                    self._pipe.feed_input(name, value)
            self._flight.append(self._taken.popleft())
            self._held.append(arrays.get("encoded", []))
            self._given.append({name: value for name, value in arrays.items() if name not in DECODING_INPUTS})
        # The first run of a pipeline starts as many batches as its queue is deep; each later one starts one.
        for _ in range(1 if first else len(taken)):
            self._pipe.schedule_run()

    def _receive(self) -> tuple[BatchRequest, tuple[Tensor, ...]]:
        """Wait for the oldest batch in flight."""
        if self._views is None:
            received = self._receive_views()
        else:
            while self._flight and len(self._viewing) < 2:
                self._viewing.append(self._start_views(self._views))
            request, pending = self._viewing[0]
            with span(VIEWS):
                received = request, pending.result()
            self._viewing.popleft()
        self._failures = 0
        return received

    def _receive_views(self) -> tuple[BatchRequest, tuple[Tensor, ...]]:
        """Views that DALI made."""
        on_gpu = self._graph_options.gpu
        stream = {"cuda_stream": torch.cuda.current_stream(self._device)} if on_gpu else {}
        with span(DECODING):
            shared = self._pipe.share_outputs(**stream)
        # The tensors keep DALI's memory alive; releasing only tells the executor that there is room again.
        views = tuple(from_dlpack(out.as_tensor()).permute(0, 3, 1, 2) for out in shared)
        return self._release(), views

    def _start_views(self, views: CpuViews) -> tuple[BatchRequest, PendingViews]:
        """Wait for images that DALI decoded, and have threads make their views."""
        with span(DECODING):
            (shared,) = self._pipe.share_outputs()
        # The tensors keep DALI's memory alive.
        images = [from_dlpack(shared[place]).numpy() for place in range(len(shared))]
        given = self._given[0]
        return self._release(), views.submit(images.__getitem__, len(images), given)

    def _release(self) -> BatchRequest:
        """Tell DALI that the outputs of the oldest batch have been taken; returns whose they are."""
        self._pipe.release_outputs()
        self._held.popleft()
        self._given.popleft()
        return self._flight.popleft()

    @property
    def _undelivered(self) -> list[BatchRequest]:
        """Requests that were started, oldest first."""
        return [*(request for request, _ in self._viewing), *self._flight]

    def _without_bad(self, request: BatchRequest) -> BatchRequest:
        assert self._choose is not None
        return self._bad.without_bad(request, self._choose)

    def _recover(self, error: RuntimeError | UserError) -> Iterator[list[BatchRequest]]:
        """Throw the failed pipeline away and find what it failed on; returns the requests that it had, to make again.

        Raises:
            UserError: an image cannot be used, and is not replaced.
            RuntimeError: `error`, when no image explains it and it has come again and again.
        """
        made = [*self._undelivered, *self._taken]
        unread = [request for group in self._ahead for request in group.requests]
        built = self._pipe is not None
        self._forget()
        # The reading threads and the inputs of a request name an image themselves.
        named = isinstance(error, UserError)
        if is_out_of_memory(error) or (named and not self._bad.replace) or not (named or built):
            raise error
        if isinstance(error, StoreError):
            # No image is bad because nothing can be read.
            raise error
        found = find_bad(self._split, self._to_decode(made), self._graph_options.cropped, self._max_pixels)
        if named:
            found = itertools.chain(found, find_unreadable(self._split, self._to_decode(unread)))
        before = len(self._bad.reasons)
        for sample, problem in found:
            if sample not in self._bad.reasons:
                self._bad.add(sample, problem)
        if len(self._bad.reasons) == before:
            # Nothing is wrong with the images now: the disk may have failed for a moment.
            if self._failures == len(RETRY_PAUSES):
                raise error
            time.sleep(RETRY_PAUSES[self._failures])
            self._failures += 1
        return self._source(iter([*made, *unread]))

    def _to_decode(self, requests: Sequence[BatchRequest]) -> list[int]:
        """Samples of requests that are not in memory, in order."""
        samples = np.concatenate([np.zeros(0, np.int64), *(request.index for request in requests)])
        if self._decoded is not None:
            samples = samples[self._decoded.missing(samples)]
        return samples.tolist()

    def _forget(self) -> None:
        """Throw away the pipeline and everything that was given to it."""
        self._pipe = None
        self._stop_viewing()
        self._flight.clear()
        self._taken.clear()
        self._held.clear()
        self._given.clear()
        self._stop_reading()

    def _stop_viewing(self) -> None:
        while self._viewing:
            self._viewing.popleft()[1].cancel()

    def _discard(self) -> None:
        """Wait for everything in flight and throw it away."""
        self._stop_reading()
        self._stop_viewing()
        try:
            while self._flight:
                self._pipe.share_outputs()
                self._release()
        except RuntimeError:
            # An image in a batch that is not wanted any more cannot be decoded; it is named if it is wanted again.
            self._forget()

    def run(self, requests: Iterator[BatchRequest], count: int) -> Iterator[tuple[BatchRequest, tuple[Tensor, ...]]]:
        """Yield the first `count` batches of `requests`; those after them are started ahead of the next `run`."""
        current = self._current = object()
        if self._taken:
            # The last run was interrupted while it handed them over.
            self._forget()
        elif self._pipe is not None and self._depth < self._prefetch:
            self._discard()
            self._pipe = None
        started = [*self._undelivered, *itertools.chain.from_iterable(group.requests for group in self._ahead)]
        first = list(itertools.islice(requests, len(started)))
        if [request.key for request in first] != [request.key for request in started]:
            self._discard()
            requests = itertools.chain(first, requests)
        source = self._source(requests)
        for _ in range(count):
            if self._current is not current:
                raise RuntimeError("this epoch was abandoned: the loader has been asked for another one since")
            out, source = self._next(source)
            yield out

    def _next(
        self, source: Iterator[list[BatchRequest]]
    ) -> tuple[tuple[BatchRequest, tuple[Tensor, ...]], Iterator[list[BatchRequest]]]:
        """The next batch, and where the requests after it come from."""
        out = None
        while True:
            try:
                self._submit(self._take(source))
                if out is not None:
                    # What was submitted now was started before the consumer computes with this batch, so that both
                    # happen at the same time.
                    return out, source
                out = self._receive()
            except NoReplacementError:
                raise
            except (RuntimeError, UserError) as error:
                source = itertools.chain(self._recover(error), source)
