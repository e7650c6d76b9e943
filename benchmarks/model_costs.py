"""Memory and cost of a training step by formula, checked against PyTorch, and an estimate of hours per epoch.

    python benchmarks/model_costs.py [--json OUT] [--no-check] [--images 9011219] [--classes 5000 9605]

Prints the two tables of docs/operations.md: backbones at 224 and 448 px, and whole models with a CAM head over
thousands of classes. No GPU is needed.

Formulas, for one image (K channels out of the backbone, h x w cells of the feature map, C classes):
    saved activations   the tensors that the backward needs, module by module, see `resnet`, `convnext`, `vit` below;
                        under bf16 autocast LayerNorm's input stays fp32 (4 bytes), all else has 2 (not measured)
    operations          2 a multiplication and addition; the backward is twice the forward
    head, operations    2 h w K C forward with BoostLU (2 K C without)
    head, bytes         21 C (two means, their gradients and the loss's gradient in fp32, labels in int8) and h w C / 8
                        (the sign of every cell of the map, where the Triton kernel runs)
    state               16 bytes a parameter (weight, gradient, two Adam moments, all fp32), and 2 for the bf16 copy
Check: parameters are counted in timm's models; saved bytes in fp32 are what torch.autograd.graph.saved_tensors_hooks
sees at batch 1, on meta tensors, and on the CPU for ViTs, whose attention is not fused on meta tensors; operations are
FlopCounterMode's. The program ends with status 1 when a formula is off by more than 2 per cent.

Hours are an ESTIMATE; nothing behind them was measured. A step takes the longer of its operations at COMPUTE of the
peak and its memory traffic at BANDWIDTH of the peak, the traffic being TRAFFIC times the saved bytes (written, read,
read again in the backward, gradient written and read, some over); several GPUs reach the fraction SCALING. Reading and
decoding images is assumed to keep up; the last column says what that takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spml_fast.core.outputs import add_json_option, json_output

# NVIDIA H100 SXM, from its data sheet: dense bf16 operations a second, bytes a second, bytes.
PEAK, MEMORY_RATE, MEMORY = 989e12, 3.35e12, 80e9
COMPUTE, BANDWIDTH, TRAFFIC = 0.40, 0.35, 6.0
SCALING = {1: 1.0, 8: 0.95, 64: 0.90}
TOLERANCE = 0.02


@dataclass
class LayerCost:
    """Cost of one image in the backbone: bytes saved for the backward, and operations of the forward."""

    saved: float = 0.0
    operations: float = 0.0

    def conv(self, c_in: int, c_out: int, kernel: int, side: float, groups: int = 1) -> None:
        """Add the operations of a convolution.

        Args:
            c_in: input channels.
            c_out: output channels.
            kernel: side of the square kernel.
            side: cells along a side of the output.
            groups: of the convolution; `c_in` for a depthwise one.
        """
        self.operations += 2 * c_in * c_out // groups * kernel**2 * side**2


def resnet(blocks: list[int], size: int, low: int) -> LayerCost:
    """Bottleneck ResNet: every convolution saves its input, every BatchNorm its input; ReLU works in place.

    A block of width w saves w at its input size twice (after conv1: before and after BatchNorm), w at its output size
    twice (conv2), 4 w twice (conv3), and 4 w for BatchNorm of the shortcut's convolution.
    """
    cost, side = LayerCost(3 * size**2 * 4), size // 2
    cost.conv(3, 64, 7, side)
    # The max pooling keeps places as int64.
    cost.saved += 2 * 64 * side**2 * low + 64 * (side // 2) ** 2 * (low + 8)
    side, c_in = side // 2, 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            out = side // 2 if block == 0 and stage > 0 else side
            cost.conv(c_in, width, 1, side)
            cost.conv(width, width, 3, out)
            cost.conv(width, 4 * width, 1, out)
            cost.saved += (2 * width * side**2 + (2 * width + 8 * width) * out**2) * low
            if block == 0:
                cost.conv(c_in, 4 * width, 1, out)
                cost.saved += 4 * width * out**2 * low
            side, c_in = out, 4 * width
    return cost


def convnext(blocks: list[int], widths: list[int], size: int, low: int) -> LayerCost:
    """ConvNeXt. A block of width d saves 12 d a cell: convolution's input, LayerNorm's input (fp32), the input of fc1,
    4 d before and 4 d after GELU, and what layer scale multiplies.

    Args:
        blocks: of each stage.
        widths: channels of each stage.
        size: side of the image, pixels.
        low: bytes of an element in low precision.
    """
    cost, side = LayerCost(3 * size**2 * 4), size // 4
    cost.conv(3, widths[0], 4, side)
    # LayerNorm of the stem.
    cost.saved += widths[0] * side**2 * 4
    for stage, (count, d) in enumerate(zip(blocks, widths, strict=True)):
        if stage:
            # LayerNorm's input and the convolution's.
            cost.saved += widths[stage - 1] * side**2 * (4 + low)
            side //= 2
            cost.conv(widths[stage - 1], d, 2, side)
        for _ in range(count):
            cost.conv(d, d, 7, side, groups=d)
            cost.conv(d, 8 * d, 1, side)
            cost.saved += d * side**2 * (11 * low + 4)
    return cost


def vit(depth: int, d: int, size: int, low: int) -> LayerCost:
    """ViT with patches of 16 and fused attention. A block saves 16 d a token: the inputs of two LayerNorms (fp32), the
    input of qkv, q, k and v, attention's output, the input of fc1, 4 d before and 4 d after GELU.

    Args:
        depth: number of blocks.
        d: channels of a token.
        size: side of the image, pixels.
        low: bytes of an element in low precision.
    """
    cells = (size // 16) ** 2
    tokens = cells + 1
    cost = LayerCost(3 * size**2 * 4)
    cost.operations += 2 * 3 * 16**2 * d * cells
    cost.operations += depth * (24 * tokens * d**2 + 4 * tokens**2 * d)
    cost.saved += depth * tokens * d * (14 * low + 2 * 4) + tokens * d * 4
    return cost


@dataclass(frozen=True)
class Model:
    """A backbone: timm's name, its formula (image size, bytes of low precision), stride of its map, whether a ViT."""

    name: str
    title: str
    formula: Callable[[int, int], LayerCost]
    stride: int
    is_vit: bool = False


MODELS = [
    Model("resnet50", "ResNet-50", lambda s, b: resnet([3, 4, 6, 3], s, b), 32),
    Model("resnet101", "ResNet-101", lambda s, b: resnet([3, 4, 23, 3], s, b), 32),
    Model("convnext_base", "ConvNeXt-B", lambda s, b: convnext([3, 3, 27, 3], [128, 256, 512, 1024], s, b), 32),
    Model("vit_base_patch16_224", "ViT-B/16", lambda s, b: vit(12, 768, s, b), 16, True),
    Model("vit_large_patch16_224", "ViT-L/16", lambda s, b: vit(24, 1024, s, b), 16, True),
]


def build(model: Model, size: int, device: str) -> Any:
    """The backbone as the classifier makes it, with random weights; timm's models have more than nn.Module promises."""
    options = {"img_size": size} if model.is_vit else {}
    with torch.device(device):
        return timm.create_model(model.name, num_classes=0, global_pool="", **options).train()


def measured(model: Model, size: int) -> tuple[float, float]:
    """Saved bytes in fp32 and forward operations of one image, as PyTorch counts them."""
    device = "cpu" if model.is_vit else "meta"
    backbone = build(model, size, device)
    own = {t.untyped_storage()._cdata for t in [*backbone.parameters(), *backbone.buffers()]}
    # Views share a storage; the tensor is kept, or its storage's address could be used again.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            kept[address] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # Named, since a graph without a reference frees what it saved.
        features = backbone.forward_features(torch.zeros(1, 3, size, size, device=device))
    assert features.requires_grad
    return float(sum(t.untyped_storage().nbytes() for t in kept.values())), float(counter.get_total_flops())


@dataclass
class BackboneRow:
    """A line of the first table; bytes and operations of one image."""

    model: str
    size: int
    parameters: int
    saved_fp32: float
    saved_bf16: float
    operations: float
    saved_ratio: float | None
    operations_ratio: float | None


@dataclass
class ModelRow:
    """A line of the second table: a backbone with a CAM head over C classes, BoostLU in training, bf16."""

    model: str
    size: int
    classes: int
    parameters: int
    state: float
    saved: float
    head: float
    operations: float
    largest_batch: int
    hours: dict[int, float]
    images_per_second: float


def backbone_row(model: Model, size: int, check: bool) -> tuple[BackboneRow, int]:
    """One line, and the backbone's channels."""
    meta = build(model, size, "meta")
    full, half = model.formula(size, 4), model.formula(size, 2)
    saved, operations = measured(model, size) if check else (None, None)
    row = BackboneRow(
        model.title,
        size,
        sum(p.numel() for p in meta.parameters()),
        full.saved,
        half.saved,
        3 * full.operations,
        None if saved is None else full.saved / saved,
        None if operations is None else full.operations / operations,
    )
    return row, int(meta.num_features)


def model_row(row: BackboneRow, model: Model, channels: int, classes: int, images: int) -> ModelRow:
    """The same with a head, and the estimate.

    Args:
        row: the backbone's line.
        model: the backbone.
        channels: K of its feature map.
        classes: C of the head.
        images: of an epoch.
    """
    cells = (row.size // model.stride) ** 2
    parameters = row.parameters + classes * (channels + 1)
    state = 18.0 * parameters
    head = 21 * classes + cells * classes / 8
    operations = row.operations + 3 * 2 * cells * channels * classes
    saved = row.saved_bf16 + head
    seconds = max(operations / (COMPUTE * PEAK), TRAFFIC * saved / (BANDWIDTH * MEMORY_RATE))
    hours = {gpus: images * seconds / gpus / scaling / 3600 for gpus, scaling in SCALING.items()}
    # A tenth is left to the allocator, collectives and DALI.
    largest = int((0.9 * MEMORY - state) // saved)
    return ModelRow(
        row.model, row.size, classes, parameters, state, saved, head, operations, largest, hours, 1 / seconds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--no-check", action="store_true", help="formulas alone, without running the models")
    parser.add_argument("--images", type=int, default=9_011_219, help="of an epoch")
    parser.add_argument("--classes", type=int, nargs="+", default=[5000, 9605])
    args = parser.parse_args()
    out_file = json_output(args, "model_costs")

    print("| backbone | px | parameters | saved an image, fp32 | bf16 | forward + backward | formula / measured |")
    print("|---|---|---|---|---|---|---|")
    backbones, models, worst = [], [], 0.0
    for model in MODELS:
        for size in (224, 448):
            row, channels = backbone_row(model, size, not args.no_check)
            backbones.append(row)
            ratios = [r for r in (row.saved_ratio, row.operations_ratio) if r is not None]
            worst = max([worst, *(abs(r - 1) for r in ratios)])
            checked = ", ".join(f"{r:.3f}" for r in ratios) or "-"
            print(f"| {row.model} | {size} | {row.parameters / 1e6:.1f} M | {row.saved_fp32 / 1e6:.0f} MB", end=" ")
            print(f"| {row.saved_bf16 / 1e6:.0f} MB | {row.operations / 1e9:.0f} GFLOP | {checked} |", flush=True)
            models += [model_row(row, model, channels, classes, args.images) for classes in args.classes]
    print()
    print("| model | px | classes | parameters | state | an image | of it the head | forward + backward", end=" ")
    print("| images in 80 GB | hours an epoch on " + " / ".join(map(str, SCALING)) + " GPUs | images/s a GPU |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for w in models:
        print(f"| {w.model} | {w.size} | {w.classes} | {w.parameters / 1e6:.1f} M | {w.state / 1e9:.2f} GB", end=" ")
        print(f"| {w.saved / 1e6:.0f} MB | {w.head / 1e6:.2f} MB | {w.operations / 1e9:.0f} GFLOP", end=" ")
        print(f"| {w.largest_batch} | {' / '.join(f'{h:.2g}' for h in w.hours.values())}", end=" ")
        print(f"| {w.images_per_second:.0f} |")
    if out_file is not None:
        out = {"backbones": [asdict(r) for r in backbones], "models": [asdict(w) for w in models]}
        out_file.write_json(out)
    if worst > TOLERANCE:
        sys.exit(f"a formula is off by {worst:.1%} of what PyTorch counts")


if __name__ == "__main__":
    main()
