"""Scores: how much each weight matters, higher = keep.

Every score is a function ``score(name, module, ctx) -> Tensor`` of the weight's shape. It never
looks at a mask; whoever builds masks restricts it. What a score needs beyond the weight (gradients,
optimizer state, calibration statistics) comes in a `ScoreContext`, gathered once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.select import ParamSelection, leaf_parameter, unknown_name

# SparseGPT's share of the mean diagonal added to the Hessian before it is inverted.
OBS_DAMPING = 0.01

_ADAM_EPSILON = 1e-8


@dataclass
class ScoreContext:
    """What scores may need besides the weight; every mapping is by parameter name.

    Attributes:
        generator: randomness of the ``random`` score.
        weights: weights to score instead of the model's stored ones.
        gradients: dL/dw, for ``snip``, ``taylor``, ``grad``, ``synflow`` (see `sensitivity`).
        hessian_gradients: H g, for ``grasp``.
        optimizer: its state is read by ``momentum``.
        statistics: calibration statistics, for ``wanda``, ``obs``, ``signed_mean``.
        learned: trained score tensors, for ``learned``.
    """

    generator: torch.Generator | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    hessian_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    statistics: Mapping[str, InputStats] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)


ScoreFunction = Callable[[str, nn.Module, ScoreContext], Tensor]


def compute_scores(
    selection: ParamSelection,
    kind: str | ScoreFunction = "magnitude",
    ctx: ScoreContext | None = None,
) -> dict[str, Tensor]:
    """Scores of every selected parameter.

    Args:
        selection: the parameters.
        kind: one of `SCORES`, or a function with the same face.
        ctx: what that score needs.

    Returns:
        Name to score, of the weight's shape and on its device.

    Raises:
        ValueError: unknown kind, or something the score needs is missing from ``ctx``.
    """
    function = SCORES.get(kind) if isinstance(kind, str) else kind
    if function is None:
        raise ValueError(unknown_name("score", str(kind), SCORES))
    context = ctx or ScoreContext()
    with torch.no_grad():
        return {name: function(name, ref.module, context) for name, ref in selection.items()}


def magnitude(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(w) of the stored weight."""
    return _weight(name, module, ctx).abs()


def random(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """U(0, 1), drawn on the CPU so that every device and every rank draws the same."""
    weight = _weight(name, module, ctx)
    return torch.rand(weight.shape, generator=ctx.generator).to(weight.device)


def snip(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(g * w), the sensitivity of the loss to the connection.

    Reference:
        Lee et al., SNIP, arXiv 1810.02340.
    """
    return (_from(ctx.gradients, "gradients", name) * _weight(name, module, ctx)).abs()


def grasp(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """w * (H g): pruned first are the weights with the largest -w * (H g).

    Reference:
        Wang et al., GraSP, arXiv 2002.07376.
    """
    product = _from(ctx.hessian_gradients, "hessian_gradients", name)
    return _weight(name, module, ctx) * product


def synflow(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(g * w), with the gradients of `synflow_gradients`.

    Reference:
        Tanaka et al., SynFlow, arXiv 2006.05467.
    """
    return snip(name, module, ctx)


def taylor(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """(w * g)^2, the squared first-order change of the loss when the weight goes.

    Reference:
        Molchanov et al., arXiv 1906.10771.
    """
    return (_weight(name, module, ctx) * _from(ctx.gradients, "gradients", name)).square()


def grad(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(g), for growing."""
    return _from(ctx.gradients, "gradients", name).abs()


def momentum(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(SGD momentum), or abs(exp_avg / (sqrt(exp_avg_sq) + 1e-8)) of Adam, for growing."""
    if ctx.optimizer is None:
        raise ValueError("score 'momentum' needs an optimizer in its context")
    parameter = leaf_parameter(module, name.rpartition(".")[2])
    state: Mapping[str, Any] = ctx.optimizer.state.get(parameter, {})
    if "exp_avg" in state and "exp_avg_sq" in state:
        return (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + _ADAM_EPSILON)).abs()
    if isinstance(state.get("momentum_buffer"), Tensor):
        return state["momentum_buffer"].abs()
    raise ValueError(f"score 'momentum': the optimizer holds no momentum for {name!r}")


def wanda(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(w_ij) * norm_j, the weight times the norm of its input.

    Reference:
        Sun et al., Wanda, arXiv 2306.11695.
    """
    stats = _from(ctx.statistics, "statistics", name)
    weight = _weight(name, module, ctx)
    return weight.abs().float() * stats.per_weight(stats.norm, weight.shape)


def obs(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """w_ij^2 / U_jj^2, U the upper Cholesky factor of the damped inverse Hessian.

    Reference:
        Frantar and Alistarh, SparseGPT, arXiv 2301.00774.
    """
    stats = _from(ctx.statistics, "statistics", name)
    weight = _weight(name, module, ctx)
    diagonal = inverse_cholesky(stats.hessian, name=name).diagonal(dim1=-2, dim2=-1)
    return weight.float().square() / stats.per_weight(diagonal.square(), weight.shape)


def signed_mean(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """w_ij * mu_j, what the weight contributes to its output on average (signed).

    Reference:
        Zhang et al., DSnoT, arXiv 2310.08915.
    """
    stats = _from(ctx.statistics, "statistics", name)
    weight = _weight(name, module, ctx)
    return weight.float() * stats.per_weight(stats.signed_mean, weight.shape)


def learned(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    """abs(S) of a trained score tensor; see `coupling.LearnedMask`.

    Reference:
        Sehwag et al., HYDRA, arXiv 2002.10509; DASS.
    """
    return _from(ctx.learned, "learned", name).abs()


SCORES: dict[str, ScoreFunction] = {
    function.__name__: function
    for function in (
        magnitude,
        random,
        snip,
        grasp,
        synflow,
        taylor,
        grad,
        momentum,
        wanda,
        obs,
        signed_mean,
        learned,
    )
}


def inverse_cholesky(hessian: Tensor, damping: float = OBS_DAMPING, name: str = "") -> Tensor:
    """Upper Cholesky factor U of ``(H + damping * mean(diag H) * I)^-1``, so that U^T U is it.

    Args:
        hessian: (features, features) or (groups, features, features), symmetric, PSD. An input that
            was always zero (zero diagonal) counts as 1. Where float32 runs out of digits, float64
            is tried.
        damping: share of the mean diagonal added to it.
        name: named in errors.

    Raises:
        ValueError: not positive definite even after damping.
    """
    factor = _inverse_factor(hessian, damping)
    if factor is None:
        factor = _inverse_factor(hessian.double(), damping)
    if factor is None:
        raise ValueError(f"{name}: the Hessian cannot be inverted; raise damp={damping}")
    return factor.to(hessian.dtype)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean(dim=-1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    return None if bool(failed.any()) else upper


def initial_learned_scores(weight: Tensor) -> Tensor:
    """sqrt(6 / fan_in) * W / max(abs(W)): trained scores that begin as the magnitude ranking."""
    fan_in = weight[0].numel()
    largest = weight.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    return (6.0 / fan_in) ** 0.5 * weight.detach() / largest


def _weight(name: str, module: nn.Module, ctx: ScoreContext) -> Tensor:
    if name in ctx.weights:
        return ctx.weights[name]
    return leaf_parameter(module, name.rpartition(".")[2]).detach()


def _from(values: Mapping[str, Any], what: str, name: str) -> Any:
    if name not in values:
        raise ValueError(f"score of {name!r} needs ctx.{what}[{name!r}], which is missing")
    return values[name]
