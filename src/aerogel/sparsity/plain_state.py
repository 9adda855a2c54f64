"""Checkpoints of a network under masks: its `state_dict` as that of a plain sparse network.

Masks that act in the forward pass put their own entries into a model's `state_dict` and leave the
pruned values in the weights; quantisers put their ranges there. Whoever reads such a file needs the
same pruner. With a `PlainState` the file holds the weights that the network computes with, under
plain names; `stored_weights` is what the training needs besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel.sparsity.bidirectional import is_bidirectional
from aerogel.sparsity.fake_quantize import ActivationQuantiser, FakeQuantize
from aerogel.sparsity.parametrizations import find_parametrization
from aerogel.sparsity.select import leaf_parameter

_BIDIRECTIONAL = ("weight", "mask_forward", "mask_backward")


class PlainState:
    """Until it is removed, the model's `state_dict` has plain names and pruned weights are zero.

    Args:
        model: may be put under masks before or after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handle = model.register_state_dict_post_hook(_make_plain)

    def remove(self) -> None:
        """Show the masks again."""
        self._handle.remove()


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the weights hold that masks hide in the forward pass, by plain name; clones."""
    return {name: leaf.detach().clone() for name, leaf in _hidden(model).items()}


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put back what `stored_weights` found.

    Args:
        model: under masks of the same kind.
        weights: of `stored_weights`.

    Raises:
        ValueError: other names or shapes.
    """
    leaves = _hidden(model)
    if list(leaves) != list(weights):
        raise ValueError(f"weights: expected those of {list(leaves)}, got {list(weights)}")
    for name, leaf in leaves.items():
        if leaf.shape != weights[name].shape:
            raise ValueError(
                f"weights: {name!r} has shape {tuple(weights[name].shape)}, expected "
                f"{tuple(leaf.shape)}"
            )
        leaf.copy_(weights[name])


def _hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{attribute}".removeprefix("."): leaf_parameter(module, attribute)
        for path, module, attribute in _masked_places(model)
    }


def _masked_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Where a mask stands between the stored weight and the forward pass."""
    for path, module in model.named_modules():
        if is_bidirectional(module):
            yield path, module, "weight"
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for attribute, chain in lists.items():
            assert isinstance(chain, nn.ModuleList)
            mask = find_parametrization(module, attribute)
            if mask is not None and all(
                isinstance(p, FakeQuantize) for p in chain if p is not mask
            ):
                yield path, module, attribute


@torch.no_grad()
def _make_plain(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for path, module, attribute in _masked_places(model):
        place = f"{prefix}{path}." if path else prefix
        if is_bidirectional(module):
            own = [f"{place}{name}" for name in _BIDIRECTIONAL]
            weight = module.get_parameter(attribute) * module.get_buffer("mask_forward")
        else:
            start = f"{place}parametrizations.{attribute}."
            own = [key for key in state if key.startswith(start)]
            weight = getattr(module, attribute)
        for key in own:
            del state[key]
        state[f"{place}{attribute}"] = weight.detach()
    for path, module in model.named_modules():
        if isinstance(module, ActivationQuantiser):
            del state[f"{prefix}{path}.largest"]
