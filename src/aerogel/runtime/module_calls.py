"""The fallback for models that cannot be captured: sparse modules in an otherwise eager model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.runtime.candidates.torch_dense import NAME as TORCH
from aerogel.runtime.layer import Layer
from aerogel.runtime.tuner import Progress, Tuned, Tuner

STRATEGY = "module calls"


class SparseModule(nn.Module):
    """Stands where an `nn.Linear` or `nn.Conv2d` stood; keeps its weight for whoever looks."""

    def __init__(self, dense: nn.Module, kernel: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """As the dense module's."""
        return self._kernel(x)


def swap(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tuner: Tuner,
    on_progress: Progress | None,
) -> tuple[nn.Module, list[Tuned]]:
    """A copy of the model in which every layer that a sparse kernel computes faster is replaced.

    Args:
        model: In eval mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        tuner: Measures the layers on the shapes they meet on the example.
        on_progress: As for `Tuner.tune`.

    Returns:
        The copy, and the measurements of its layers.
    """
    swapped = copy.deepcopy(model)
    layers = _observe(swapped, args, kwargs)
    tuned = dict(zip(layers, tuner.tune(list(layers.values()), on_progress), strict=True))
    for name, each in tuned.items():
        best = each.best_direct
        if best.name == TORCH or best.module is None:
            continue
        parent, _, child = name.rpartition(".")
        dense = swapped.get_submodule(name)
        if name:
            setattr(swapped.get_submodule(parent), child, SparseModule(dense, best.module()))
    return swapped, list(tuned.values())


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Layer]:
    """The replaceable layers by name, with the shapes of one run. Those never called are left."""
    found: dict[str, Layer] = {}
    with _watching(model, found), torch.no_grad():
        model(*args, **kwargs)
    return found


@contextmanager
def _watching(model: nn.Module, found: dict[str, Layer]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        # Subclasses may read their weight elsewhere or compute something else.
        if type(module) in (nn.Linear, nn.Conv2d):
            handles.append(module.register_forward_hook(_watcher(name, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(name: str, found: dict[str, Layer]) -> Any:
    def watch(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer = _layer(name, module, inputs[0], output)
        fits = layer.is_pointwise and output.dtype == torch.float32 and output.dim() >= 2
        if fits and inputs[0].numel() and output.numel():
            found.setdefault(name, layer)

    return watch


def _layer(name: str, module: Any, x: Tensor, output: Tensor) -> Layer:
    geometry: dict[str, Any] = {}
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or output.dim() != 4:
            geometry["groups"] = 0  # spelled in a way that the kernels do not take
        else:
            geometry = {"stride": module.stride, "padding": module.padding}
            geometry |= {"dilation": module.dilation, "groups": module.groups}
    return Layer(
        name=name,
        op="conv2d" if isinstance(module, nn.Conv2d) else "linear",
        weight=module.weight.detach(),
        bias=None if module.bias is None else module.bias.detach(),
        activation="none",
        has_residual=False,
        input_shape=tuple(x.shape),
        output_shape=tuple(output.shape),
        **geometry,
    )
