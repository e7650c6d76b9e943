"""JPEGs decoded at a half, a quarter or an eighth of their size, where the view is smaller still (`data.decode`).

A JPEG stores blocks of 8 x 8 pixels by their frequencies; leaving out the high ones gives a smaller image for less work
than decoding and shrinking it. DALI's decoders cannot do that on a CPU, Pillow's `draft` can: it takes the smallest
size that is not below what is asked for. Images that are too small for that, other files, and JPEGs in CMYK are decoded
whole by DALI, which is faster at it.
"""

from __future__ import annotations

import atexit
import io
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.JpegImagePlugin import JpegImageFile

from spml_fast.core.workers import DaemonThreads
from spml_fast.data.dali_graph import decode_graph
from spml_fast.data.pipelines import built

Pixels = npt.NDArray[np.uint8]

# First bytes of a JPEG; Pillow's modes of those that become RGB in one way, which leaves CMYK out.
_JPEG = b"\xff\xd8\xff"
_PLAIN_MODES = ("RGB", "L")


class _Dali:
    """DALI's decoder, an image at a time, for as many threads as ask.

    Its pipelines belong to no thread: a process that is forked drops what belongs to threads, which it does not have,
    and would wait for theirs.
    """

    def __init__(self) -> None:
        self.idle: deque[Any] = deque()
        _decoders.add(self)

    def decode(self, encoded: bytes, max_pixels: int) -> Pixels:
        """uint8 [H, W, 3], as stored; `RuntimeError` where it has more pixels or cannot be decoded."""
        try:
            pipe = self.idle.pop()
        except IndexError:
            options: dict[str, Any] = {"num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}
            pipe = built(decode_graph(limited=True, batch_size=1, **options))
        try:
            pipe.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
            pipe.feed_input("max_pixels", [np.int64(max_pixels)])
            (images,) = pipe.run()
        except RuntimeError:
            # One that has failed is of no more use, and the error would keep it.
            del pipe
            raise
        pixels = np.array(images.at(0))
        self.idle.append(pipe)
        return pixels


_decoders: weakref.WeakSet[_Dali] = weakref.WeakSet()


@atexit.register
def _remove_pipelines() -> None:
    # While the interpreter is there: behind it their threads end the process.
    for decoder in list(_decoders):
        decoder.idle.clear()


class ReducingDecoder:
    """Decodes batches ahead of their consumer; called as a DALI pipeline is.

    Args:
        threads: images at a time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = DaemonThreads(threads, "decode", native=True)
        self._dali = _Dali()
        self._fed: dict[str, deque[Any]] = {}
        self._batches: deque[list[Future[None]]] = deque()
        self._images: deque[list[Pixels | None]] = deque()

    def feed_input(self, name: str, value: Any) -> None:
        """An input of the next batch: an array, or a list of arrays, with a row per image."""
        self._fed.setdefault(name, deque()).append(value)

    def schedule_run(self) -> None:
        """Start to decode what was fed."""
        while all(self._fed.values()):
            inputs = {name: values.popleft() for name, values in self._fed.items()}
            count = len(inputs["smallest"])
            images: list[Pixels | None] = [None] * count
            jobs = [partial(self._decode_one, inputs, place, images) for place in range(count)]
            self._batches.append([self._threads.submit(job) for job in jobs])
            self._images.append(images)

    def share_outputs(self) -> tuple[list[Pixels | None]]:
        """Wait for the oldest batch, and return its images, uint8 [H, W, 3] each.

        Raises:
            RuntimeError: one of them cannot be decoded.
        """
        for future in self._batches[0]:
            future.result()
        return (self._images[0],)

    def release_outputs(self) -> None:
        """The oldest batch was taken."""
        self._batches.popleft()
        self._images.popleft()

    def _decode_one(self, inputs: dict[str, Any], place: int, images: list[Pixels | None]) -> None:
        if "encoded" in inputs:
            encoded = inputs["encoded"][place].tobytes()
        else:
            path = inputs["path"][place].tobytes()
            try:
                with open(path, "rb") as file:
                    encoded = file.read()
            except OSError as error:
                raise RuntimeError(f"{path!r} cannot be read") from error
        width, height = inputs["smallest"][place].tolist()
        limit = int(inputs["max_pixels"][place])
        pixels = decode_reduced(encoded, (width, height), limit, self._dali.decode)
        if "turn" in inputs:
            turn, across, down = (int(inputs[name][place]) for name in ("turn", "turn_horizontal", "turn_vertical"))
            pixels = _turned(pixels, turn, bool(across), bool(down))
        images[place] = pixels


def decode_reduced(
    encoded: bytes, smallest: tuple[int, int], max_pixels: int, otherwise: Callable[[bytes, int], Pixels]
) -> Pixels:
    """Decode an image, a JPEG at the smallest size that is not below another one.

    Args:
        encoded: the file's content.
        smallest: width and height that are needed, of the image as stored.
        max_pixels: width x height up to which it is decoded.
        otherwise: decodes what is not made smaller, with the same limit.

    Returns:
        uint8 [H, W, 3], as stored: not turned.

    Raises:
        RuntimeError: it is larger, or cannot be decoded.
    """
    if encoded.startswith(_JPEG):
        try:
            # `Image.open` has a limit of its own, which is one for all threads.
            with JpegImageFile(io.BytesIO(encoded)) as image:
                if image.width * image.height > max_pixels:
                    raise RuntimeError(f"an image of {image.width} x {image.height} pixels is too large")
                reducible = min(image.width // smallest[0], image.height // smallest[1]) >= 2
                if reducible and image.mode in _PLAIN_MODES:
                    image.draft(None, smallest)
                    return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError):
            # DALI may be more patient with it; if not, whoever decoded it last says what is wrong.
            pass
    return otherwise(encoded, max_pixels)


def _turned(pixels: Pixels, turn: int, across: bool, down: bool) -> Pixels:
    """As dali_graph.py turns images: rows and columns swapped where `turn` is 2, then mirrored."""
    if turn == 0:
        return pixels
    if turn == 2:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])
