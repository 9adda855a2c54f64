"""Whole-network rearrangement: the order of channels that patterns over outputs lose least by.

    plan = plan_rearrangement(model, example, patterns, density=0.5)
    apply_plan(model, plan)               # the network's function is unchanged
    apply_plan(model, invert_plan(plan))  # back, bit for bit

Each permutation class of the network (see `permute`) gets the order of `row_order`: its channels
become neighbours in all layers that produce them, and every consumer follows. The order of a
layer's inputs needs no search, because patterns do not join columns.

Reference: Xu et al., SparseByteNN, arXiv 2310.19509; Pool & Yu, "Channel Permutations for N:M
Sparsity", NeurIPS 2021.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.sparsity.mask_set import find_parameter
from aerogel.sparsity.patterns import KernelGroup, KernelPattern, Pattern
from aerogel.sparsity.permute import (
    ClassAxis,
    PermutationClass,
    apply_permutation,
    invert,
    permutation_classes,
)
from aerogel.sparsity.row_order import (
    DEFAULT_PATIENCE,
    DEFAULT_TRIALS,
    BlockedRows,
    kept_energy,
    order_rows,
)
from aerogel.sparsity.topk import Rounding, kept_count


@dataclass(frozen=True)
class RearrangementPlan:
    """New places for the channels of a network.

    Attributes:
        classes: channels that move together; only those in which a pattern can gain.
        permutations: per class, int64: new channel i is old channel `permutation[i]`.
        kept_energy_before: per class, the share of its pruned producers' energy (sum of squared
            weights) that pruning would keep in the old order.
        kept_energy_after: the same in the new order; never less.
        fingerprint: of the model's structure, see `fingerprint`.
    """

    classes: tuple[PermutationClass, ...]
    permutations: tuple[Tensor, ...]
    kept_energy_before: tuple[float, ...]
    kept_energy_after: tuple[float, ...]
    fingerprint: str


@torch.no_grad()
def plan_rearrangement(
    model: nn.Module,
    example: Any,
    patterns: Mapping[str, Pattern],
    density: float | Mapping[str, float],
    *,
    balanced: bool = False,
    rounding: Rounding = "round",
    trials: int = DEFAULT_TRIALS,
    patience: int = DEFAULT_PATIENCE,
    seed: int = 0,
) -> RearrangementPlan:
    """Find the order of every class of channels; the model is not changed.

    Args:
        model: dense and trained, not parametrized.
        example: example input, see `permutation_classes`.
        patterns: name of each weight that will be pruned, and its pattern. `KernelGroup` and
            `KernelPattern` with a shared choice gain by the order of rows, others are ignored.
        density: share of the units kept, in (0, 1], one for all weights or one per name.
        balanced: every block of rows keeps the same number of units.
        rounding: of the number kept.
        trials: exchanges of two channels tried at most in a class.
        patience: exchanges in a row without gain after which no more are tried.
        seed: of the pairs drawn.

    Raises:
        ValueError: the model cannot be traced (`NotTraceable`), or is parametrized.
    """
    generator = torch.Generator().manual_seed(seed)
    classes, orders = [], []
    energies: list[tuple[float, float]] = []
    for each in permutation_classes(model, example):
        layers = list(_blocked_layers(model, each, patterns, density, balanced, rounding))
        if not layers:
            continue
        classes.append(each)
        orders.append(order_rows(layers, trials=trials, patience=patience, generator=generator))
        total = sum(float(layer.energy.sum() + layer.fixed.sum()) for layer in layers) or 1.0
        before, after = (kept_energy(layers, o) for o in (torch.arange(each.size), orders[-1]))
        energies.append((before / total, after / total))
    return RearrangementPlan(
        tuple(classes),
        tuple(orders),
        tuple(before for before, _ in energies),
        tuple(after for _, after in energies),
        fingerprint(model),
    )


def apply_plan(target: nn.Module | Mapping[str, Tensor], plan: RearrangementPlan) -> None:
    """Rearrange in place; the network's function stays the same.

    Args:
        target: the model, or tensors by the model's names (masks, averaged weights).
        plan: made for this model, or for another of the same structure.

    Raises:
        ValueError: another structure, or a permutation that does not fit its class. Nothing has
            been changed then.
    """
    if isinstance(target, nn.Module) and fingerprint(target) != plan.fingerprint:
        raise ValueError(
            f"the plan was made for another network than this {type(target).__name__}: "
            f"names, shapes or kinds of its layers differ"
        )
    for each, order in zip(plan.classes, plan.permutations, strict=True):
        if len(order) != each.size or not torch.equal(order.sort().values, torch.arange(each.size)):
            raise ValueError(
                f"plan: the permutation of {each.name!r} must reorder its {each.size} channels, "
                f"got {len(order)} entries that do not"
            )
    for each, order in zip(plan.classes, plan.permutations, strict=True):
        apply_permutation(target, each, order)


def invert_plan(plan: RearrangementPlan) -> RearrangementPlan:
    """The plan that undoes `plan`."""
    return replace(
        plan,
        permutations=tuple(invert(order) for order in plan.permutations),
        kept_energy_before=plan.kept_energy_after,
        kept_energy_after=plan.kept_energy_before,
    )


def fingerprint(model: nn.Module) -> str:
    """Digest of a network's structure: kinds of its modules, names and shapes of its tensors."""
    lines = [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lines += [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _blocked_layers(
    model: nn.Module,
    channels: PermutationClass,
    patterns: Mapping[str, Pattern],
    density: float | Mapping[str, float],
    balanced: bool,
    rounding: Rounding,
) -> Iterator[BlockedRows]:
    """The layers whose loss depends on the order of a class's channels."""
    for axis in channels.producers:
        pattern = patterns.get(axis.name)
        if not isinstance(pattern, (KernelGroup, KernelPattern)):
            continue
        weight = find_parameter(model, axis.name).detach().double().cpu()
        energy = weight.square().reshape(*weight.shape[:2], -1)  # [out, in, taps]
        if isinstance(pattern, KernelGroup):
            energy = energy.sum(dim=2)
            units = energy.shape[1] * (1 if balanced else -(-energy.shape[0] // pattern.g))
            share = density[axis.name] if isinstance(density, Mapping) else density
            keep = kept_count(units, share, rounding=rounding)
            layer = _blocked(energy, axis, pattern.g, keep, balanced)
        elif energy.shape[1] == 1:
            # Its units are the dictionary's entries, of which every block keeps the best one.
            energy = energy[:, 0] @ pattern.dictionary().double().t()
            layer = _blocked(energy, axis, pattern.group, 1, True)
        else:
            continue  # several kernels a row, each with a choice of its own
        if layer is not None:
            yield layer


def _blocked(
    energy: Tensor, axis: ClassAxis, group: int, keep: int, balanced: bool
) -> BlockedRows | None:
    """A class's rows by block; None if their order does not matter, or one has several blocks."""
    blocks = axis.positions // group
    if group == 1 or axis.rows is not None or not bool((blocks == blocks[:, :1]).all()):
        return None
    moving = energy[axis.positions].sum(dim=1)
    staying = energy.clone()
    staying[axis.positions.flatten()] = 0.0
    fixed = torch.zeros(-(-energy.shape[0] // group), energy.shape[1], dtype=energy.dtype)
    fixed.index_add_(0, torch.arange(energy.shape[0]) // group, staying)
    return BlockedRows(moving, blocks[:, 0], fixed, keep, balanced)
