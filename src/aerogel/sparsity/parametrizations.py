"""Masks in the forward pass: masked-weight functions and the parametrizations that apply them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel.arguments import check_count
from aerogel.sparsity.keep import keep_factor
from aerogel.sparsity.patterns import GroupPattern
from aerogel.sparsity.select import ParamRef
from aerogel.sparsity.topk import topk_mask


class _StraightThrough(torch.autograd.Function):
    """w * factor forward, identity backward."""

    @staticmethod
    def forward(weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


class _LearnedTopK(torch.autograd.Function):
    """W * m forward, m the mask of scores S; dL/dS = sign(S) * (g * W), dL/dW = g * m."""

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return weight * keep_factor(mask, weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        weight, scores, mask = ctx.saved_tensors
        kept = keep_factor(mask, gradient.dtype)
        return gradient * kept, scores.sign() * (gradient * weight), None


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """W * m; the gradient is g * m."""
    return weight * keep_factor(mask, weight.dtype)


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """W * m; the gradient is g, everywhere."""
    return _StraightThrough.apply(weight, keep_factor(mask, weight.dtype))


def soft(
    weight: Tensor, mask: Tensor, beta: Tensor, grad: Literal["ste", "chain"] = "ste"
) -> Tensor:
    """W * (m + beta * (1 - m)); the gradient is g (``"ste"``) or that of the product (``"chain"``).

    Args:
        weight: the stored weight.
        mask: bool, of its shape.
        beta: 0-dim, the part that pruned weights still play.
        grad: see above.
    """
    # lerp is exact at both ends: 1 where kept, beta where not.
    factor = torch.lerp(beta, torch.ones_like(beta), keep_factor(mask, beta.dtype))
    return weight * factor if grad == "chain" else _StraightThrough.apply(weight, factor)


def learned_mask(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """W * m for a mask made of ``scores``; trains the scores straight through the selection.

    Reference:
        HYDRA, arXiv 2002.10509.
    """
    return _LearnedTopK.apply(weight, scores, mask)


class MaskedWeight(nn.Module):
    """Parametrization W -> W * m with g * m (``frozen``) or g (``ste``) as gradient.

    Args:
        mask: bool, of the weight's shape; a buffer, so that it is saved with the model.
        straight: pass the whole gradient.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, straight: bool = False) -> None:
        super().__init__()
        self.straight = straight
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self.mask) if self.straight else masked(weight, self.mask)


class SoftMaskedWeight(nn.Module):
    """Parametrization W -> W * (m + beta * (1 - m)); beta is a buffer, so changing it is free."""

    mask: Tensor
    beta: Tensor

    def __init__(self, mask: Tensor, beta: float, grad: Literal["ste", "chain"]) -> None:
        super().__init__()
        self.grad: Literal["ste", "chain"] = grad
        self.register_buffer("mask", mask)
        self.register_buffer("beta", torch.tensor(float(beta), device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        return soft(weight, self.mask, self.beta.to(weight.dtype), self.grad)


class LearnedMask(nn.Module):
    """Parametrization W -> W * topk(abs(S)) with trainable scores S of the weight's shape.

    Args:
        scores: initial S, see `scores.initial_learned_scores`.
        keep: weights kept (ignored for group patterns).
        pattern: a group pattern (N:M) instead of a count.
    """

    def __init__(self, scores: Tensor, keep: int, pattern: GroupPattern | None = None) -> None:
        super().__init__()
        check_count("keep", keep, 0, scores.numel())
        self.scores = nn.Parameter(scores.detach().clone())
        self.keep = keep
        self.pattern = pattern

    @property
    def mask(self) -> Tensor:
        """The mask that the scores give now."""
        score = self.scores.detach().abs()
        return topk_mask(score, self.keep) if self.pattern is None else self.pattern.select(score)

    def forward(self, weight: Tensor) -> Tensor:
        return learned_mask(weight, self.scores, self.mask)


# Where a parametrized module remembers the order of its parameters: an optimizer's state is matched
# to parameters by their order, so it must be the same after the parametrization as before.
_ORDER = "_aerogel_parameter_order"

_PARAMETRIZATIONS = (MaskedWeight, SoftMaskedWeight, LearnedMask)


def find_parametrization(module: nn.Module, attribute: str) -> nn.Module | None:
    """The mask parametrization on ``module.attribute``, if there is one."""
    if not parametrize.is_parametrized(module, attribute):
        return None
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    chain = lists[attribute]
    assert isinstance(chain, nn.ModuleList)
    return next((part for part in chain if isinstance(part, _PARAMETRIZATIONS)), None)


def attach_parametrization(ref: ParamRef, parametrization: nn.Module) -> None:
    """Put one parametrization on every place that holds the parameter.

    Raises:
        ValueError: the parameter is parametrized already.
    """
    for module, attribute in ref.places:
        if parametrize.is_parametrized(module, attribute):
            raise ValueError(
                f"{ref.name!r} is already parametrized; finalize the other pruner (or remove its "
                f"parametrizations) first"
            )
    for module, attribute in ref.places:
        module.__dict__[_ORDER] = [*module.__dict__.get(_ORDER, module._parameters)]
        parametrize.register_parametrization(module, attribute, parametrization)


@torch.no_grad()
def detach_parametrization(ref: ParamRef, mask: Tensor) -> None:
    """Zero the masked weights for good and take our parametrization off, leaving any other on."""
    ref.parameter.masked_fill_(~mask, 0.0)
    for module, attribute in ref.places:
        own = find_parametrization(module, attribute)
        if own is None:
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        chain = lists[attribute]
        assert isinstance(chain, nn.ModuleList)
        if len(chain) == 1:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            restore_parameter_order(module)
        else:
            del chain[list(chain).index(own)]


def restore_parameter_order(module: nn.Module) -> None:
    """Put parameters back where they stood before `attach_parametrization`."""
    order = module.__dict__.get(_ORDER, [])
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    if not parametrize.is_parametrized(module):
        module.__dict__.pop(_ORDER, None)
