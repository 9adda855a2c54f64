"""Which weights of a network are pruned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from aerogel.pruning.method import Method
from aerogel.sparsity import parse_pattern, select_parameters


def pruned_parameters(
    model: nn.Module,
    pattern: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    proposed: Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the parameters to prune, in the model's order.

    Those included; else those the model proposes (`prune_targets()`); else those proposed; else
    every linear and convolution weight. Of these, the ones that the pattern fits (see
    `unfit_parameters`).

    Args:
        model: The network.
        pattern: What is zero together.
        include: Globs of parameter names.
        exclude: Globs of parameter names to leave dense.
        proposed: Names that the method proposes.

    Raises:
        ValueError: A glob matches nothing, the pattern does not fit an included weight, or nothing
            is left.
    """
    fit, unfit = _split(model, pattern, include, exclude, proposed)
    if not fit:
        example = f", for example {next(iter(unfit.values()))}" if unfit else ""
        raise ValueError(f"nothing to prune: no weight fits pattern {pattern!r}{example}")
    return fit


def parameters_for(
    method: Method,
    model: nn.Module,
    pattern: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """The same for a method, with what it proposes.

    Raises:
        ValueError: As `pruned_parameters`, or the method is not for this network.
    """
    if (reason := method.unfit(model)) is not None:
        raise ValueError(f"method = {method.slug!r} cannot prune this network: {reason}")
    return pruned_parameters(model, pattern, include, exclude, method.proposes(model))


def unfit_parameters(
    model: nn.Module,
    pattern: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    proposed: Sequence[str] = (),
) -> tuple[str, ...]:
    """Weights left dense because the pattern does not fit them, where nobody named them."""
    return tuple(_split(model, pattern, include, exclude, proposed)[1])


def _split(
    model: nn.Module,
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
    proposed: Sequence[str],
) -> tuple[tuple[str, ...], dict[str, str]]:
    wanted = include or [f"{name}.weight" for name, _ in _targets(model)] or proposed
    selected = select_parameters(model, include=tuple(wanted), exclude=tuple(exclude))
    shape_rule = parse_pattern(pattern)
    fit, unfit = [], {}
    for name, reference in selected.items():
        try:
            shape_rule.validate(reference.shape, name)
        except ValueError as error:
            if include:
                raise
            unfit[name] = str(error)
        else:
            fit.append(name)
    return tuple(fit), unfit


def _targets(model: nn.Module) -> list[tuple[str, str]]:
    targets = getattr(model, "prune_targets", None)
    return list(targets()) if callable(targets) else []
