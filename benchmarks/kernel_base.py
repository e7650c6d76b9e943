"""One op at one shape: inputs, rivals, and the bytes and operations that cannot be done without."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., tuple[Tensor, ...]]
Spec = tuple[tuple[int, ...], torch.dtype]
Specs = list[Spec]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class KernelWork:
    """One op at one shape.

    Attributes:
        op, shape: names of the row.
        specs: shape and type of every input; what has three channels second is an image, channels innermost in memory.
        draw: makes the inputs on a device.
        leaves: how many of the first inputs get gradients; 0 for an op without.
        providers: name -> function of the inputs. `eager` is what one would write in PyTorch, in the inputs' types;
            `fused` the public op.
        exact: the reference, for comparison with fp64.
        heads: how many of the first results gradients flow from; 0 for all.
        floor: bytes of forward (fwd) and of forward and backward together (step) that any kernels must move: inputs and
            outputs once, a tensor kept for the backward written and read once.
        residuals: name -> bytes that the fused op moves beyond them, by design.
        flops: of the matrix products that must be done, by mode.
        products: how many products of the operands' type one product takes (fp32 is made of three of tf32).
        tolerance: of the comparison, largest relative error of root mean squares.
        value_tolerance: the same of values alone, where they are held to more than gradients; 0 for the same.
        cam: bytes of the map in bf16; 0 for ops without one.
        variant: how the fused op is launched, where it is not as shipped; its rows have it in the provider's place.
        around: context in which that is so.
        only: modes to time, where not all are.
    """

    op: str
    shape: str
    specs: Specs
    draw: Callable[[str], list[Tensor]]
    leaves: int
    providers: dict[str, Call]
    exact: Call
    floor: dict[str, float]
    heads: int = 0
    residuals: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    products: int = 1
    tolerance: float = 1e-5
    value_tolerance: float = 0.0
    cam: float = 0.0
    variant: str = ""
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    only: tuple[str, ...] = ()

    def inputs(self, device: str) -> list[Tensor]:
        """Inputs on `device`; on `meta` shapes alone."""
        if device != "meta":
            return self.draw(device)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.specs]
        return [t.to(memory_format=torch.channels_last) if t.dim() == 4 and t.shape[1] == 3 else t for t in tensors]

    @property
    def modes(self) -> tuple[str, ...]:
        """What there is to run: forward, backward, both."""
        return ("fwd", "bwd", "step") if self.leaves else ("fwd",)

    @property
    def main_mode(self) -> str:
        """What a training does of it: forward and backward, or forward where there is no backward."""
        return "step" if self.leaves else "fwd"

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(provider, mode) of everything that is timed."""
        return [
            (name, mode)
            for name, call in self.providers.items()
            for mode in (self.only or self.modes)
            # A graph that was captured with its forward cannot be replayed backward alone.
            if not (mode == "bwd" and isinstance(call, Compiled) and call.mode == "reduce-overhead")
        ]

    def differentiable(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results that gradients flow from."""
        return results[: self.heads or len(results)]

    @property
    def name(self) -> str:
        """Op and shape, and the variant if there is one."""
        return f"{self.op} {self.shape}{self.variant and ': '}{self.variant}"


def make_call(work: KernelWork, provider: str, mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """A function without arguments that runs one provider: `fwd` keeps nothing, `bwd` and `step` give gradients."""
    function = work.providers[provider]
    if provider == "matmul":
        return _products(mode, inputs)
    if mode == "fwd":
        plain = [t.detach() for t in inputs]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*plain)

        return forward
    leaves = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(inputs)]
    wanted = leaves[: work.leaves]
    start = upstreams(work.differentiable(function(*leaves)))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(work.differentiable(function(*leaves)), wanted, start)

    if mode == "step":
        return step
    values = work.differentiable(function(*leaves))
    return lambda: torch.autograd.grad(values, wanted, start, retain_graph=True)


def _products(mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """The bare products of cam_pool's size: one forward, two backward."""
    features, weight = inputs[0].flatten(0, 2), inputs[1]
    cam = torch.zeros(len(features), len(weight), dtype=features.dtype, device=features.device).normal_()
    out = torch.empty_like(cam)

    def forward() -> Tensor:
        return torch.mm(features, weight.T, out=out)

    def backward() -> tuple[Tensor, Tensor]:
        return cam @ weight, cam.T @ features

    return {"fwd": forward, "bwd": backward, "step": lambda: (forward(), backward())}[mode]


def upstreams(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients to start from, of the outputs' shapes, neither 0 nor 1."""
    if outputs[0].is_meta:
        return [torch.empty_like(t) for t in outputs]
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    return [
        torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype) for t in outputs
    ]


class Compiled:
    """torch.compile of a function, made when it is first called: loading the compiler takes seconds.

    Args:
        function: of tensors.
        mode: of torch.compile.
    """

    def __init__(self, function: Call, mode: str = "default") -> None:
        self.function, self.mode = function, mode
        self._made: list[Call] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self._made:
            # A graph break or too many shapes would time PyTorch under the compiler's name.
            self._made.append(torch.compile(self.function, dynamic=False, fullgraph=True, mode=self.mode))
        if self.mode == "reduce-overhead":
            # A network's logits lie where the graph expects them; copying them there would be the benchmark's doing.
            for tensor in inputs:
                torch._dynamo.mark_static_address(tensor)
            torch.compiler.cudagraph_mark_step_begin()
        return self._made[0](*inputs)


def compiled(function: Call, mode: str = "default") -> Compiled:
    """torch.compile of a function, in one of its modes."""
    return Compiled(function, mode)


def forget_compiled() -> None:
    """Let torch.compile forget what it has compiled in this process; its files stay."""
    # Where nobody has compiled yet, its loading takes seconds.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def size(specs: Specs) -> int:
    """Bytes of tensors of these shapes and types."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)
