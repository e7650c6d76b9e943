"""A classifier as tools for class activation maps want it: a module from images to logits, with a layer to look at.

    model = predictor.cam_model()
    GradCAM(model, model.target_layers)                    # pytorch-grad-cam
    LayerCAM(model, model.target_layers)                   # torch-cam
    CAM(model, model.target_layers, fc_layer=model.head)   # torch-cam, of a CAM head

The target layer gives the feature map that the head reads, in PyTorch's usual shape, whatever the backbone is: no
`reshape_transform` is needed for it. For layers within the backbone `CamModel.reshape_transform` takes a transformer's
tokens and channels-last maps to that shape.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spml_fast.models.classifier import Classifier, check_alpha


class Features(nn.Module):
    """The backbone: images [B, 3, S, S] to the feature map [B, K, h, w]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Features, which carry a gradient even where the backbone is frozen."""
        features = self.classifier.features(images).permute(0, 3, 1, 2)
        if torch.is_grad_enabled() and not features.requires_grad:
            features = features.detach().requires_grad_()
        return features


class CamModel(nn.Module):
    """Images [B, 3, S, S] to logits [B, C].

    Args:
        classifier: in evaluation mode; its parameters are shared.
        alpha: BoostLU's factor of the logits; 1 for heads that do not boost.

    Attributes:
        head: the classifier's.
        features: from images to the feature map that the head reads.
        alpha: as given.

    Raises:
        UserError: alpha is not greater than 0.
    """

    def __init__(self, classifier: Classifier, alpha: float = 1.0) -> None:
        super().__init__()
        check_alpha(alpha, "alpha")
        self.alpha = alpha
        # The head first, so that tools that look layers up by name find it as `head`.
        self.head = classifier.head
        self.features = Features(classifier)
        self.eval()

    @property
    def backbone(self) -> nn.Module:
        """The timm model, for layers within it."""
        backbone: nn.Module = self.features.classifier.backbone
        return backbone

    @property
    def target_layers(self) -> list[nn.Module]:
        """The layer whose maps explain the logits: what the head reads, [B, K, h, w]."""
        return [self.features]

    def forward(self, images: Tensor) -> Tensor:
        """Logits fp32 [B, C] at `alpha`."""
        features: Tensor = self.features(images)
        return self.features.classifier.classify(features.permute(0, 2, 3, 1), self.alpha).logits

    def reshape_transform(self, output: Tensor) -> Tensor:
        """What a layer within the backbone gives, as [B, K, h, w].

        Args:
            output: [B, L, K] tokens (those before the image's are dropped), [B, h, w, K] or [B, K, h, w], as the
                backbone's own features.

        Raises:
            ValueError: the tokens are no square grid.
        """
        classifier = self.features.classifier
        if output.ndim == 3:
            tokens = output[:, classifier.prefix_tokens :]
            side = round(tokens.shape[1] ** 0.5)
            if side * side != tokens.shape[1]:
                raise ValueError(f"{tokens.shape[1]} tokens are no square grid")
            output = tokens.unflatten(1, (side, side))
        elif classifier.layout == "NCHW":
            return output
        return output.permute(0, 3, 1, 2)
