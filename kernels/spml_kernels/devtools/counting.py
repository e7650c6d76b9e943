"""What an op moves, counted where there is no GPU: bytes and launches, of kernels and of PyTorch operations.

`count` runs a function and records every launch in order:

- a Triton kernel under the interpreter: every load, store and atomic of every program is looked at. Lanes that are
  masked off do not count; lanes of one load that name the same byte count once, as the hardware fetches it once. Each
  address must lie in a tensor of the call, which nothing else checks on a machine without a GPU.
- a Triton kernel on meta tensors, in a process that does not interpret: nothing runs, the arguments are kept. The
  formulas of `traffic` turn them into bytes, for shapes that the interpreter could not run.
- a PyTorch operation that is not a view: the sizes of its operands and results. On a GPU it is at least one kernel.

For development, tests and benchmarks; no op imports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from spml_kernels.common.jit import INTERPRETED, TensorDescriptor, triton


class Moved(NamedTuple):
    """Bytes of one launch, or of several.

    Attributes:
        unique_read: distinct bytes read; what must come from memory when the cache holds everything.
        read: bytes read by all programs; what comes from memory when nothing is found in the cache.
        written: bytes written.
        atomic: bytes that atomics add to, each addition counted; they stay in the level-2 cache.
    """

    unique_read: int = 0
    read: int = 0
    written: int = 0
    atomic: int = 0

    @property
    def least(self) -> int:
        """Distinct bytes read, and bytes written."""
        return self.unique_read + self.written

    def plus(self, other: Moved) -> Moved:
        """Sums, field by field."""
        return Moved(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Launch:
    """One kernel.

    Attributes:
        name: of the Triton kernel, or of the PyTorch operation (`aten.sum.default`).
        moved: its bytes; None for a Triton kernel that was recorded without running.
        kernel: the jit function, None for a PyTorch operation.
        arguments: argument name -> value; launch options (`num_warps`, `num_stages`) among them.
        grid: programs along each axis.
    """

    name: str
    moved: Moved | None = None
    kernel: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] = ()


def total(launches: list[Launch], moved_by: Callable[[Launch], Moved] | None = None) -> Moved:
    """Sum over launches.

    Args:
        launches: from `count`.
        moved_by: gives the bytes of kernels that were recorded without running.

    Raises:
        ValueError: such a kernel, and no `moved_by`.
    """
    result = Moved()
    for launch in launches:
        moved = launch.moved
        if moved is None:
            if moved_by is None:
                raise ValueError(f"{launch.name} has not run; give a formula for its bytes")
            moved = moved_by(launch)
        result = result.plus(moved)
    return result


def count(function: Callable[[], Any]) -> list[Launch]:
    """Run `function` and record what it launches, forward and backward, in order.

    Raises:
        RuntimeError: a Triton kernel that can neither be interpreted nor, its tensors not being meta, be skipped.
        IndexError: a kernel reads or writes outside of the tensors that it was given (under the interpreter).
    """
    counter = _Counter()
    with counter.kernels(), counter:
        function()
    return counter.launches


# Operations that make a tensor without a kernel.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_")
# Operations whose first operand is only overwritten.
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")
# Operations that read no more of their first operand than they give, beside the positions.
_GATHERS = ("index", "gather", "index_select", "take", "embedding", "slice_scatter")
# Operations that write as much as they are given, to places in their first operand.
_SCATTERS = ("index_put_", "scatter_", "index_add_", "scatter_add_", "index_copy_", "index_fill_")


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: dimensions that repeat one count once."""
    distinct = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= length if stride or not length else 1
    return distinct * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    """All tensors among arguments or results."""
    if isinstance(values, Tensor):
        return [values]
    if TensorDescriptor is not None and isinstance(values, TensorDescriptor):
        return [values.base]
    if isinstance(values, dict):
        values = values.values()
    if isinstance(values, (list, tuple, type({}.values()))):
        return [t for v in values for t in _tensors(v)]
    return []


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _operation(name: str, mutates: bool, arguments: list[Tensor], results: list[Tensor]) -> Moved | None:
    """Bytes of a PyTorch operation; None where there is no kernel."""
    if name in _ALLOCATIONS or not any(t.numel() for t in results):
        return None
    if not mutates and any(_same_storage(r, a) for r in results for a in arguments):
        return None
    first, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    read = sum(_size(t) for t in rest)
    written = sum(_size(t) for t in results)
    if name in _SCATTERS:
        values = max((_size(t) for t in rest if t.dtype == results[0].dtype), default=results[0].element_size())
        written = min(written, values)
    elif name in _GATHERS and first is not None:
        read += min(_size(first), written)
    elif name not in _OVERWRITES and first is not None:
        read += _size(first)
    return Moved(read, read, written)


class _Counter(TorchDispatchMode):
    """Sees PyTorch operations; `kernels` lets it see Triton's."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "spml":
            # Our ops are looked into: their own function runs with the counter on.
            own = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
            with self:
                return own(*args, **kwargs)
        with self:
            # Composite operations arrive whole where autograd is done with them.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.split("::")[1]
        out = kwargs.get("out")
        # PyTorch 2.11 has no such sum for meta tensors; there is nothing to run with them.
        unknown = func is torch.ops.aten.addmm.dtype_out and out.is_meta
        result = out if unknown else func(*args, **kwargs)
        # What is written to `out` is not read, unless it is an operand as well.
        given = [*_tensors(args), *_tensors({key: value for key, value in kwargs.items() if key != "out"})]
        moved = _operation(name, func._schema.is_mutable, given, _tensors(result))
        if moved is not None:
            self.launches.append(Launch(str(func), moved))
        return result

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Launches of Triton kernels come by here."""
        if triton is None:
            yield
            return
        kind = type(triton.jit(_nothing))
        launch = kind.run
        counter = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
            shape = tuple(grid(arguments)) if callable(grid) else tuple(grid)
            entry = Launch(kernel.__name__, None, kernel, arguments, shape)
            counter.launches.append(entry)
            with _disable_current_modes():
                if INTERPRETED:
                    with _Memory(arguments).watched() as memory:
                        launch(kernel, *args, grid=grid, warmup=warmup, **options)
                    entry.moved = memory.moved()
                elif any(t.device.type != "meta" for t in _tensors(arguments)):
                    raise RuntimeError(f"{entry.name}: bytes are counted under TRITON_INTERPRET=1 or on meta tensors")

        with mock.patch.object(kind, "run", run):
            yield


def _nothing() -> None:
    """A function to make a kernel of, to learn which class kernels have."""


class _Memory:
    """Accesses of one interpreted launch."""

    # Addresses that are kept before equal ones are dropped.
    LIMIT = 1 << 22

    def __init__(self, arguments: dict[str, Any]) -> None:
        spans = sorted((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in _tensors(arguments))
        self.starts = torch.tensor([s for s, _ in spans], dtype=torch.int64)
        self.ends = torch.tensor([s + n for s, n in spans], dtype=torch.int64)
        self.fetched: dict[int, list[Tensor]] = {}
        self.pending = self.read = self.written = self.atomic = 0

    def _addresses(self, pointers: Any, mask: Any) -> tuple[Tensor, int]:
        """Addresses of the lanes that take part, int64, and bytes of an element."""
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        data = pointers.data
        if mask is not None:
            # Copies by descriptors come with a plain array. A condition on a number makes a mask of integers, which
            # would choose lanes by their place.
            data = data[(mask if hasattr(mask, "astype") else mask.data).astype(bool)]
        address = torch.from_numpy(data.reshape(-1).astype("int64"))
        if len(address):
            place = torch.searchsorted(self.starts, address, right=True) - 1
            inside = (place >= 0) & (address + width <= self.ends[place.clamp(min=0)])
            if not inside.all():
                raise IndexError(f"{int((~inside).sum())} of {len(address)} lanes lie outside of the tensors given")
        return address, width

    def load(self, pointers: Any, mask: Any) -> None:
        address, width = self._addresses(pointers, mask)
        address = address.unique()
        self.read += len(address) * width
        kept = self.fetched.setdefault(width, [])
        kept.append(address)
        self.pending += len(address)
        if self.pending > self.LIMIT:
            self.fetched = {w: [torch.cat(parts).unique()] for w, parts in self.fetched.items()}
            self.pending = 0

    def store(self, pointers: Any, mask: Any) -> None:
        address, width = self._addresses(pointers, mask)
        self.written += len(address) * width

    def add(self, pointers: Any, mask: Any) -> None:
        address, width = self._addresses(pointers, mask)
        self.atomic += len(address) * width

    def moved(self) -> Moved:
        """What has been seen; elements of different widths that share bytes are not distinguished."""
        unique = sum(len(torch.cat(parts).unique()) * width for width, parts in self.fetched.items())
        return Moved(unique, self.read, self.written, self.atomic)

    @contextlib.contextmanager
    def watched(self) -> Iterator[_Memory]:
        """The interpreter's memory operations come by here."""
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        # Loads and stores without a mask, through descriptors and as atomics are made of these two by the interpreter.
        load, store = Builder.create_masked_load, Builder.create_masked_store
        swap, update = Builder.create_atomic_cas, Builder.create_atomic_rmw

        def masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self.load(pointers, mask)
            return load(builder, pointers, mask, *rest, **options)

        def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.store(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def atomic_swap(builder: Any, pointers: Any, *rest: Any) -> Any:
            self.add(pointers, None)
            return swap(builder, pointers, *rest)

        def atomic_update(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.add(pointers, mask)
            return update(builder, operation, pointers, value, mask, *rest)

        with (
            mock.patch.object(Builder, "create_masked_load", masked_load),
            mock.patch.object(Builder, "create_masked_store", masked_store),
            mock.patch.object(Builder, "create_atomic_cas", atomic_swap),
            mock.patch.object(Builder, "create_atomic_rmw", atomic_update),
        ):
            yield self
