"""Patterns that fix the choice inside every group: N:M in its forms, and kernel dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.kernels import nm_mask
from aerogel.sparsity.pattern import Pattern, need_dims
from aerogel.sparsity.topk import topk_rows
from aerogel.sparsity.transposable import transposable_mask


class GroupPattern(Pattern):
    """A pattern that decides inside each group by itself, given the scores."""

    def select(self, score: Tensor) -> Tensor:
        """The mask of the score's shape that keeps the best of every group."""
        raise NotImplementedError

    def select_largest(self, weight: Tensor) -> Tensor:
        """`select` by magnitude."""
        return self.select(weight.detach().abs())


@dataclass(frozen=True)
class NM(GroupPattern):
    """``n`` kept of every ``m`` consecutive elements along one axis.

    A group of a convolution runs along the channels at one kernel position, and never over the end
    of a row.

    Args:
        n: kept per group, 1 <= n <= m.
        m: group length.
        axis: 1 = consecutive inputs (the reduction of the forward product), 0 = consecutive outputs
            (the reduction of the input gradient).
        pad: accept an axis that ``m`` does not divide; the short last group keeps
            ``min(n, its length)``.
    """

    n: int
    m: int
    axis: Literal[0, 1] = 1
    pad: bool = False

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m)
        if self.axis not in (0, 1):
            raise ValueError(f"axis of an N:M pattern must be 0 or 1, got {self.axis}")

    @property
    def spec(self) -> str:
        return f"{self.n}:{self.m}" + (":axis0" if self.axis == 0 else "") + _pad_suffix(self.pad)

    @property
    def fixed_density(self) -> float:
        return self.n / self.m

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)
        _need_divisible(self, shape[self.axis], self.m, self.pad, name)

    def groups(self, score: Tensor) -> Tensor:
        return _padded_rows(_axis_last(score, self.axis), self.m, -torch.inf)

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        return _from_rows(group_mask, shape, self.axis, self.m)

    def select(self, score: Tensor) -> Tensor:
        return nm_mask(score, self.n, self.m, self.axis)

    def select_largest(self, weight: Tensor) -> Tensor:
        return nm_mask(weight.detach(), self.n, self.m, self.axis, magnitude=True)

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        rows = _axis_last(mask, self.axis)
        counts = _padded_rows(rows, self.m, False).sum(dim=1)
        room = _padded_rows(torch.ones_like(rows), self.m, False).sum(dim=1).clamp(max=self.n)
        return bool((counts == room).all() if exact else (counts <= room).all())


def nm_mask_(
    mask: Tensor, score: Tensor, n: int, m: int, axis: Literal[0, 1] = 1, *, pad: bool = False
) -> Tensor:
    """Write into a mask which ``n`` of every ``m`` consecutive scores are largest.

    Args:
        mask: bool of the score's shape, overwritten.
        score: (out, in, *kernel), higher = keep; of equals the first stays.
        n: kept per group.
        m: group length.
        axis: as of `NM`.
        pad: as of `NM`.

    Returns:
        The mask.

    Raises:
        ValueError: a mask of another type or shape, n > m, an axis that m does not divide.
    """
    pattern = NM(n, m, axis, pad)
    pattern.validate(score.shape, "score")
    if mask.dtype is not torch.bool or mask.shape != score.shape:
        raise ValueError(
            f"mask must be bool {tuple(score.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask.copy_(pattern.select(score))


@dataclass(frozen=True)
class NMPairs(GroupPattern):
    """Groups of ``2m`` consecutive inputs as ``m`` pairs, ``n`` pairs kept.

    A pair scores the sum of its two. The layout of 2:4 sparsity for 4-bit integers.
    """

    n: int
    m: int
    pad: bool = False

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m)

    @property
    def spec(self) -> str:
        return f"{self.n}:{self.m}:pairs" + _pad_suffix(self.pad)

    @property
    def fixed_density(self) -> float:
        return self.n / self.m

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)
        _need_divisible(self, shape[1], 2 * self.m, self.pad, name)

    def groups(self, score: Tensor) -> Tensor:
        return _padded_rows(_axis_last(score, 1), 2 * self.m, -torch.inf)

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        if group_mask.shape[-1] == self.m:
            group_mask = group_mask.repeat_interleave(2, dim=-1)
        return _from_rows(group_mask, shape, 1, 2 * self.m)

    def select(self, score: Tensor) -> Tensor:
        groups = self.groups(score)
        pairs = groups.view(-1, self.m, 2)
        # A pair cut by the end of the row scores by the half that exists.
        real = torch.where(pairs.isneginf(), torch.zeros_like(pairs), pairs).sum(dim=2)
        pooled = real.masked_fill(pairs.isneginf().all(dim=2), -torch.inf)
        return self.expand(topk_rows(pooled, self.n), score.shape)

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        rows = _axis_last(mask, 1)
        exists = _padded_rows(torch.ones_like(rows), 2 * self.m, False).view(-1, self.m, 2)
        kept = _padded_rows(rows, 2 * self.m, False).view(-1, self.m, 2)
        if not bool(((kept == exists) | ~kept.any(dim=2, keepdim=True)).all()):
            return False
        counts = kept.any(dim=2).sum(dim=1)
        room = exists.any(dim=2).sum(dim=1).clamp(max=self.n)
        return bool((counts == room).all() if exact else (counts <= room).all())


@dataclass(frozen=True)
class TransposableNM(GroupPattern):
    """N:M along inputs and outputs at once, so that the transposed weight is N:M too.

    Exact (best of all valid tiles) for ``m <= 4``; greedy with repair above.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m)

    @property
    def spec(self) -> str:
        return f"{self.n}:{self.m}:transposable"

    @property
    def fixed_density(self) -> float:
        return self.n / self.m

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        need_dims(self, shape, name)
        for side in (shape[0], shape[1]):
            _need_divisible(self, side, self.m, False, name)

    def groups(self, score: Tensor) -> Tensor:
        matrices = _axis_last(score, 1)  # (out, *kernel, in)
        flat = matrices.reshape(score.shape[0], -1, score.shape[1]).transpose(0, 1)
        tiles = flat.reshape(flat.shape[0], -1, self.m, score.shape[1] // self.m, self.m)
        return tiles.transpose(2, 3).reshape(-1, self.m * self.m)

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        out, inputs, kernel = shape[0], shape[1], tuple(shape[2:])
        tiles = group_mask.reshape(-1, out // self.m, inputs // self.m, self.m, self.m)
        flat = tiles.transpose(2, 3).reshape(-1, out, inputs).transpose(0, 1)
        return flat.reshape(out, *kernel, inputs).movedim(-1, 1).contiguous()

    def select(self, score: Tensor) -> Tensor:
        tiles = self.groups(score).double().view(-1, self.m, self.m)
        # An excluded entry (-inf) costs more than its whole tile can win, but stays finite.
        gone = tiles.isneginf()
        worth = tiles.masked_fill(gone, 0.0).abs().sum(dim=(1, 2), keepdim=True)
        tiles = torch.where(gone, -(worth + 1.0), tiles)
        return self.expand(transposable_mask(tiles, self.n).flatten(1), score.shape)

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        return all(NM(self.n, self.m, axis).is_satisfied(mask, exact) for axis in (0, 1))


def _default_kernel_patterns() -> tuple[tuple[int, ...], ...]:
    """Eight 4-tap patterns of a 3x3 kernel: the centre with a corner, or with three sides."""
    corners = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (4, 5, 7, 8))
    sides = ((1, 3, 4, 5), (1, 3, 4, 7), (1, 4, 5, 7), (3, 4, 5, 7))
    return corners + sides


@dataclass(frozen=True)
class KernelPattern(GroupPattern):
    """Each ``kh x kw`` kernel takes the pattern of a small dictionary that keeps most of its score.

    Args:
        patterns: kept flat positions of every pattern, all of one length.
        kernel: (kh, kw).
        group: output channels that share a pattern.
    """

    patterns: tuple[tuple[int, ...], ...] = field(default_factory=_default_kernel_patterns)
    kernel: tuple[int, int] = (3, 3)
    group: int = 1

    def __post_init__(self) -> None:
        area = self.kernel[0] * self.kernel[1]
        lengths = {len(set(pattern)) for pattern in self.patterns}
        if len(lengths) != 1 or not all(0 <= i < area for p in self.patterns for i in p):
            raise ValueError(
                f"patterns must be positions of a {self.kernel[0]}x{self.kernel[1]} kernel, "
                f"all of one length, got {self.patterns}"
            )
        check_count("group", self.group)

    @property
    def spec(self) -> str:
        if self.patterns != _default_kernel_patterns() or self.kernel != (3, 3):
            raise ValueError("a kernel pattern with its own dictionary has no string form")
        return "kernel-pattern" + (f":{self.group}" if self.group > 1 else "")

    def __str__(self) -> str:
        return f"kernel-pattern({len(self.patterns)} of {len(self.patterns[0])} taps)"

    @property
    def fixed_density(self) -> float:
        return len(self.patterns[0]) / (self.kernel[0] * self.kernel[1])

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        if len(shape) != 4 or tuple(shape[2:]) != self.kernel:
            raise ValueError(
                f"kernel pattern needs kernels {self.kernel}, {name!r} has shape {tuple(shape)}"
            )

    def groups(self, score: Tensor) -> Tensor:
        return score.reshape(-1, self.kernel[0] * self.kernel[1])

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        return group_mask.reshape(tuple(shape))

    def dictionary(self, device: torch.device | None = None) -> Tensor:
        """The patterns as a bool matrix (patterns, kh * kw)."""
        rows = torch.zeros(len(self.patterns), self.kernel[0] * self.kernel[1], dtype=torch.bool)
        for row, positions in zip(rows, self.patterns, strict=True):
            row[list(positions)] = True
        return rows.to(device)

    def select(self, score: Tensor) -> Tensor:
        table = self.dictionary(score.device)
        finite = score.masked_fill(score.isneginf(), 0.0)
        energy = self.groups(finite).square() @ table.t().to(score.dtype)
        if self.group > 1:
            energy = self._share(energy, score.shape)
        return self.expand(table[energy.argmax(dim=1)], score.shape)

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        table = self.dictionary(mask.device)
        kernels = self.groups(mask)
        if exact:
            return bool((kernels[:, None] == table).all(dim=2).any(dim=1).all())
        return bool((~kernels[:, None] | table).all(dim=2).any(dim=1).all())

    def _share(self, energy: Tensor, shape: Sequence[int]) -> Tensor:
        """Energies summed over the output channels of a group and dealt back to each of them."""
        per_channel = energy.view(shape[0], -1)
        padded = F.pad(per_channel, (0, 0, 0, -shape[0] % self.group))
        summed = padded.view(-1, self.group, per_channel.shape[1]).sum(dim=1)
        return summed.repeat_interleave(self.group, 0)[: shape[0]].reshape(energy.shape)


def _check_nm(n: int, m: int) -> None:
    check_count("n", n)
    check_count("m", m)
    if n > m:
        raise ValueError(f"an N:M pattern needs 1 <= n <= m, got {n}:{m}")


def _need_divisible(pattern: Pattern, length: int, group: int, pad: bool, name: str) -> None:
    if not pad and length % group:
        raise ValueError(
            f"{pattern.spec}: {group} does not divide the {length} channels of {name!r}; "
            f"exclude it, or where a pattern can be given, {pattern.spec}:pad takes a shorter group"
        )


def _pad_suffix(pad: bool) -> str:
    return ":pad" if pad else ""


def _axis_last(tensor: Tensor, axis: int) -> Tensor:
    """(out, in, *kernel) -> (out, *kernel, in) for axis 1, (in, *kernel, out) for axis 0."""
    return tensor.movedim(1, -1) if axis == 1 else tensor.movedim(0, -1)


def _padded_rows(tensor: Tensor, size: int, fill: float | bool) -> Tensor:
    short = -tensor.shape[-1] % size
    if short:
        tensor = F.pad(tensor, (0, short), value=fill)
    return tensor.reshape(-1, size)


def _from_rows(rows: Tensor, shape: Sequence[int], axis: int, size: int) -> Tensor:
    others = [side for dim, side in enumerate(shape) if dim != axis]
    length = shape[axis]
    padded = rows.reshape(*others, -(-length // size) * size)
    return padded[..., :length].movedim(-1, axis).contiguous()
