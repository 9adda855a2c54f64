"""Zeroing the pruned entries of a tensor by a mask: what training under masks does in every step.

Reference: csrc/zero_pruned.h.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.kernels._library import native_in_use

# Subclasses need not have the memory of what they show.
_PLAIN = (Tensor, nn.Parameter)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by the bytes of an entry."""


def pack_mask(mask: Tensor) -> Tensor:
    """A mask with a bit per entry, as `zero_pruned_` reads it.

    Args:
        mask: bool, of any shape.

    Returns:
        (4 * ceil(entries / 32),) uint8 on the CPU; entry i is bit i % 8 of byte i / 8.
    """
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    words = torch.zeros(-(-mask.numel() // 32) * 4, dtype=torch.uint8, device="cpu")
    words[: bits.size] = torch.from_numpy(bits)
    return words


def zero_pruned_(
    tensor: Tensor, mask: Tensor, packed: Tensor | None = None, *, threads: int | None = None
) -> None:
    """Set the pruned entries of a tensor to exactly 0, in place, whatever they held.

    Native for contiguous tensors on the CPU: one pass, which writes only where something is to be
    zeroed. The tensor's version counts up if anything was, so that a backward pass which needs the
    old values complains as after any operation in place.

    Args:
        tensor: any shape, entries of 1 to 16 bytes.
        mask: bool, of its shape and on its device; ``True`` = kept.
        packed: of `pack_mask`, for masks that act many times; made here otherwise.
        threads: default `torch.get_num_threads()`.

    Raises:
        ValueError: a mask of another shape, type or device.
    """
    fits = mask.shape == tensor.shape and mask.dtype is torch.bool and mask.device == tensor.device
    if not fits or (packed is not None and packed.numel() != -(-mask.numel() // 32) * 4):
        raise ValueError(
            f"mask must be bool {tuple(tensor.shape)} on {tensor.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    width = tensor.element_size()
    plain = tensor.is_cpu and type(tensor) in _PLAIN and width in INTEGERS
    plain = plain and tensor.is_contiguous()
    native = native_in_use() if plain and not torch.compiler.is_compiling() else None
    if native is None:
        return zero_pruned_reference_(tensor, mask)
    if packed is None:
        packed = pack_mask(mask)
    written = native.zero_pruned(
        tensor.data_ptr(),
        packed.data_ptr(),
        tensor.numel(),
        width,
        torch.get_num_threads() if threads is None else threads,
    )
    if written:
        torch.autograd.graph.increment_version(tensor)


@torch.no_grad()
def zero_pruned_reference_(tensor: Tensor, mask: Tensor) -> None:
    """`zero_pruned_` in torch."""
    integer = INTEGERS.get(tensor.element_size())
    if integer is None:
        tensor.masked_fill_(~mask, 0)
    else:  # vectorised, which masked_fill_ is not on CPUs
        tensor.detach().view(integer).bitwise_and_(keep_bits(mask, integer))


def keep_bits(mask: Tensor, integer: torch.dtype) -> Tensor:
    """The mask as integers whose bits are all ones where kept, all zeros elsewhere."""
    return mask.view(torch.uint8).to(integer).neg_()
