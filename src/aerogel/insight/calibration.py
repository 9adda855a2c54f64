"""How far a classifier's confidence can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

# As in Guo et al. and in the papers that compare sparse networks by it.
BINS = 15

_ROW_SUM_TOLERANCE = 1e-3


@torch.no_grad()
def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy, over bins of equal width, weighted by their size.

    Args:
        probabilities: (samples, classes), rows of a softmax.
        labels: (samples,) int64.
        bins: of the confidence, which is the largest probability; bin b is (b/bins, (b+1)/bins].

    Returns:
        In [0, 1]; 0 is perfect.

    Raises:
        ValueError: shapes that do not fit, rows that are not probabilities, labels out of range,
            no sample, or no bin.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    gaps, _ = _gaps(probabilities, labels, bins)
    return float(gaps.sum() / len(labels))


@torch.no_grad()
def maximum_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Largest gap between confidence and accuracy of any bin that holds a sample.

    Arguments, errors and reference are those of `expected_calibration_error`.
    """
    gaps, counts = _gaps(probabilities, labels, bins)
    return float((gaps / counts.clamp(min=1)).max())


@torch.no_grad()
def worst_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy on the class that is recognised worst, of those that occur.

    Args:
        predicted: (samples,) int64 classes.
        labels: (samples,) int64 true classes, not negative.

    Returns:
        In [0, 1].

    Raises:
        ValueError: another shape, no sample, or a negative label.
    """
    if labels.dim() != 1 or len(labels) == 0 or predicted.shape != labels.shape:
        raise ValueError(
            "predicted and labels must be (samples,) each, at least 1, got shapes "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    right = labels[predicted.to(labels.device) == labels]
    counts = labels.bincount()
    shares = right.bincount(minlength=len(counts)).double() / counts
    return float(shares[counts > 0].min())


@torch.no_grad()
def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a sample of the training distribution scores above one from outside.

    Args:
        inside: (samples,) scores on data like the training data, e.g. the largest softmax
            probability of each.
        outside: (samples,) scores on other data.

    Returns:
        The area under the ROC curve, in [0, 1]: 0.5 is chance; ties count half.

    Raises:
        ValueError: a score that is nan, another shape, or no sample.

    Reference:
        Hendrycks and Gimpel, arXiv 1610.02136.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be (samples,), got shape {tuple(scores.shape)}")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} holds nan")
    ordered = outside.double().sort().values
    asked = inside.double().to(ordered.device).contiguous()
    below = torch.searchsorted(ordered, asked, right=False)
    up_to = torch.searchsorted(ordered, asked, right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


def _gaps(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Of every bin: the distance of its summed confidence from its hits, and its samples."""
    _check_probabilities(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, predicted = probabilities.double().max(dim=1)
    correct = (predicted == labels.to(predicted.device)).double()
    edge = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    place = torch.bucketize(confidence, edge)  # right=False: an edge belongs to the bin below it
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, place, correct - confidence)
    return gap.abs(), place.bincount(minlength=bins)


def _check_probabilities(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.dim() != 2 or len(probabilities) == 0:
        raise ValueError(
            f"probabilities must be (samples, classes), got shape {tuple(probabilities.shape)}"
        )
    samples, classes = probabilities.shape
    if labels.shape != (samples,):
        raise ValueError(f"labels must be ({samples},), got shape {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}")
    sums = probabilities.double().sum(dim=1)
    # Written so that a nan fails too.
    if not bool((probabilities >= 0).all() and ((sums - 1).abs() <= _ROW_SUM_TOLERANCE).all()):
        raise ValueError("probabilities must be rows of a softmax: not negative, with sum 1")
