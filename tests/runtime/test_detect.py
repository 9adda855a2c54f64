from __future__ import annotations

import pytest
import torch

from aerogel.runtime.detect import block_fill, detect_zeros, satisfies_n_of_m


def blocks(rows: int, cols: int, block: int, density: float) -> torch.Tensor:
    kept = torch.rand(rows // block, cols) < density
    return torch.randn(rows, cols) * kept.repeat_interleave(block, 0)


def n_of_m(rows: int, cols: int, n: int, m: int) -> torch.Tensor:
    order = torch.rand(rows, cols // m, m).argsort(-1)
    return torch.randn(rows, cols) * (order < n).flatten(1)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("block", [2, 4])
def test_blocks_of_output_channels_are_recognised(block: int, density: float) -> None:
    torch.manual_seed(0)
    found = detect_zeros(blocks(64, 128, block, density))
    assert found.pattern == f"{block}x1"
    assert found.block == block


@pytest.mark.parametrize("n_m", [(1, 4), (2, 4), (2, 8), (1, 8), (4, 8), (1, 16)])
def test_n_of_m_is_recognised(n_m: tuple[int, int]) -> None:
    torch.manual_seed(0)
    found = detect_zeros(n_of_m(64, 128, *n_m))
    assert found.pattern == f"{n_m[0]}:{n_m[1]}"
    assert found.sparsity == pytest.approx(1 - n_m[0] / n_m[1])


@pytest.mark.parametrize("n_m", [(2, 4), (4, 8)])
def test_groups_of_input_channels_of_a_convolution_are_recognised(n_m: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = n_of_m(16 * 9, 32, *n_m).view(16, 3, 3, 32).movedim(-1, 1)
    assert detect_zeros(weight).pattern == f"{n_m[0]}:{n_m[1]}"
    assert detect_zeros(weight.contiguous()).pattern == f"{n_m[0]}:{n_m[1]}"


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.95])
def test_random_zeros_are_unstructured(density: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * (torch.rand(64, 256) < density)
    assert detect_zeros(weight).pattern == "unstructured"


def test_dense_weight_fills_every_block() -> None:
    found = detect_zeros(torch.ones(8, 8, 3, 3))
    assert (found.pattern, found.sparsity, found.block) == ("dense", 0.0, 4)


def test_few_zeros_leave_a_block_kernel_possible() -> None:
    torch.manual_seed(0)
    found = detect_zeros(torch.randn(64, 256) * (torch.rand(64, 256) < 0.95))
    assert found.pattern == "unstructured"
    assert found.block == 4


def test_all_zero_and_nan_weights_are_told_apart() -> None:
    assert detect_zeros(torch.zeros(8, 8)).sparsity == 1.0
    assert detect_zeros(torch.full((8, 8), float("nan"))).sparsity == 0.0


def test_rows_that_fill_no_block_are_left_out() -> None:
    assert block_fill(torch.ones(3, 5), 4) == 0.0
    assert block_fill(torch.cat([torch.ones(4, 5), torch.eye(3, 5)]), 4) == 1.0


def test_inputs_that_divide_into_no_groups_satisfy_no_pattern() -> None:
    assert not satisfies_n_of_m(torch.zeros(4, 6), 2, 4)
