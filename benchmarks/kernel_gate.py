"""The gate before timing: values and gradients of a provider against the reference in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernel_base import Call, KernelWork, upstreams


def exact_results(work: KernelWork, inputs: list[Tensor]) -> list[Tensor]:
    """Values and gradients of the reference in fp64, of the same inputs."""
    high = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    return _results(work, work.exact, high)[0]


def _results(work: KernelWork, function: Call, inputs: list[Tensor]) -> tuple[list[Tensor], int]:
    """Values, then gradients; and how many are values."""
    leaves = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(inputs)]
    values = function(*leaves)
    results = list(values)
    if work.leaves:
        heads = work.differentiable(values)
        # Those of the exact results must be the same numbers, so they are drawn in the type that both have or can hold.
        start = [s.to(h.dtype) for s, h in zip(upstreams(tuple(h.float() for h in heads)), heads, strict=True)]
        results += torch.autograd.grad(heads, leaves[: work.leaves], start)
    return [r.detach() for r in results], len(values)


def gate(work: KernelWork, inputs: list[Tensor], provider: str = "fused", exact: list[Tensor] | None = None) -> float:
    """Largest relative error (root mean squares) of a provider against fp64, values and gradients.

    Args:
        work: op and shape.
        inputs: of the providers.
        provider: its name. The fused op's values are held to `value_tolerance`; rivals may round their map.
        exact: from `exact_results`, where several are compared with it.

    Raises:
        AssertionError: it is larger than the work allows.
    """
    results, number = _results(work, work.providers[provider], inputs)
    wanted = exact_results(work, inputs) if exact is None else exact
    worst = 0.0
    for place, (value, expected) in enumerate(zip(results, wanted, strict=True)):
        a, b = value.double(), expected.double()
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
        strict = place < number and provider == "fused" and work.value_tolerance
        allowed = work.value_tolerance if strict else work.tolerance
        if not error <= allowed:
            raise AssertionError(f"result {place} is off by {error:.3g} (rms, relative), allowed {allowed:.3g}")
        worst = max(worst, error)
    return worst
