"""Penalties that prepare a network for pruning; the caller adds `.value()` to the loss (P17).

    penalty = WeightLogPenalty(select_parameters(model), weight=1e-3)
    loss = criterion(model(x), y) + penalty.value()

All sums run in float32 (or wider), whatever the dtype of the weights.

Reference: Prasetyo, Yudistira, Widodo, "Sparse then Prune", arXiv 2307.11988 (log penalties);
Wen et al., "Learning Structured Sparsity", arXiv 1608.03665 (group lasso).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_names, check_number
from aerogel.sparsity.attention_implementation import switch_attention
from aerogel.sparsity.fused_penalty import attention_log_penalty
from aerogel.sparsity.patterns import Filter, Pattern
from aerogel.sparsity.select import ParamRef, ParamSelection, unknown_name


def attention_log(probabilities: Tensor) -> Tensor:
    """mean(ln(1 + A^2)) of attention probabilities.

    Smallest, ln(1 + 1/n^2), for uniform rows over n tokens, largest, ln(2)/n, for one-hot rows: it
    pushes attention towards uniform rows, not towards zeros.

    Args:
        probabilities: (..., queries, keys), rows summing to 1.

    Returns:
        Scalar, float32 or wider.

    Reference: arXiv 2307.11988, equation 4.
    """
    return torch.log1p(_wide(probabilities).square()).mean()


class WeightPenalty:
    """A differentiable function of selected weights, times `weight`.

    Args:
        selection: the parameters it covers, as `select_parameters` returns them.
        weight: factor lambda >= 0.

    Raises:
        ValueError: weight negative or not finite.
    """

    def __init__(self, selection: ParamSelection, weight: float) -> None:
        self.selection = selection
        self.weight = _checked_weight(weight)

    def value(self) -> Tensor:
        """The penalty as a scalar with gradient, zero without computation if weight is 0."""
        first = next(iter(self.selection.values()))
        if self.weight == 0.0:
            return torch.zeros((), device=first.parameter.device)
        terms = [self._term(self._tensor(ref), ref) for ref in self.selection.values()]
        return self.weight * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _tensor(self, ref: ParamRef) -> Tensor:
        return _wide(getattr(ref.module, ref.attribute))

    def _term(self, weight: Tensor, ref: ParamRef) -> Tensor:
        raise NotImplementedError


class WeightLogPenalty(WeightPenalty):
    """weight * sum ln(1 + w^2): pulls small weights to zero, hardly touches large ones."""

    def _term(self, weight: Tensor, ref: ParamRef) -> Tensor:
        return torch.log1p(weight.square()).sum()


class WeightL1(WeightPenalty):
    """weight * sum |w|."""

    def _term(self, weight: Tensor, ref: ParamRef) -> Tensor:
        return weight.abs().sum()


class GroupLasso(WeightPenalty):
    """weight * sum over groups of sqrt(group size) * ||w_group||_2: whole groups go to zero.

    Args:
        selection: the parameters it covers.
        weight: factor lambda >= 0.
        pattern: what forms a group, e.g. `Filter()` (default), `Channel()`, `Block(4, 1)`.

    Raises:
        ValueError: weight negative, or a pattern that does not fit a tensor (named).

    Reference: arXiv 1608.03665.
    """

    def __init__(
        self, selection: ParamSelection, weight: float, pattern: Pattern | None = None
    ) -> None:
        super().__init__(selection, weight)
        self.pattern = Filter() if pattern is None else pattern
        for name, ref in selection.items():
            self.pattern.validate(ref.shape, name)

    def _term(self, weight: Tensor, ref: ParamRef) -> Tensor:
        groups = self.pattern.groups(weight)
        padding = groups.isneginf()
        sizes = (~padding).sum(1).to(groups.dtype)
        norms = torch.linalg.vector_norm(groups.masked_fill(padding, 0.0), dim=1)
        return (sizes.sqrt() * norms).sum()


class AttentionLogPenalty:
    """weight * mean over blocks of mean(ln(1 + A^2)), of the last forward pass.

    It pushes attention towards uniform rows, not towards zeros (`attention_log`), and at the
    published weight its effect is within the noise of seeds.

    Registers hooks on the attention modules; a context manager, or `close()` it. Modules that are
    given queries and keys (an attribute `scale`, and `forward(q, k, v)`, as this library's
    `DotProductAttention`) keep their fused kernels: the penalty recomputes A piece by piece.
    Transformers models are switched to their eager attention meanwhile, since fused kernels never
    form A; `nn.MultiheadAttention` is asked for its per-head weights. With `weight=0` nothing is
    computed and training is bit for bit what it would be without.

    Args:
        model: a model whose attention modules are given queries and keys, or return their
            probabilities (batch, heads, queries, keys) with their output.
        weight: factor lambda >= 0 (published: 0.01).
        blocks: "last" (as in the released code), "all", or indices into the attention modules.
        modules: names of the attention modules in order; None finds every innermost module whose
            class name contains "Attention".
        extract: (module, output) -> probabilities, for modules with another kind of output.
        fused: keep memory O(batch * heads * tokens) where queries and keys are given; False forms
            A whole.
        attach: add the penalty's gradient in every backward pass through the modules' outputs, for
            training loops whose loss is out of reach. `value()` must not be added to the loss then,
            and the loss must not be scaled.

    Raises:
        ValueError: weight negative, no attention module, an unknown name, an index out of range;
            during forward, a module that returns no probabilities (named).

    Reference: arXiv 2307.11988, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 0.01,
        blocks: Literal["last", "all"] | Sequence[int] = "last",
        *,
        modules: Sequence[str] | None = None,
        extract: Callable[[nn.Module, Any], Tensor] | None = None,
        fused: bool = True,
        attach: bool = False,
    ) -> None:
        self.weight = _checked_weight(weight)
        self._fused, self._attach = fused, attach
        found = _attention_modules(model) if modules is None else _named(model, modules)
        self.names = [list(found)[i] for i in _chosen(blocks, len(found))]
        self._extract = extract
        self._terms: dict[str, Tensor] = {}
        self._restore = switch_attention(model, "eager")
        self._handles: list[Any] = []
        for name in self.names:
            module = found[name]
            if isinstance(module, nn.MultiheadAttention) and extract is None:
                hook = module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True)
                self._handles.append(hook)
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def value(self) -> Tensor:
        """The penalty of the last forward pass, a scalar with gradient.

        Raises:
            RuntimeError: no forward pass since the penalty was made.
            ValueError: an attention map holds NaN (names the module).
        """
        missing = [name for name in self.names if name not in self._terms]
        if missing:
            raise RuntimeError(f"no forward pass went through {missing[0]!r} yet")
        terms = [self._terms[name] for name in self.names]
        for name, term in zip(self.names, terms, strict=True):
            if bool(torch.isnan(term)):
                raise ValueError(f"attention of {name!r} holds NaN")
        return self.weight * torch.stack([t.to(terms[0].device) for t in terms]).mean()

    def close(self) -> None:
        """Remove the hooks and give the model back its attention implementation."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._terms.clear()
        self._restore()
        self._restore = _nothing

    def __enter__(self) -> AttentionLogPenalty:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self.weight == 0.0:
                self._terms[name] = torch.zeros((), device=_first(output).device)
                return None
            self._terms[name] = term = self._term(name, module, args, output)
            if not self._attach or not term.requires_grad:
                return None
            factor = self.weight / len(self.names)
            attached = add_gradient(_first(output), term, factor)
            return attached if isinstance(output, Tensor) else (attached, *output[1:])

        return hook

    def _term(self, name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
        if self._extract is not None:
            return attention_log(self._extract(module, output))
        if (scale := _product_scale(module, args)) is not None:
            if self._fused:
                return attention_log_penalty(args[0], args[1], scale)
            scores = _wide(args[0]) @ _wide(args[1]).transpose(-2, -1)
            return attention_log((scores * scale).softmax(-1))
        probabilities = _probabilities(output)
        if probabilities is None:
            raise ValueError(
                f"{name!r} ({type(module).__name__}) returns no attention probabilities; "
                "use an eager attention implementation or pass extract="
            )
        return attention_log(probabilities)


def add_gradient(output: Tensor, term: Tensor, factor: float = 1.0) -> Tensor:
    """The output unchanged; in the backward pass `factor * term` joins whatever loss it feeds."""
    attached: Tensor = _AddGradient.apply(output, term, factor)
    return attached


class _AddGradient(torch.autograd.Function):
    """The output unchanged; backward, `factor` goes to the term as its gradient."""

    @staticmethod
    def forward(output: Tensor, term: Tensor, factor: float) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.term, ctx.factor = inputs[1].detach(), inputs[2]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, torch.full_like(ctx.term, ctx.factor), None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _checked_weight(weight: float) -> float:
    check_number("weight", weight, "[0, inf)")
    return float(weight)


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    named = {n: m for n, m in model.named_modules() if "Attention" in type(m).__name__}
    innermost = {
        name: module
        for name, module in named.items()
        if not any(other.startswith(f"{name}." if name else "") for other in named if other != name)
    }
    if not innermost:
        raise ValueError(
            f"{type(model).__name__} has no module with 'Attention' in its class name; "
            "name them with modules="
        )
    return innermost


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    every = dict(model.named_modules())
    check_names("modules", names)
    if not names:
        raise ValueError("modules is empty: expected the name of an attention module, or None")
    for name in names:
        if name not in every:
            raise ValueError(unknown_name("module", name, every))
    return {name: every[name] for name in names}


def _chosen(blocks: Literal["last", "all"] | Sequence[int], count: int) -> list[int]:
    if blocks == "last":
        return [count - 1]
    if blocks == "all":
        return list(range(count))
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not blocks:
        raise ValueError(f"blocks={blocks!r}: expected 'last', 'all' or indices")
    for index in blocks:
        if not isinstance(index, int) or not -count <= index < count:
            raise ValueError(f"blocks holds {index!r}, but there are {count} attention modules")
    return [index % count for index in blocks]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _product_scale(module: nn.Module, args: tuple[Any, ...]) -> float | None:
    """The scale of a module that is given queries, keys and values; None for any other."""
    scale = getattr(module, "scale", None)
    heads = len(args) == 3 and all(isinstance(a, Tensor) and a.dim() == 4 for a in args)
    return float(scale) if heads and isinstance(scale, float) else None


def _probabilities(output: Any) -> Tensor | None:
    parts = output[1:] if isinstance(output, (tuple, list)) else ()
    return next((p for p in parts if isinstance(p, Tensor) and p.ndim == 4), None)


def _ask_for_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Positional order: query, key, value, key_padding_mask, need_weights, attn_mask, average.
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    kwargs = {**dict(zip(names, args[3:], strict=False)), **kwargs}
    return args[:3], {**kwargs, "need_weights": True, "average_attn_weights": False}


def _nothing() -> None:
    return None
