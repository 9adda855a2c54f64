"""Patterns whose units live or die whole: single weights, blocks, kernels, filters, channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.sparsity.pattern import Pattern, Pool, need_dims


class UnitPattern(Pattern):
    """A weight seen as a matrix of tiles ``(rows, bh, columns, bw)``; each tile is one unit."""

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        raise NotImplementedError

    def _matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1)

    def _restore(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.reshape(tuple(shape))

    def unit_grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Units per column and per row of the weight's matrix."""
        height, width = self._tile(shape)
        rows, columns = self._matrix_shape(shape)
        return -(-rows // height), -(-columns // width)

    def uniform_size(self, shape: Sequence[int]) -> int | None:
        """Weights in every unit, or ``None`` if a ragged edge makes some of them smaller."""
        height, width = self._tile(shape)
        rows, columns = self._matrix_shape(shape)
        return None if rows % height or columns % width else height * width

    def unit_sizes(self, shape: Sequence[int]) -> Tensor:
        """Weights in each unit, int64 of the grid's shape; ragged edge units are smaller."""
        height, width = self._tile(shape)
        rows, columns = self._matrix_shape(shape)
        grid = self.unit_grid(shape)
        tall = torch.full((grid[0],), height)
        wide = torch.full((grid[1],), width)
        tall[-1] = rows - height * (grid[0] - 1)
        wide[-1] = columns - width * (grid[1] - 1)
        return tall[:, None] * wide[None, :]

    def pooled(self, score: Tensor, pool: Pool = "l2") -> Tensor:
        """One score per unit, of the grid's shape.

        Args:
            score: of the weight's shape.
            pool: ``"l2"`` sqrt of the sum of squares, ``"avg"`` mean, ``"max"``, ``"sum"`` over the
                weights that exist (a ragged edge unit is not diluted by its padding).
        """
        shape = score.shape
        if self._tile(shape) == (1, 1):
            return self._matrix(score)
        tiles = self._tiles(score, -torch.inf if pool == "max" else 0.0)
        if pool == "l2":
            return tiles.square().sum(dim=(1, 3)).sqrt()
        if pool == "max":
            return tiles.amax(dim=(1, 3))
        if pool == "sum":
            return tiles.sum(dim=(1, 3))
        if pool == "avg":
            sizes = self.unit_sizes(shape).to(score.device, score.dtype)
            return tiles.sum(dim=(1, 3)) / sizes
        raise ValueError(f"pool must be 'l2', 'avg', 'max' or 'sum', got {pool!r}")

    def groups(self, score: Tensor) -> Tensor:
        height, width = self._tile(score.shape)
        tiles = self._tiles(score, -torch.inf)
        return tiles.permute(0, 2, 1, 3).reshape(-1, height * width)

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        height, width = self._tile(shape)
        rows, columns = self._matrix_shape(shape)
        units = group_mask.reshape(self.unit_grid(shape))
        if (height, width) != (1, 1):
            units = units.repeat_interleave(height, 0).repeat_interleave(width, 1)
        return self._restore(units[:rows, :columns], shape).contiguous()

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        kept = self.pooled(mask.float(), "max") > 0
        return bool((self.expand(kept, mask.shape) == mask).all())

    def _tiles(self, score: Tensor, fill: float) -> Tensor:
        height, width = self._tile(score.shape)
        matrix = self._matrix(score)
        down, right = -matrix.shape[0] % height, -matrix.shape[1] % width
        if down or right:
            matrix = F.pad(matrix, (0, right, 0, down), value=fill)
        return matrix.reshape(matrix.shape[0] // height, height, -1, width)


@dataclass(frozen=True)
class Unstructured(UnitPattern):
    """Every weight on its own."""

    @property
    def spec(self) -> str:
        return "unstructured"

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, 1

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        return True


@dataclass(frozen=True)
class Block(UnitPattern):
    """Tiles of ``bh`` consecutive outputs by ``bw`` consecutive inputs; ragged edges are cut.

    Args:
        bh: tile height, along the output dimension.
        bw: tile width, along the input dimension.
        flatten: lay the tiles over convolutions too, seen as ``(out, in * kh * kw)``. Without it
            only matrices and 1x1 convolutions are accepted.
    """

    bh: int
    bw: int
    flatten: bool = False

    def __post_init__(self) -> None:
        check_count("bh", self.bh)
        check_count("bw", self.bw)

    @property
    def spec(self) -> str:
        return f"block:{self.bh}x{self.bw}" + (":flatten" if self.flatten else "")

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        kernel = tuple(shape[2:])
        if len(shape) < 2 or (not self.flatten and any(side != 1 for side in kernel)):
            raise ValueError(
                f"{self.spec} needs a 2-D weight or a 1x1 convolution, {name!r} has shape "
                f"{tuple(shape)}; flatten=True lays it over (out, in * kernel)"
            )

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.bh, self.bw


@dataclass(frozen=True)
class KernelGroup(UnitPattern):
    """Whole kernels (one input to one output channel) for ``g`` consecutive output channels.

    The last ``out % g`` channels form a group of their own.

    Reference:
        SparseByteNN, arXiv 2310.19509.
    """

    g: int = 1

    def __post_init__(self) -> None:
        check_count("g", self.g)

    @property
    def spec(self) -> str:
        return f"kernel-group:{self.g}"

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)
        if self.g > shape[0]:
            raise ValueError(
                f"kernel group {self.g} is larger than the {shape[0]} output channels of {name!r}"
            )

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.g, math.prod(shape[2:])


@dataclass(frozen=True)
class Filter(UnitPattern):
    """Whole output channels (rows)."""

    @property
    def spec(self) -> str:
        return "filter"

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, math.prod(shape[1:])


@dataclass(frozen=True)
class Channel(UnitPattern):
    """Whole input channels (columns)."""

    @property
    def spec(self) -> str:
        return "channel"

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)

    def _tile(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, shape[0] * math.prod(shape[2:])

    def _matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[1], shape[0] * math.prod(shape[2:])

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).reshape(tensor.shape[1], -1)

    def _restore(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        swapped = (shape[1], shape[0], *shape[2:])
        return matrix.reshape(swapped).transpose(0, 1)
