"""What tests of several processes share."""

from __future__ import annotations

import os
import socket
import sys

import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def leave_group() -> None:
    """End the group and this process, once all its results are written.

    `DistributedDataParallel` leaves references to its group behind, so the threads of gloo outlive
    `destroy_process_group`. One that still frees a tensor while the interpreter shuts down aborts
    the process; without that shutdown it cannot.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
