"""How far a classifier withstands inputs made to fool it, and inputs that are merely bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt


@torch.no_grad()
def corruption_accuracy(
    predict: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    labels: Tensor,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Accuracy of classifiers on corrupted copies of images; all see the same copies.

    Args:
        predict: by name, a function of (N, C, H, W) uint8 images that gives (N, classes) logits,
            which normalises or resizes them as its classifier needs.
        images: (N, C, H, W) uint8, see `aerogel.data.corrupt`.
        labels: (N,) int64.
        corruptions: some of `aerogel.data.CORRUPTIONS`.
        severities: some of 1 to 5.
        seed: of the corruptions.

    Returns:
        For every classifier and corruption the accuracy at each severity, in [0, 1].

    Raises:
        ValueError: no image, lengths that differ, an unknown corruption or severity.

    Reference:
        Hendrycks and Dietterich, arXiv 1903.12261.
    """
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images and labels must be as many, at least 1, got {len(images)} and {len(labels)}"
        )
    found: dict[str, dict[str, list[float]]] = {
        name: {corruption: [] for corruption in corruptions} for name in predict
    }
    for corruption in corruptions:
        for severity in severities:
            bad = corrupt(images, corruption, severity, seed)
            for name, function in predict.items():
                right = function(bad).argmax(dim=1) == labels
                found[name][corruption].append(float(right.double().mean()))
    return {
        name: {corruption: tuple(values) for corruption, values in by_corruption.items()}
        for name, by_corruption in found.items()
    }


def fgsm_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    *,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    batch_size: int = 256,
) -> float:
    """Share of images still classified rightly after one step along the sign of the gradient.

    Args:
        model: logits (B, classes) from images; runs in eval mode, and is left as it was.
        images: (N, ...) float, as the model takes them.
        labels: (N,) int64.
        epsilon: size of the step in units of the images: for images normalised by a deviation,
            8/255 divided by it. A tensor broadcasts against a batch.
        lower: least value an image can have; unbounded by default.
        upper: largest one.
        batch_size: images at once.

    Returns:
        Accuracy in [0, 1]; with ``epsilon=0`` the plain one.

    Raises:
        ValueError: negative epsilon, no image, or lengths that differ.

    Reference:
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv 1412.6572.
    """
    if bool((torch.as_tensor(epsilon) < 0).any()):
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images and labels must be as many, at least 1, got {len(images)} and {len(labels)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    modes = [(module, module.training) for module in model.modules()]
    right = 0
    try:
        model.eval()
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        for clean, truth in batches:
            attacked = _step(model, clean, truth, epsilon)
            if lower is not None or upper is not None:
                attacked = _clamped(attacked, lower, upper)
            with torch.no_grad():
                right += int((model(attacked).argmax(dim=1) == truth).sum())
    finally:
        for module, mode in modes:
            module.training = mode
    return right / len(labels)


def _step(model: nn.Module, clean: Tensor, truth: Tensor, epsilon: float | Tensor) -> Tensor:
    with torch.enable_grad():
        seen = clean.detach().clone().requires_grad_()
        # The gradient of the input alone: the parameters' own gradients stay as they are.
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(seen), truth), seen)
    return clean.detach() + epsilon * gradient.sign()


def _clamped(images: Tensor, lower: float | Tensor | None, upper: float | Tensor | None) -> Tensor:
    if lower is not None:
        images = images.maximum(torch.as_tensor(lower).to(images))
    return images if upper is None else images.minimum(torch.as_tensor(upper).to(images))
