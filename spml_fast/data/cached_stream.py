"""Views of cached images on CPUs, some batches ahead of the training loop: what `Stream` is for images to decode."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from spml_fast.data.bad_images import BatchRequest
from spml_fast.data.cpu_views import CpuViews, PendingViews
from spml_fast.data.image_cache import ImageCache, Pixels


class CachedStream:
    """Batches in flight; a consumer may stop anywhere.

    Args:
        cache: the resized images.
        views: makes the views.
        inputs: request -> what the views need.
        prefetch: batches in flight.
    """

    def __init__(
        self, cache: ImageCache, views: CpuViews, inputs: Callable[[BatchRequest], dict[str, Any]], prefetch: int
    ) -> None:
        self._cache, self._views, self._inputs, self._prefetch = cache, views, inputs, prefetch
        self._flight: deque[tuple[BatchRequest, PendingViews]] = deque()
        self._current: object = None

    def run(self, requests: Iterator[BatchRequest], count: int) -> Iterator[tuple[BatchRequest, tuple[Tensor, ...]]]:
        """Yield the first `count` batches of `requests`; those after them are started ahead of the next `run`."""
        current = self._current = object()
        started = [request for request, _ in self._flight]
        first = list(itertools.islice(requests, len(started)))
        if [request.key for request in first] != [request.key for request in started]:
            while self._flight:
                self._flight.popleft()[1].cancel()
            requests = itertools.chain(first, requests)
        self._fill(requests)
        for _ in range(count):
            if self._current is not current:
                raise RuntimeError("this epoch was abandoned: the loader has been asked for another one since")
            request, pending = self._flight.popleft()
            views = pending.result()
            # Before the consumer computes with this batch, so that both happen at the same time.
            self._fill(requests)
            yield request, views

    def _fill(self, requests: Iterator[BatchRequest]) -> None:
        for request in itertools.islice(requests, self._prefetch - len(self._flight)):
            image = partial(self._image, request.index.tolist())
            self._flight.append((request, self._views.submit(image, len(request.index), self._inputs(request))))

    def _image(self, index: list[int], place: int) -> Pixels:
        return self._cache.image(index[place])
