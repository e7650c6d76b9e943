"""What every head shares: its output, the interface, the registry, and its options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from spml_kernels.cam_mask.op import MapNorm
from torch import Tensor, nn

from spml_fast.core.config import HeadOptions as HeadOptions
from spml_fast.core.errors import UserError
from spml_fast.core.registry import Registry


@dataclass(frozen=True)
class MaskOptions:
    """How images are masked by the maps of their observed classes; see `spml_kernels.cam_mask.op`.

    Attributes:
        threshold: a pixel is kept where the normalised map is greater.
        norm: over what the map is normalised.
        group: images that are normalised together in the batch modes.
    """

    threshold: float
    norm: MapNorm
    group: int


class HeadOutput(NamedTuple):
    """What a head makes of a feature map.

    A named tuple and no dataclass: DeepSpeed looks for the tensors of a module's output in tuples, lists and
    dictionaries alone, and at ZeRO stage 3 it gathers the module's parameters for the backward pass when it finds them.

    Attributes:
        mean: mean(M) [B, C] fp32, the logits at alpha 1; the head's logits where there is no map.
        mean_relu: mean(relu M) [B, C] fp32, or None when it was not asked for or there is no map.
        maps: [B, N, h, w] fp32 maps of the classes asked for, else None.
        masked: [B, 3, S, S] images masked by those maps, when that was asked for, else None.
        attention: [B, N, h, w] fp32 where the queries of those classes look, when maps were asked for and the head has
            queries; never negative, a map sums to 1 over its cells in evaluation. Else None.
    """

    mean: Tensor
    mean_relu: Tensor | None = None
    maps: Tensor | None = None
    masked: Tensor | None = None
    attention: Tensor | None = None


class Head(nn.Module):
    """Feature map to logits. Subclass, set the class attributes, implement `forward`, and decorate with `@register`.

    Parameters are used inside the forward of the module that owns them, so that ZeRO stage 3 can gather them.

    Attributes:
        supports_boostlu: whether BoostLU's alpha has a meaning: the logits are the spatial mean of a class activation
            map.
        class_parameters: names of the parameters whose first dimension is the class, so that a run that starts from
            another one takes the rows of the classes that both have.
        affine_in_mean: whether the logits at alpha 1 are an affine function of the mean feature, so that
            `train.linear solve` can solve for the head; `set_affine` takes the solution.
        classes_per_query: classes that read one query, of a head with queries. From 2 on they share a map, and the
            head's parameters cannot be matched by class: only the same classes in the same order can be taken over.
        options: an instance of `Options`; a subclass with options of its own declares their type.
    """

    Options: ClassVar[type[HeadOptions]] = HeadOptions
    supports_boostlu: ClassVar[bool] = False
    affine_in_mean: ClassVar[bool] = False
    class_parameters: ClassVar[tuple[str, ...]] = ()
    classes_per_query: int = 1
    options: HeadOptions

    def __init__(self, channels: int, num_classes: int, grid: tuple[int, int], options: HeadOptions) -> None:
        """Make the head with random parameters.

        Args:
            channels: K of the feature map.
            num_classes: C.
            grid: (h, w) of the feature map at the configured image size.
            options: an instance of `Options`.
        """
        super().__init__()
        self.options = options

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        raise NotImplementedError

    def set_bias(self, logits: Tensor, alpha: float) -> None:
        """Start the biases so that an image without any evidence gets these logits.

        Args:
            logits: fp32 [C].
            alpha: BoostLU's factor in training, which positive biases pass through; heads without a map ignore it.
        """
        raise NotImplementedError

    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Make the logits at alpha 1 `weight` times the mean feature plus `bias`, of a head that is `affine_in_mean`.

        Args:
            weight: fp32 [C, K].
            bias: fp32 [C].
        """
        raise NotImplementedError

    def forward(
        self,
        features: Tensor,
        boost: bool = True,
        classes: Tensor | None = None,
        images: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> HeadOutput:
        """The parts of the logits, and what is made from the same features.

        Args:
            features: [B, h, w, K].
            boost: whether mean(relu M) is wanted; heads without a map ignore it.
            classes: int64 [B, N], padded with -1; maps of these classes are wanted, or images masked by them.
            images: [B, 3, S, S] to be masked.
            mask: how; the masked images are given instead of the maps.
        """
        raise NotImplementedError


H = TypeVar("H", bound=type[Head])
HEADS: Registry[Head] = Registry("head", "model.head")


def register(name: str) -> Callable[[H], H]:
    """Class decorator: make a head known by `name`."""
    return HEADS.register(name)


def head_names() -> list[str]:
    """Names of all heads."""
    return HEADS.names()


def get_head(name: str) -> type[Head]:
    """The head class called `name`; `UserError` lists the names that exist."""
    return HEADS.get(name)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` suits an annotation made of int, float, bool, str, None, Literal and unions of them."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is not None:
        return any(_fits(value, k) for k in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def head_options(name: str, values: HeadOptions | dict[str, Any]) -> HeadOptions:
    """The options of a head from `model.head_options`: as they are, or made from a dictionary.

    Raises:
        UserError: no such head or option, a value of the wrong type, or options of another head.
    """
    cls = get_head(name).Options
    if isinstance(values, HeadOptions):
        if type(values) is not cls:
            raise UserError(f"model.head_options are those of another head than {name} ({type(values).__name__})")
        return values
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'none'}"
            raise UserError(f"model.head_options: head {name} has no option {key!r}; {hint}")
        if not _fits(value, hints[key]):
            kind = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            raise UserError(f"model.head_options.{key} is {value!r}; it must be {kind}")
    return cls(**values)


def make_head(
    name: str, values: HeadOptions | dict[str, Any], channels: int, num_classes: int, grid: tuple[int, int]
) -> Head:
    """The head called `name` with its options.

    Args:
        name: a registered head.
        values: its options, or a dictionary of them by name; the others keep their defaults.
        channels: K of the feature map.
        num_classes: C.
        grid: (h, w) of the feature map at the configured image size.

    Raises:
        UserError: no such head, or options that do not fit.
    """
    return get_head(name)(channels, num_classes, grid, head_options(name, values))
