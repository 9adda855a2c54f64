"""Batch norm over processes: with one process it is the plain layer, with two the sum of both."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from aerogel.train import synchronized_batch_norm
from processes import free_port, leave_group

SHAPES = ((6, 5), (6, 5, 4), (6, 5, 3, 2))


def layer(rank_of_x: int) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    torch.manual_seed(1)
    norm = kinds[rank_of_x](5, momentum=None if rank_of_x == 3 else 0.2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def data(shape: tuple[int, ...]) -> torch.Tensor:
    # A large mean: the mean of squares minus the squared mean would lose its digits.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 100.0


def step(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, y.numel() // len(y)).view_as(y[0])).square().sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad


def worker(rank: int, port: int, results: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for shape in SHAPES:
        norm = layer(len(shape))
        with synchronized_batch_norm(norm):
            for _ in range(2):
                norm.zero_grad()
                y, grad, weight, bias = step(norm, data(shape).chunk(2)[rank])
        for gradient in (weight, bias):
            dist.all_reduce(gradient)
        values = (y, grad, weight, bias, norm.running_mean, norm.running_var)
        results[rank, shape] = [v.numpy() for v in values]
        results[rank, "forward restored"] = "forward" not in vars(norm)
    leave_group()


@pytest.fixture(scope="module")
def two_processes() -> dict:
    results = mp.Manager().dict()
    mp.spawn(worker, args=(free_port(), results), nprocs=2)
    return dict(results)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_halves_equal_the_whole(two_processes: dict, shape: tuple[int, ...]):
    norm = layer(len(shape))
    for _ in range(2):
        norm.zero_grad()
        y, grad, weight, bias = step(norm, data(shape))
    first, second = ([torch.from_numpy(v) for v in two_processes[r, shape]] for r in (0, 1))
    close = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y, **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), grad, **close)
    torch.testing.assert_close(first[2], weight, **close)
    torch.testing.assert_close(first[3], bias, **close)
    torch.testing.assert_close(first[4], norm.running_mean, **close)
    torch.testing.assert_close(first[5], norm.running_var, **close)
    assert torch.equal(first[5], second[5])


def test_layers_are_themselves_afterwards(two_processes: dict):
    assert two_processes[0, "forward restored"]


def test_one_process_keeps_the_plain_layer():
    norm = layer(4)
    with synchronized_batch_norm(norm):
        assert "forward" not in vars(norm)
