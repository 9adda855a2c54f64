"""A plain multi-layer perceptron: for tests, first steps, and the papers that prune one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from aerogel.models.layers import make_activation
from aerogel.models.registry import register_model


class MLP(nn.Module):
    """Linear layers with activations between them; images are flattened.

    Args:
        img_size: height and width of the images.
        in_chans: input channels.
        num_classes: outputs; 0 for the last hidden features.
        hidden: widths of the hidden layers.
        act_layer: activation after each hidden layer.
    """

    def __init__(
        self,
        img_size: int = 28,
        *,
        in_chans: int = 1,
        num_classes: int = 10,
        hidden: Sequence[int] = (256, 128),
        act_layer: str = "relu",
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden must name at least one layer")
        self.in_features = in_chans * img_size * img_size
        self.num_features = self.head_hidden_size = hidden[-1]
        self.classifier_name = "classifier"
        widths = (self.in_features, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), make_activation(act_layer)]
        self.features = nn.Sequential(*layers)
        self.classifier: nn.Module
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, num_features)."""
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(f"expected {self.in_features} values a sample, got {x.shape[1]}")
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> logits (B, num_classes)."""
        return self.classifier(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer; 0 leaves the features."""
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifier = head

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "linear") of every hidden layer."""
        for name, module in self.features.named_modules(prefix="features"):
            if isinstance(module, nn.Linear):
                yield name, "linear"


@register_model(input_size=(1, 8, 8), num_classes=10, params=85_002)
def digits_mlp(img_size: int = 8, **kwargs: Any) -> MLP:
    """64-256-256-10 for scikit-learn's digits: trains in seconds."""
    return MLP(img_size, **{"hidden": (256, 256), **kwargs})
