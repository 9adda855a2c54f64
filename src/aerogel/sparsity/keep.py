"""What a mask does to weights, gradients and optimizer state, fast: PyTorch's own ``where`` and
``masked_fill_`` take one entry at a time on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from aerogel.kernels.zero_pruned import INTEGERS, keep_bits, pack_mask, zero_pruned_

StateMask = Literal["all", "momentum", "none"]


def keep_factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as ones and zeros of a float type, to multiply with."""
    return mask.view(torch.uint8).to(dtype)


class Keep:
    """The mask of one weight, to zero what it prunes and to set that apart.

    Args:
        mask: bool, ``True`` = kept.
        like: the weight; the mask goes where it is.
    """

    def __init__(self, mask: Tensor, like: Tensor) -> None:
        self.mask = mask.to(like.device)
        self._bits: Tensor | None = None
        self._packed: Tensor | None = None

    def fits(self, tensor: Tensor) -> bool:
        """Whether the mask is where the tensor is."""
        return self.mask.device == tensor.device

    def zero_(self, tensor: Tensor) -> None:
        """Set the pruned entries to exactly 0, whatever they held."""
        mask = self.mask
        if mask.device != tensor.device:
            mask = mask.to(tensor.device)
        if self._packed is None and tensor.is_cpu:
            self._packed = pack_mask(mask)
        zero_pruned_(tensor, mask, self._packed)

    @torch.no_grad()
    def pruned_part(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor with the kept entries 0."""
        keep = self._bits_for(tensor)
        return (tensor.detach().view(keep.dtype) & ~keep).view(tensor.dtype)

    @torch.no_grad()
    def join_(self, tensor: Tensor, pruned: Tensor) -> None:
        """Replace the pruned entries by those of ``pruned``, whose kept entries must be 0."""
        keep = self._bits_for(tensor)
        tensor.detach().view(keep.dtype).bitwise_and_(keep).bitwise_or_(pruned.view(keep.dtype))

    def _bits_for(self, tensor: Tensor) -> Tensor:
        """The mask as wide as the tensor's entries; kept, as it is asked for in every step."""
        integer = INTEGERS[tensor.element_size()]
        if self._bits is None or self._bits.dtype is not integer:
            self._bits = keep_bits(self.mask, integer)
        return self._bits


def mask_optimizer_state(
    state: Mapping[str, object], leaf: Tensor, keep: Keep, which: StateMask
) -> None:
    """Zero the pruned entries of every per-element state tensor (or of the momentum alone)."""
    if which == "none":
        return
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != leaf.shape or value.dim() == 0:
            continue
        if which == "all" or key == "momentum_buffer":
            keep.zero_(value)
