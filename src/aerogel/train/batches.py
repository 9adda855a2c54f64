"""Which samples a step sees: the same global batches whatever the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The shuffled sample indices of one epoch, a pure function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


def shares(order: Tensor, step: int, batch_size: int, rank: int, world: int, parts: int) -> Any:
    """This process's micro-batches of one step of an epoch.

    Args:
        order: (samples,) the epoch's order.
        step: step within the epoch.
        batch_size: global batch size, a multiple of world * parts.
        rank: number of this process.
        world: number of processes.
        parts: micro-batches for each process.

    Returns:
        `parts` tensors of indices. Part by part, the processes together see one contiguous piece
        of the global batch, whose place does not depend on how many of them there are.
    """
    batch = order[step * batch_size : (step + 1) * batch_size]
    return [piece.chunk(world)[rank] for piece in batch.chunk(parts)]


def take(
    split: Any,
    indices: Tensor,
    device: torch.device,
    *,
    augment: str = "none",
    seed: int = 0,
    epoch: int = 0,
    channels_last: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Cut a batch out of a split and move it to a device.

    A split with a method `batch` (all of `aerogel.data`) serves whole batches. Any other
    `torch.utils.data.Dataset` of `(input, target)` pairs is collated sample by sample.
    """
    inputs: tuple[Tensor, ...]
    target: Tensor | None
    if hasattr(split, "batch"):
        inputs, target = split.batch(indices, augment=augment, seed=seed, epoch=epoch)
    else:
        x, target = default_collate([split[i] for i in indices.tolist()])
        inputs = (x,)
    layout = torch.channels_last if channels_last else torch.preserve_format
    moved = tuple(
        x.to(device, memory_format=layout if x.dim() == 4 else torch.preserve_format)
        for x in inputs
    )
    return moved, None if target is None else target.to(device)
