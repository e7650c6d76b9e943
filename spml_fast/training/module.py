"""What DeepSpeed trains: classifier and method as one module."""

from __future__ import annotations

from torch import Tensor, nn

from spml_fast.core.batch import Batch
from spml_fast.methods import Method, Progress
from spml_fast.models.classifier import Classifier


class TrainingModule(nn.Module):
    """Classifier and method as one module, so that DeepSpeed sees one forward and one backward at every stage."""

    def __init__(self, classifier: Classifier, method: Method) -> None:
        super().__init__()
        self.classifier = classifier
        self.method = method

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-d) and metrics of one micro-batch."""
        out = self.method(self.classifier, batch, progress)
        return out.loss, out.metrics
