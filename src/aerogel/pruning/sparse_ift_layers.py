"""Which layers of a network Sparse-IFT replaces, and by what."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.nn.sparse_ift import (
    IsoFlopLayer,
    SparseDopedConv2d,
    SparseDopedLinear,
    SparseFactorizedConv2d,
    SparseFactorizedLinear,
    SparseParallelConv2d,
    SparseParallelLinear,
)
from aerogel.sparsity.blocks import run_batch
from aerogel.sparsity.select import end_weights, select_parameters, unknown_name

_LAYERS: dict[str, tuple[type[IsoFlopLayer], type[IsoFlopLayer]]] = {
    "parallel": (SparseParallelConv2d, SparseParallelLinear),
    "factorized": (SparseFactorizedConv2d, SparseFactorizedLinear),
    "doped": (SparseDopedConv2d, SparseDopedLinear),
}


def layer_names(model: nn.Module) -> list[str]:
    """Every linear and two-dimensional convolution layer, in order."""
    # A subclass (a quantized or a packed layer, say) may mean something else by its weight.
    return [n for n, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]


def skipped_layers(model: nn.Module, skip: Sequence[str]) -> set[str]:
    """The layers meant by "stem", "head" and globs.

    Raises:
        ValueError: a glob that matches no layer.
    """
    globs = [glob for glob in skip if glob not in ("stem", "head")]
    found = matching_layers(model, globs)
    for glob in globs:
        if not matching_layers(model, [glob]):
            raise ValueError(f"skip: {unknown_name('layer', glob, layer_names(model))}")
    for name in (weight.rpartition(".")[0] for weight in end_weights(model)):
        word = "head" if isinstance(model.get_submodule(name), nn.Linear) else "stem"
        if word in skip:
            found.add(name)
    return found


def matching_layers(model: nn.Module, globs: Sequence[str]) -> set[str]:
    """Layers whose name matches one of the globs."""
    return {n for n in layer_names(model) if any(fnmatchcase(n, glob) for glob in globs)}


def check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Raise `ValueError` for grouped convolutions and shared weights."""
    refs = select_parameters(model)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(
                f"{name}: groups must be 1, got {layer.groups}; add it to skip to leave it dense"
            )
        if f"{name}.weight" not in refs or refs[f"{name}.weight"].aliases:
            raise ValueError(f"{name}: its weight is shared with another layer; add it to skip")


def norms_after(model: nn.Module, names: Sequence[str], example: Any) -> dict[str, str]:
    """Layer -> the batch norm that takes its very output, found by running the network once."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}

    def note_output(name: str) -> Any:
        # The tensor is kept, so that its id is not given to another one.
        return lambda module, args, out: outputs.__setitem__(id(out), (name, out))

    def note_input(norm: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in outputs:
                found[outputs[id(args[0])][0]] = norm

        return note

    modes = {module: module.training for module in model.modules()}
    model.eval()
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(note_output(name))
            stack.callback(hook.remove)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                hook = module.register_forward_pre_hook(note_input(name))
                stack.callback(hook.remove)
        run_batch(model, example)
    for module, mode in modes.items():
        module.training = mode
    return found


def replacement(
    layer: nn.Module, kind: str, sparsity: float, norm: nn.Module | None, options: dict[str, Any]
) -> IsoFlopLayer:
    """The larger layer in place of a dense one, on its device and in its type.

    Args:
        layer: a linear or convolution layer.
        kind: "parallel", "factorized" or "doped".
        sparsity: that sizes it.
        norm: copied into every parallel branch.
        options: of the layer of this kind.
    """
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    if kind == "parallel":
        options = {"norm": None if norm is None else lambda width: copy.deepcopy(norm)}
    conv, linear = _LAYERS[kind]
    bias = layer.bias is not None
    built: IsoFlopLayer
    if isinstance(layer, nn.Linear):
        built = linear(layer.in_features, layer.out_features, bias, sparsity=sparsity, **options)
    else:
        built = conv(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=bias,
            padding_mode=layer.padding_mode,
            sparsity=sparsity,
            **options,
        )
    built = built.to(device=layer.weight.device, dtype=layer.weight.dtype)
    return built.train(layer.training)
