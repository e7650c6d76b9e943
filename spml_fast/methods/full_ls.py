"""Full labels with label smoothing, BCE-LS: the AN-LS loss on the complete annotation, e = 0.1.

Where released code differs: as for AN-LS.

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spml_fast.data.labels import SparseLabels
from spml_fast.methods.an_ls import ANLSOptions, AssumeNegativeSmoothed
from spml_fast.methods.base import MethodOptions, register
from spml_fast.methods.full import FullLabels


@dataclass(frozen=True)
class FullLSOptions(ANLSOptions):
    """Full labels with label smoothing. Fields as for AN-LS."""

    __doc__ = ANLSOptions.__doc__
    name: str = "full_ls"


@register("full_ls")
class FullLabelsSmoothed(AssumeNegativeSmoothed):
    """The smoothed loss on labels of which none is unknown."""

    Options: ClassVar[type[MethodOptions]] = FullLSOptions
    label_source: ClassVar[str] = "known"

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """Every label must be known."""
        FullLabels.check_labels(labels, options)
