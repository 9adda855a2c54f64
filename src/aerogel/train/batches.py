"""Which samples a step sees: the same global batches whatever the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

_POOL = 50  # batches whose samples are sorted together


def epoch_order(
    samples: int, seed: int, epoch: int, batch_size: int = 1, lengths: Tensor | None = None
) -> Tensor:
    """The shuffled sample indices of one epoch, a pure function of its arguments.

    Args:
        samples: size of the training set.
        seed: run seed.
        epoch: epoch number.
        batch_size: global batch size; only matters with `lengths`.
        lengths: (samples,) lengths of texts. Given, texts of like length share a batch, which
            then needs little padding: each pool of 50 batches is sorted, and its batches are
            shuffled. WordNet glosses train 2.5 times as fast this way.

    Returns:
        (samples,) int64.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(samples, generator=generator)
    if lengths is None:
        return order
    pools = []
    for pool in order.split(_POOL * batch_size):
        batches = pool[lengths[pool].argsort(stable=True)].split(batch_size)
        full = [batch for batch in batches if len(batch) == batch_size]
        shuffled = torch.randperm(len(full), generator=generator).tolist()
        # An incomplete batch can only be the epoch's last, where it is dropped.
        pools += [full[i] for i in shuffled] + [b for b in batches if len(b) < batch_size]
    return torch.cat(pools)


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
