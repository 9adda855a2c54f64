"""Gradients for pruning scores, taken without leaving a trace in the model.

Buffers (batch-norm statistics), training flags and ``.grad`` are as before afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.select import ParamSelection

LossFn = Callable[[Tensor, Tensor], Tensor]

# GraSP's defaults: the softmax is flattened, and every class gives the same number of samples.
GRASP_TEMPERATURE = 200.0
GRASP_PER_CLASS = 25


def loss_gradients(
    model: nn.Module,
    selection: ParamSelection,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn = F.cross_entropy,
) -> dict[str, Tensor]:
    """Mean gradient of the loss over some batches (SNIP and Taylor take one).

    Args:
        model: in the mode (train or eval) it should run in.
        selection: parameters to differentiate.
        batches: (inputs, targets) pairs.
        loss_fn: of (outputs, targets), a scalar.

    Returns:
        Name to dense gradient.

    Raises:
        ValueError: no batch, or a selected parameter that does not require gradients.
    """
    leaves = _leaves(selection)
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = 0
    with _untouched(model):
        for x, y in batches:
            loss = loss_fn(model(x), y)
            for name, gradient in _gradients(loss, leaves).items():
                totals[name] += gradient.detach()
            count += 1
    if count == 0:
        raise ValueError("batches is empty: gradients need at least one batch")
    return {name: total / count for name, total in totals.items()}


def hessian_gradients(
    model: nn.Module,
    selection: ParamSelection,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss_fn: LossFn = F.cross_entropy,
    temperature: float = GRASP_TEMPERATURE,
) -> dict[str, Tensor]:
    """H g summed over parts of a batch, for GraSP.

    Args:
        model: in the mode it should run in.
        selection: parameters to differentiate.
        batches: the parts (`balanced_halves` makes the paper's two) whose gradients are summed.
        loss_fn: of (logits / temperature, targets), a scalar.
        temperature: divides the logits.

    Reference:
        Wang et al., GraSP, arXiv 2002.07376.
    """
    if not batches:
        raise ValueError("batches is empty: gradients need at least one batch")
    check_number("temperature", temperature, "(0, inf)")
    leaves = _leaves(selection)
    first = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    product = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    with _untouched(model):
        for x, y in batches:
            loss = loss_fn(model(x) / temperature, y)
            for name, gradient in _gradients(loss, leaves).items():
                first[name] += gradient.detach()
        for x, y in batches:
            loss = loss_fn(model(x) / temperature, y)
            gradients = _gradients(loss, leaves, create_graph=True)
            inner = torch.stack([(first[n] * gradients[n]).sum() for n in leaves]).sum()
            for name, gradient in _gradients(inner, leaves).items():
                product[name] += gradient.detach()
    return product


def balanced_halves(
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    per_class: int = GRASP_PER_CLASS,
) -> list[tuple[Tensor, Tensor]]:
    """The first ``per_class`` samples of every class, dealt into two halves.

    Raises:
        ValueError: the batches hold too few samples of some class.
    """
    check_count("num_classes", num_classes)
    check_count("per_class", per_class)
    seen: list[list[Tensor]] = [[] for _ in range(num_classes)]
    for x, y in batches:
        for sample, label in zip(x, y.tolist(), strict=True):
            if len(seen[label]) < per_class:
                seen[label].append(sample)
        if all(len(samples) == per_class for samples in seen):
            break
    short = [label for label, samples in enumerate(seen) if len(samples) < per_class]
    if short:
        raise ValueError(f"batches hold fewer than {per_class} samples of classes {short}")
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    samples = torch.stack([sample for group in seen for sample in group])
    return [(samples[part::2], labels[part::2].to(samples.device)) for part in (0, 1)]


def synflow_gradients(
    model: nn.Module, selection: ParamSelection, input_shape: Sequence[int]
) -> dict[str, Tensor]:
    """Gradients of the sum of outputs at an input of ones, with every weight replaced by abs(w).

    Runs in eval mode and float64, because products of many absolute weights overflow float32.

    Args:
        model: any network of one float input.
        selection: parameters to differentiate.
        input_shape: shape of one sample, without the batch.

    Reference:
        Tanaka et al., SynFlow, arXiv 2006.05467.
    """
    positive = {
        name: p.detach().abs().to(_widened(p)).requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }
    buffers = {name: b.detach().to(_widened(b)) for name, b in model.named_buffers()}
    own = {id(p): name for name, p in model.named_parameters()}
    names = {name: own[id(ref.parameter)] for name, ref in selection.items()}
    _leaves(selection)
    device = next(model.parameters()).device
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=device)
    with _untouched(model):
        model.eval()
        total = functional_call(model, {**positive, **buffers}, (ones,)).sum()
        gradients = _gradients(total, {name: positive[own] for name, own in names.items()})
    return {name: gradient.detach() for name, gradient in gradients.items()}


def _leaves(selection: ParamSelection) -> dict[str, Tensor]:
    leaves: dict[str, Tensor] = dict(selection.parameters())
    frozen = [name for name, leaf in leaves.items() if not leaf.requires_grad]
    if frozen:
        raise ValueError(f"parameters {frozen} do not require gradients")
    return leaves


def _gradients(
    loss: Tensor, leaves: dict[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    values = torch.autograd.grad(
        loss, list(leaves.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if value is None else value
        for (name, leaf), value in zip(leaves.items(), values, strict=True)
    }


def _widened(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_floating_point() else tensor.dtype


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
