"""Who may mask what: one controller per parameter, and masks that fit their parameters."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.select import ParamSelection, unknown_name

_CLAIM = "_aerogel_controller"


def claim(parameters: Mapping[str, nn.Parameter], owner: object) -> None:
    """Note on every parameter that ``owner`` masks it, as long as it lives.

    Raises:
        ValueError: another living owner masks one of them.
    """
    for name, parameter in parameters.items():
        if claimed(parameter):
            raise ValueError(f"{name!r} is already under another mask controller")
    for parameter in parameters.values():
        setattr(parameter, _CLAIM, weakref.ref(owner))


def claimed(parameter: nn.Parameter) -> bool:
    """Whether a living controller masks this parameter."""
    owner = getattr(parameter, _CLAIM, None)
    return owner is not None and owner() is not None


def release(parameters: Mapping[str, nn.Parameter]) -> None:
    """Take the notes off again."""
    for parameter in parameters.values():
        if hasattr(parameter, _CLAIM):
            delattr(parameter, _CLAIM)


def fitted_masks(masks: MaskSet, selection: ParamSelection) -> MaskSet:
    """Copies of the masks on their parameters' devices, in the selection's order.

    Raises:
        ValueError: a name that is not selected, one that has no mask, or another shape.
    """
    for name in masks:
        if name not in selection:
            raise ValueError(unknown_name("parameter (of a mask)", name, selection))
    fitted = MaskSet()
    for name, ref in selection.items():
        if name not in masks:
            raise ValueError(f"there is no mask for {name!r}")
        if masks[name].shape != ref.shape:
            raise ValueError(
                f"mask of {name!r} has shape {tuple(masks[name].shape)}, the weight "
                f"{tuple(ref.shape)}"
            )
        fitted[name] = masks[name].to(ref.parameter.device, copy=True)
    return fitted
