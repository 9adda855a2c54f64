"""Pairs of a dense and a sparse network to be timed: a finished run's, or one with random zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import models, runtime
from aerogel.compress.loading import (
    example_inputs,
    load_data,
    load_model,
    source_of,
    spec_of,
)
from aerogel.compress.measuring import Pair
from aerogel.compress.recipe import ModelSpec
from aerogel.compress.resolve import load_recipe
from aerogel.pruning.selection import pruned_parameters

Example = Callable[[int], tuple[Tensor, ...]]
"""Inputs of a given batch size."""


def load_run(folder: Path) -> tuple[Pair, Example]:
    """The dense and the sparse network of a run's folder, and real inputs for them.

    Args:
        folder: Where `aerogel compress` wrote.

    Raises:
        ValueError: The run did not get as far as both networks.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    dataset = load_data(recipe.data)
    networks, sources = [], []
    for name in ("dense.safetensors", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: finish its run first")
        spec = spec_of(folder / name) or recipe.model
        model = load_model(spec.model_copy(update={"weights": None}), dataset, seed=recipe.seed)
        networks.append(runtime.load(folder / name, model).eval())
        sources.append(source_of(spec, dataset, recipe.seed))
    pair = Pair(networks[0], networks[1], sources[0], sources[1])
    return pair, lambda batch: example_inputs(dataset, batch)


def random_networks(
    name: str,
    sparsity: float,
    pattern: str = "unstructured",
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[Pair, Example]:
    """A network, the same with zeros at random places, and random inputs for both.

    Args:
        name: Registered name, file, folder or `import.path:callable`.
        sparsity: Fraction of zeros in the layers that pruning would touch, in [0, 1).
        pattern: What is zero together.
        shape: Of one input; registered networks know theirs.
        seed: Of weights, zeros and inputs.

    Raises:
        ValueError: Unknown network or pattern, sparsity out of range, or no shape known.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity = {sparsity}: expected a fraction of zeros in [0, 1)")
    dense, example = plain_network(name, shape, seed)
    vary_norms(dense, seed)
    sparse = copy.deepcopy(dense)
    _random_masks(sparse, sparsity, pattern, seed)
    source = source_of(ModelSpec(name=name), None, seed)
    return Pair(dense, sparse, source, source), example


def vary_norms(model: nn.Module, seed: int = 0) -> None:
    """Give batch norms that never saw data the numbers that a trained network might have.

    A fresh norm is an identity, and the last one of a ResNet's block a multiplication by zero: with
    it folded, the convolution before it is empty and costs nothing.

    Args:
        model: Changed in place; norms that have seen data stay as they are.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.affine:
            continue
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None or mean.any() or (variance != 1).any():
            continue
        with torch.no_grad():
            mean.normal_(0.0, 0.1, generator=generator)
            variance.uniform_(0.5, 1.5, generator=generator)
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0.0, 0.1, generator=generator)


def plain_network(
    name: str, shape: tuple[int, ...] | None = None, seed: int = 0
) -> tuple[nn.Module, Example]:
    """A network as it is, and random inputs for it.

    Args:
        name: Registered name, file, folder or `import.path:callable`.
        shape: Of one input; registered networks and ONNX files know theirs.
        seed: Of weights and inputs.

    Raises:
        ValueError: Unknown network, or no shape known.
    """
    model = load_model(ModelSpec(name=name), None, seed=seed).eval()
    declared = getattr(model, "meta", {}).get("onnx_inputs")
    if declared is not None:
        return model, _declared_example(declared, shape, seed)
    config = models.model_config(name) if name in models.list_models() else {}
    size = shape or config.get("input_size")
    if size is None:
        raise ValueError(f"model = {name!r} does not say what its inputs are: give --shape")
    tokens = "tokenizer" in config

    def example(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        if tokens:
            # Small numbers are in every vocabulary; which ones does not matter for speed.
            ids = torch.randint(1, 1000, (batch, *size), generator=generator)
            return ids, torch.ones_like(ids)
        return (torch.randn((batch, *size), generator=generator),)

    return model, example


def _declared_example(declared: Sequence[Any], shape: tuple[int, ...] | None, seed: int) -> Example:
    """Random inputs as an ONNX file declares them; `shape` is that of the first, without batch."""
    sizes = [(each.shape or ())[1:] for each in declared]
    if shape is not None:
        sizes[0] = shape
    for each, known in zip(declared, sizes, strict=True):
        if each.shape is None or not all(isinstance(size, int) for size in known):
            raise ValueError(f"input {each.name!r} has the shape {each.shape}: give --shape")

    def example(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            _random_input(each, (batch, *size), generator)
            for each, size in zip(declared, sizes, strict=True)
        )

    return example


def _random_input(declared: Any, shape: tuple[Any, ...], generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, declared.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool or "mask" in declared.name:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _random_masks(model: nn.Module, sparsity: float, pattern: str, seed: int) -> None:
    from aerogel.sparsity import build_masks, parse_pattern

    generator = torch.Generator().manual_seed(seed)
    names = pruned_parameters(model, pattern)
    scores = {n: torch.rand(model.get_parameter(n).shape, generator=generator) for n in names}
    rule = parse_pattern(pattern)
    density = None if rule.fixed_density is not None else 1.0 - sparsity
    with torch.no_grad():
        build_masks(scores, density, rule).apply_(model)
