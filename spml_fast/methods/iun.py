"""IUN: ignore unobserved positives, an oracle.

L = 1/(B C) sum [ l+ on observed positives, l- on all true negatives, 0 on the positives that were not observed ],
logarithms guarded with 1e-5. It reads the known labels of the training split, so it is a bound and no method: what
assuming negatives would reach if it never hit a hidden positive.

Where released code differs: one copy of the loss reads true negatives as -1, another as 0; here the label codes decide.

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.iu import IgnoreUnknown, IUOptions


@dataclass(frozen=True)
class IUNOptions(IUOptions):
    """Ignore unobserved positives (oracle). Fields as for IU."""

    __doc__ = IUOptions.__doc__
    name: str = "iun"


@register("iun")
class IgnoreUnobservedPositives(IgnoreUnknown):
    """Observed positives and all true negatives."""

    Options: ClassVar[type[MethodOptions]] = IUNOptions
    uses_truth: ClassVar[bool] = True
    # The truth enters its loss beside the labels.
    solvable: ClassVar[bool] = False

    def codes(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Observed positives, known negatives, and unknown for the rest."""
        known = batch.labels if batch.truth is None else batch.truth
        rest = torch.where(known == NEGATIVE, NEGATIVE, UNKNOWN)
        return torch.where(batch.labels == POSITIVE, POSITIVE, rest).to(torch.int8), {}
