"""Starts a classifier from the weights of another one, which may have other classes and another image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spml_fast.core.errors import UserError
from spml_fast.models.backbone import resample_state
from spml_fast.models.classifier import Classifier


@dataclass(frozen=True)
class WarmStart:
    """What a classifier took over.

    Attributes:
        head: whether the head was taken over; False where its own parts do not fit.
        obstacle: why it was not; empty where it was.
        matched: number of classes that both have, whose rows were taken over.
        new: classes that start fresh.
        left_out: classes of the source that are not used.
        resampled: backbone tensors that were resampled to another image size.
    """

    head: bool
    obstacle: str
    matched: int
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    resampled: tuple[str, ...]


def start_from(
    classifier: Classifier, state: Mapping[str, Tensor], there: Sequence[str], here: Sequence[str], source: str
) -> WarmStart:
    """Take over the backbone and the head of a classifier's state.

    Rows of the head's `class_parameters` are matched by the names of their classes; the head's other parameters are
    taken as they are. A head that does not fit stays fresh: another kind, other widths, or other classes than those
    that share its queries. What is not taken over keeps the values that it has.

    Args:
        classifier: changed in place.
        state: `Classifier.state_dict()` of the source; without the head's part where that is of another kind.
        there: its class names in class-id order.
        here: class names of `classifier` in class-id order.
        source: where the state comes from, for messages.

    Raises:
        UserError: the backbone's tensors do not fit, or the head does not say which of its parameters belong to
            classes, though the classes differ.
    """
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise UserError(f"{source} holds {name}, which is no part of a classifier; give a run's own weights")
        parts[part][rest] = value
    backbone, resampled = resample_state(parts["backbone"], classifier.backbone)
    own = classifier.backbone.state_dict()
    if backbone.keys() != own.keys():
        other = sorted(backbone.keys() ^ own.keys())[0]
        raise UserError(
            f"{source} does not fit the backbone: only one of them has {other}; take the options of its run"
        )
    for name, value in backbone.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{source} does not fit the backbone: {name} has the shape {list(value.shape)} there and "
                f"{list(own[name].shape)} here, and timm cannot resample it; take the image size of its run"
            )
    classifier.backbone.load_state_dict(backbone)
    rows = [(there.index(name), row) for row, name in enumerate(here) if name in set(there)]
    obstacle = _take_head(classifier, parts["head"], there, here, rows, source)
    taken = not obstacle
    known = set(there) if taken else set()
    return WarmStart(
        head=taken,
        obstacle=obstacle,
        matched=len(rows) if taken else 0,
        new=tuple(name for name in here if name not in known),
        left_out=tuple(name for name in there if name not in set(here)),
        resampled=resampled,
    )


@torch.no_grad()
def _take_head(
    classifier: Classifier,
    state: Mapping[str, Tensor],
    there: Sequence[str],
    here: Sequence[str],
    rows: Sequence[tuple[int, int]],
    source: str,
) -> str:
    """Take over the head's state, `rows` (there, here) of what belongs to classes; why it does not fit, or nothing."""
    head = classifier.head
    own, by_class = head.state_dict(), set(head.class_parameters)
    if state.keys() != own.keys():
        return "that of the run has other parts"
    if head.classes_per_query > 1:
        if list(there) != list(here):
            return (
                f"{head.classes_per_query} of its classes share a query, so that they cannot be matched by name, and "
                "the run has other classes or another order"
            )
        by_class = set()
    elif not by_class and list(there) != list(here):
        raise UserError(
            f"{source} has other classes, and head {type(head).__name__} does not say which of its parameters "
            "belong to classes (Head.class_parameters)"
        )
    for name, value in state.items():
        first = 1 if name in by_class else 0
        if value.shape[first:] != own[name].shape[first:]:
            return "that of the run has other sizes"
    source_rows, own_rows = (torch.tensor([pair[i] for pair in rows], dtype=torch.int64) for i in (0, 1))
    for name, value in state.items():
        if name in by_class:
            own[name][own_rows] = value[source_rows].to(own[name].dtype)
        else:
            own[name].copy_(value)
    return ""
