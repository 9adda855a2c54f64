"""Training on the CPU at the price of the weights that are left.

    model = aerogel.sparse_training(model)          # layers with many zeros become sparse layers
    optimizer = torch.optim.AdamW(model.parameters())
    ...                                             # train as always
    model = to_dense(model)                         # plain layers again, with exact zeros

A step of a converted layer multiplies only where weights live: forward, the gradient of its input,
the gradient of its weights, and the optimizer. Masks may move between steps: `update_masks` is the
drop-and-grow step of SET, and of RigL after a backward pass inside `dense_gradients`.

When it helps: 60 % zeros and more, layers of 32768 weights and more, float32 on the CPU. At 90 %
zeros a whole AdamW step of a 768-3072-768 block is 3.5 to 4.1 times as fast as the dense one
(`benchmarks/sparse_training.py`). Other dtypes and devices, autocast and `torch.compile` are
computed by dense products.

Reference: Mocanu et al., SET, Nature Communications 2018; Evci et al., RigL, arXiv 1911.11134;
Gale et al., arXiv 2006.10901 (products sampled at the weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aerogel.sparsity import drop, grow, select_parameters
from aerogel.sparsity.ownership import claimed
from aerogel.sparsity.select import ParamRef, unknown_name
from aerogel.train.sparse_layers import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    is_pointwise,
    move_state,
)

# Measured on AVX2, one thread, whole AdamW steps of a 768-3072-768 block, 256 and 1024 tokens: 1.0
# to 1.2 times dense at 50 % zeros, 1.3 at 60 %, 1.7 at 70 %.
BREAK_EVEN = 0.6
SMALLEST_LAYER = 1 << 15  # weights; below, calls cost about what products save at the break-even


def sparse_training(
    model: nn.Module,
    *,
    min_sparsity: float = BREAK_EVEN,
    masks: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Make linear and 1x1-convolution layers train on their non-zero weights only.

    Converted in place: plain `nn.Linear` and 1x1 `nn.Conv2d` layers whose weight is sparse enough.
    Left dense: everything else, layers below `min_sparsity` or 32768 weights (unless `min_sparsity`
    is 0), subclasses, layers with hooks or parametrizations, and tied weights.

    Args:
        model: any module.
        min_sparsity: fraction of zeros from which on a layer is converted, in [0, 1]; default 0.6,
            the measured break-even. 0 converts every layer that can be.
        masks: parameter name ("encoder.0.weight") -> bool mask of the weights to keep; others are
            dropped. Layers without a mask keep what is not zero.
        include: globs of parameter or module names to consider; default all.
        exclude: globs of names to leave dense.
        optimizer: the one that trains the model already; it goes on with the converted layers, its
            state carried over. Without one, make the optimizer after this call.

    Returns:
        The model; another object only if the model itself is one layer.

    Raises:
        ValueError: `min_sparsity` outside [0, 1], a mask that fits no parameter, or a weight under
            a living mask controller (finalize it first).

    Warns:
        UserWarning: no layer was converted.
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity={min_sparsity!r}: expected a fraction in [0, 1]")
    selection = select_parameters(model, (nn.Linear, nn.Conv2d), include=include, exclude=exclude)
    wanted = _checked_masks(masks or {}, selection)
    smallest = SMALLEST_LAYER if min_sparsity else 1
    replaced: dict[nn.Module, SparseLayer] = {}
    for name, ref in selection.items():
        if not _convertible(ref) or ref.parameter.numel() < smallest:
            continue
        mask = wanted[name] if name in wanted else ref.parameter.detach() != 0
        if 1.0 - float(mask.float().mean()) < min_sparsity:
            continue
        if claimed(ref.parameter):
            raise ValueError(f"{name!r} is under a mask controller: finalize it first")
        layer = _converted(ref.module, mask)
        if optimizer is not None:
            move_state(optimizer, ref.parameter, layer.values, layer.gather)
        replaced[ref.module] = layer
    if not replaced:
        warnings.warn(
            f"no layer has {min_sparsity:.0%} zeros in a plain linear or 1x1-convolution weight: "
            "the model is trained dense"
        )
    return _replace(model, replaced)


def to_dense(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Turn sparse layers back into `nn.Linear` and `nn.Conv2d` with exact zeros, in place.

    Args:
        model: a module; one without sparse layers is left as it is.
        optimizer: the one that trains it; goes on with the dense weights (which it may then move).

    Returns:
        The model; another object only if the model itself is one layer.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for layer in find_sparse_layers(model).values():
        plain = layer.to_dense()  # type: ignore[operator]
        if optimizer is not None:
            move_state(optimizer, layer.values, plain.weight, layer.scatter)
        replaced[layer] = plain
    return _replace(model, replaced)


def find_sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The converted layers of a model by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes of sparse layers also note the dense gradient, for `update_masks`.

    Forward and backward passes belong inside. It costs one dense product per layer and pass, so use
    it on update steps only. Gradients of several passes add up.
    """
    layers = list(find_sparse_layers(model).values())
    for layer in layers:
        layer.captures_gradient, layer.dense_gradient = True, None
    try:
        yield
    finally:
        for layer in layers:
            layer.captures_gradient = False


@torch.no_grad()
def update_masks(
    model: nn.Module,
    fraction: float,
    *,
    growth: Literal["random", "gradient"] = "random",
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Swap the smallest stored weights of every sparse layer for others; their number stays.

    Call it after `optimizer.step()`. Blocks of outputs that are stored together are swapped
    together. A weight that is dropped and grown at once keeps its value.

    Args:
        model: a module with sparse layers.
        fraction: share of a layer's stored weights to swap, in [0, 1]; usually from 0.3 falling to
            0 by a cosine.
        growth: "random" (SET), or "gradient" (RigL): where the gradient noted inside
            `dense_gradients` is largest. Across processes the gradients are added up.
        optimizer: the one that trains the model; new weights start with a state of zeros.
        generator: CPU generator for random growth; seed it equally in all processes.

    Returns:
        Module name -> how many weights are new.

    Raises:
        ValueError: fraction or growth is none of the above.
        RuntimeError: "gradient" without a noted gradient.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction!r}: expected a share in [0, 1]")
    if growth not in ("random", "gradient"):
        raise ValueError(f"growth={growth!r}: expected 'random' or 'gradient'")
    changed = {}
    for name, layer in find_sparse_layers(model).items():
        score = _growth_score(name, layer, growth, generator)
        old = layer.mask
        new = _swapped(layer, old, score, fraction)
        changed[name] = int((new & ~old).sum())
        layer.set_mask(new, optimizer)
    return changed


def _swapped(layer: SparseLayer, mask: Tensor, score: Tensor, fraction: float) -> Tensor:
    """One drop-and-grow step on units of as many outputs as are stored together."""
    block = int(layer.block) if mask.shape[0] % int(layer.block) == 0 else 1
    # Only what is stored competes to stay: a tenth of the weights at 90 % zeros.
    magnitude = layer.values.detach().abs().reshape(-1, block).sum(1)
    count = int(fraction * len(magnitude))
    stays = drop(torch.ones_like(magnitude, dtype=torch.bool), magnitude, count)
    kept = layer.scatter(stays.repeat_interleave(block).to(score.dtype)) != 0

    def units(t: Tensor) -> Tensor:
        return t.reshape(mask.shape[0] // block, block, -1)

    grown, _ = grow(units(kept)[:, 0], units(score).sum(1), count)
    return grown[:, None].expand(-1, block, -1).reshape(mask.shape)


def _growth_score(
    name: str, layer: SparseLayer, growth: str, generator: torch.Generator | None
) -> Tensor:
    if growth == "random":
        shape = layer.weight_shape
        return torch.rand(shape, generator=generator).to(layer.values.device)
    gradient = layer.dense_gradient
    if gradient is None:
        raise RuntimeError(
            f"{name!r} has no dense gradient: run the forward and backward pass inside "
            "`dense_gradients(model)`"
        )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gradient)
    return gradient.abs()


def _checked_masks(
    masks: Mapping[str, Tensor], selection: Mapping[str, ParamRef]
) -> dict[str, Tensor]:
    for name, mask in masks.items():
        if name not in selection:
            raise ValueError(unknown_name("parameter (of a mask)", name, selection))
        shape = selection[name].shape
        if mask.dtype is not torch.bool or mask.shape != shape:
            raise ValueError(
                f"masks[{name!r}]: {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool "
                f"{tuple(shape)}"
            )
    return {name: mask.to(selection[name].parameter.device) for name, mask in masks.items()}


def _convertible(ref: ParamRef) -> bool:
    module = ref.module
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and is_pointwise(module))
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return plain and ref.attribute == "weight" and not ref.aliases and not any(hooks)


def _converted(module: nn.Module, mask: Tensor) -> SparseLayer:
    if isinstance(module, nn.Linear):
        return SparseLinear(module, mask).train(module.training)
    assert isinstance(module, nn.Conv2d)
    return SparseConv2d(module, mask).train(module.training)


def _replace(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the new layers everywhere the old ones stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(model, model)
