"""What the tests of Triton kernels share: inputs, comparisons with fp64, and the checks that every op passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Largest error against fp64, relative to the values' root mean square. Interpreted bf16 stores truncate (2^-7).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2**-6}


def assert_close(name: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Every error at most `tolerance` times (size of the value + root mean square of all); NaN never passes."""
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.detach().double().cpu()
    error = (found.detach().double().cpu() - exact).abs()
    allowed = tolerance * (exact.abs() + exact.square().mean().sqrt()) + 1e-30
    bad = ~(error <= allowed)
    if bad.any():
        place = tuple(torch.nonzero(bad)[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} differ; at {place} {found[place].item()} for "
            f"{exact[place].item()}; largest error {float(error.max()):.3g}, "
            f"rms {float(exact.square().mean().sqrt()):.3g}"
        )


def draw_logits(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0, scale: float = 4.0) -> Tensor:
    """Logits with a few of size 100 and a few exact zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator) * scale
    flat = logits.view(-1)
    if flat.numel() >= 40:
        flat[::17], flat[5::29], flat[3::31] = 100, -100, 0
    return logits.to(dtype).to(device)


def draw_codes(shape: Sequence[int], device: str, seed: int = 1, unknown: float = 0.6) -> Tensor:
    """Codes with an all-unknown first row and a row without positives."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8)
    codes[torch.rand(*shape, generator=generator) < unknown] = -1
    if len(codes) > 2:
        codes[0] = -1
        codes[1] = codes[1].clamp(max=0)
    return codes.to(device)


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: float = 0.37
) -> tuple[Tensor, list[Tensor]]:
    """A 0-d result and the gradients of `upstream` times it."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = function(*leaves)
    return value, list(torch.autograd.grad(value * upstream, leaves))


def assert_op_sound(op: Any, arguments: tuple[Any, ...]) -> None:
    """The schema, the fake and the autograd registration agree with what the op does."""
    torch.library.opcheck(op, arguments)
    names = [o for o in dir(torch.ops.spml) if o == op._name.split("::")[-1].split(".")[0]]
    assert len(names) == 1


def on_ranks(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run `work(rank, gather)` on threads that stand for ranks; `gather` stacks what all of them hand in."""
    barrier = threading.Barrier(ranks)
    shared: list[Tensor] = [torch.empty(0)] * ranks
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        def gather(tensor: Tensor) -> Tensor:
            shared[rank] = tensor
            barrier.wait(60)
            stacked = torch.stack(shared)
            barrier.wait(60)
            return stacked

        try:
            results[rank] = work(rank, gather)
        except BaseException as error:
            barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
