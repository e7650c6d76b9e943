"""Full labels: binary cross-entropy on the complete annotation, the upper reference of every table."""

from __future__ import annotations

from typing import ClassVar

from spml_fast.core.errors import UserError
from spml_fast.data.labels import UNKNOWN, SparseLabels
from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import MethodOptions, register


@register("full")
class FullLabels(AssumeNegative):
    """The assumed-negative loss on labels of which none is unknown."""

    label_source: ClassVar[str] = "known"

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """Every label must be known."""
        unlisted = labels.default == UNKNOWN and labels.indptr[-1] < len(labels) * labels.num_classes
        if unlisted or (labels.codes == UNKNOWN).any():
            raise UserError(
                f"method {options.name} needs every label of the training split, but some are unknown; "
                "use partial, an or ll_r"
            )
