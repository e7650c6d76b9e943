"""The linear phase in one step: the head of the mean feature, solved for instead of trained (`train.linear solve`).

In the linear phase the network does not change, so that one pass over the training split gives all there is to learn
from: the mean feature of every image. What is minimised over class weights w_c and biases b_c is

    F = C / M  sum_ic loss(w_c . x_i + b_c, y_ic)  +  penalty / 2  sum_c |w_c|^2

x_i is the mean feature of image i without its mean over the training split, divided by the root mean square of what is
left, one number for all channels, so that a penalty means the same for every network. `loss` is the method's own
(`Method.linear_loss`); M counts the entries that it takes. Biases carry no penalty: they alone say how frequent a class
is. With features that are not centred and a penalty on the biases too, mAP was 7 points lower (docs/operations.md).

L-BFGS over all images in fp64, from the strongest penalty to the weakest, each from the solution before it; nothing is
drawn. For losses that are convex in the logit this is the optimum, for others the one that is found on that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.methods.base import EntryLoss
from spml_fast.methods.state.memory import free_gib

# Strongest first.
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
# Taken where no validation split chooses one.
DEFAULT_PENALTY = 0.3
# L-BFGS: past steps that it keeps, evaluations at most, and the largest entry of the gradient at which it ends.
HISTORY, MOST_EVALUATIONS, TOLERANCE = 20, 1000, 1e-6
# Numbers of fp64 in a block of images or logits.
_BLOCK = 1 << 22


def require_memory(images: int, channels: int, classes: int) -> float:
    """Bytes that the linear phase keeps on every rank: features fp32 and fp64, codes int8, L-BFGS's past steps fp64.

    Args:
        images: whose features are kept on a rank.
        channels: K.
        classes: C.

    Raises:
        UserError: that is more than half of the free memory.
    """
    steps = 2 * HISTORY + 8
    size = images * (12.0 * channels + classes) + 8.0 * steps * classes * (channels + 1) + 24.0 * _BLOCK
    free = free_gib() / 2
    if size / 2**30 > free:
        raise UserError(
            f"train.linear solve keeps {images:,} x {channels:,} features on every rank, {size / 2**30:,.2f} GiB with "
            f"what belongs to them, and half of the free memory is {free:,.2f} GiB; train on more ranks, or set "
            "train.linear sgd"
        )
    return size


@dataclass(frozen=True)
class Solution:
    """A minimum of F.

    Attributes:
        parameters: fp64 [C, K + 1], class weights for the scaled features, then biases.
        penalty: that it belongs to.
        loss: the first term of F, for C classes together.
        evaluations: of F, that L-BFGS took.
        gradient: largest absolute entry of the gradient there.
    """

    parameters: Tensor
    penalty: float
    loss: float
    evaluations: int
    gradient: float


class HeadObjective:
    """F and its gradient over the images of all ranks (collective, the same on every rank).

    Args:
        features: fp32 [n, K], mean features of this rank's training images.
        codes: int8 [n, C], their labels.
        loss: of an entry.

    Raises:
        UserError: a feature is not finite, or no label counts.
    """

    def __init__(self, features: Tensor, codes: Tensor, loss: EntryLoss) -> None:
        self.features, self.codes, self.loss = features, codes, loss
        self.channels, self.classes = features.shape[1], codes.shape[1]
        self._rows = max(1, _BLOCK // max(self.channels, self.classes))
        images, total = self._sum_over_blocks(lambda x: torch.cat([x.new_tensor([float(len(x))]), x.sum(0)])).split(
            [1, self.channels]
        )
        self.mean = total / images
        square = self._sum_over_blocks(lambda x: (x - self.mean).square().sum()[None])
        scale = (square / (images * self.channels)).sqrt()
        if not bool(torch.isfinite(scale)):
            raise UserError("the network gives features that are not finite; look for damaged weights")
        # Features that are all equal say nothing, whatever they are divided by.
        self.scale = torch.where(scale > 0, scale, 1.0)
        # Once: what is minimised is evaluated some hundred times.
        self._scaled = torch.empty(features.shape, dtype=torch.float64, device=features.device)
        for part, block in zip(self._scaled.split(self._rows), features.split(self._rows), strict=True):
            torch.sub(block.double(), self.mean, out=part).div_(self.scale)
        # Class counts of each code, fp64 [3, C]: negative, positive, unknown.
        self.counts = distributed.all_reduce_sum(torch.stack([(codes == c).sum(0) for c in (0, 1, -1)]).double())
        taken = sum(float(n.sum()) for n, c in zip(self.counts, (0, 1, -1), strict=True) if self._takes(c))
        if not taken:
            raise UserError("the method's loss takes none of the training labels; nothing to solve for")
        self.weight = self.classes / taken

    def _takes(self, code: int) -> bool:
        """Whether labels of this code have a loss at all."""
        logits = torch.linspace(-4, 4, 9, dtype=torch.float64)
        return bool(self._point(logits, torch.full((9,), code, dtype=torch.int8)).any())

    def _point(self, logits: Tensor, codes: Tensor) -> Tensor:
        return self.loss.point.reference(logits, codes, *self.loss.params)

    def _sum_over_blocks(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of `part` (features fp64 [n, K]) over all blocks of all ranks."""
        parts = [part(x.double()) for x in self.features.split(self._rows)]
        empty = part(self.features[:0].double())
        return distributed.all_reduce_sum(torch.stack([empty, *parts]).sum(0))

    def __call__(self, parameters: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """(F, gradient), 0-d and fp64 [C, K + 1], at parameters of that shape."""
        weights, biases = parameters[:, :-1], parameters[:, -1]
        packed = torch.zeros(parameters.numel() + 1, dtype=torch.float64, device=parameters.device)
        gradient = packed[:-1].view_as(parameters)
        for features, codes in zip(self._scaled.split(self._rows), self.codes.split(self._rows), strict=True):
            logits = torch.addmm(biases, features, weights.T).requires_grad_()
            with torch.enable_grad():
                loss = self._point(logits, codes).sum() * self.weight
                (slope,) = torch.autograd.grad(loss, logits)
            gradient[:, :-1] += slope.T @ features
            gradient[:, -1] += slope.sum(0)
            packed[-1] += loss.detach()
        packed = distributed.all_reduce_sum(packed)
        gradient = packed[:-1].view_as(parameters)
        gradient[:, :-1] += penalty * weights
        return packed[-1] + penalty / 2 * weights.square().sum(), gradient

    def start(self) -> Tensor:
        """Parameters without any evidence: the biases that are best for weights of 0."""
        codes = torch.tensor([0, 1, -1], dtype=torch.int8, device=self.codes.device)[:, None].expand(3, self.classes)

        def at(biases: Tensor) -> tuple[Tensor, Tensor]:
            logits = biases.expand(3, -1).clone().requires_grad_()
            with torch.enable_grad():
                loss = (self._point(logits, codes) * self.counts).sum() * self.weight
                (slope,) = torch.autograd.grad(loss, logits)
            return loss.detach(), slope.sum(0)

        zeros = torch.zeros(self.classes, dtype=torch.float64, device=self.codes.device)
        biases = _lbfgs(at, zeros).parameters
        weights = biases.new_zeros(self.classes, self.channels)
        return torch.cat([weights, biases[:, None]], 1)

    def head(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Class weights [C, K] and biases [C], fp32, of the features as they are."""
        weights = parameters[:, :-1] / self.scale
        return weights.float(), (parameters[:, -1] - weights @ self.mean).float()


class _Minimum(NamedTuple):
    """Where L-BFGS ended: parameters, evaluations on the way, the value there, its gradient's largest entry."""

    parameters: Tensor
    evaluations: int
    value: float
    gradient: float


def _lbfgs(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, evaluated: Callable[[], None] = lambda: None
) -> _Minimum:
    """The minimum of a function that gives (value, gradient); `evaluated` is called after each evaluation."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MOST_EVALUATIONS,
        max_eval=MOST_EVALUATIONS,
        history_size=HISTORY,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        value, parameters.grad = function(parameters.detach())
        evaluated()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    found = parameters.detach()
    value, gradient = function(found)
    return _Minimum(found, evaluations, float(value), float(gradient.abs().max()))


@torch.no_grad()
def solve(
    objective: HeadObjective, penalties: Sequence[float] = PENALTIES, evaluated: Callable[[], None] = lambda: None
) -> Iterator[Solution]:
    """The minimum of F at each penalty, in their order (collective).

    Args:
        objective: F.
        penalties: the strongest first, since each begins at the solution of the one before.
        evaluated: called after each evaluation of F.
    """
    parameters = objective.start()
    for penalty in penalties:
        found = _lbfgs(functools.partial(objective, penalty=penalty), parameters, evaluated)
        parameters = found.parameters
        loss = found.value - penalty / 2 * float(parameters[:, :-1].square().sum())
        yield Solution(parameters, penalty, loss, found.evaluations, found.gradient)
