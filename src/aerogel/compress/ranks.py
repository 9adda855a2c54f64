"""Running under `torchrun` or `accelerate launch`: rank 0 decides, writes, prints and measures."""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def from_main(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=True)
    box: list[Any] = [value]
    broadcast_object_list(box)
    return box[0]


def leave() -> None:
    """End the group: what follows is rank 0's alone, and must not wait for the others."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
