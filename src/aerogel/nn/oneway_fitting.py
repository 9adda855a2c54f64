"""Factors of a dense convolution kernel: what one-way layers start from when they replace one.

Kernels are (out, in, k_1, .., k_d), d = 2 or 3; everything is computed in double precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALS_SWEEPS = 50


def chain_bounds(outputs: int, inputs: int, kernel: Sequence[int]) -> list[int]:
    """Channels between the stages of a chain beyond which more of them add nothing."""
    left = list(itertools.accumulate(kernel, lambda a, k: a * k, initial=inputs))[1:-1]
    right = [outputs * math.prod(kernel[axis:]) for axis in range(1, len(kernel))]
    return [min(pair) for pair in zip(left, right, strict=True)]


def fit_chain(kernel: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Successive truncated singular value decompositions, one for each cut between two axes.

    Args:
        kernel: (O, I, k_1, .., k_d).
        widths: channels between the stages, d - 1 of them, at most `chain_bounds`.

    Returns:
        One (out, in, k) factor for each axis. For d = 2 no other pair of that width is closer in
        the Frobenius norm.
    """
    sides = kernel.shape[2:]
    rest = kernel.double().movedim(0, -1)  # (I, k_1, .., k_d, O)
    inputs = kernel.shape[1]
    factors = []
    for side, width in zip(sides[:-1], widths, strict=True):
        left, singular, right = torch.linalg.svd(
            rest.reshape(inputs * side, -1), full_matrices=False
        )
        root = singular[:width].sqrt()
        made = left[:, :width] * root  # the root on either side keeps both factors of one size
        factors.append(_padded(made.T.reshape(-1, inputs, side), width))
        rest = _padded(root[:, None] * right[:width], width)
        inputs = width
    last = rest.reshape(inputs, sides[-1], kernel.shape[0])
    factors.append(last.permute(2, 0, 1))
    return [factor.contiguous() for factor in factors]


def fit_per_kernel(kernel: Tensor, rank: int) -> list[Tensor]:
    """The `rank` largest terms of every (o, i) kernel on its own.

    For d = 2 its singular value decomposition. For d = 3 two in succession, the shortest axis
    first: the terms are orthogonal, so the error is the discarded terms' squared size.

    Returns:
        One (rank, O, I, k_j) tensor for each axis.
    """
    kernel = kernel.double()
    if kernel.dim() == 4:
        left, size, right = torch.linalg.svd(kernel, full_matrices=False)
        vectors = [left.movedim(-1, 0), right.movedim(-2, 0)]
        return _largest(size.movedim(-1, 0), vectors, rank)
    first = min(range(3), key=lambda axis: kernel.shape[2 + axis])
    turned = kernel.movedim(2 + first, 2)
    sides = turned.shape[3:]
    left, size, right = torch.linalg.svd(turned.flatten(3), full_matrices=False)
    inner = right.unflatten(-1, sides)  # (O, I, s, k_b, k_c)
    left_b, size_b, right_c = torch.linalg.svd(inner, full_matrices=False)
    count = size_b.shape[-1]
    sizes = (size[..., None] * size_b).flatten(2).movedim(-1, 0)
    vectors = [
        left.movedim(-1, 0).repeat_interleave(count, dim=0),
        left_b.transpose(-1, -2).flatten(2, 3).movedim(2, 0),
        right_c.flatten(2, 3).movedim(2, 0),
    ]
    vectors.insert(first, vectors.pop(0))
    return _largest(sizes, vectors, rank)


def fit_cp(kernel: Tensor, rank: int, sweeps: int = ALS_SWEEPS) -> list[Tensor]:
    """Canonical polyadic form of the whole tensor by alternating least squares.

    Started from the leading singular vectors of every unfolding (filled up with a fixed random
    draw), so the same kernel always gives the same factors.

    Returns:
        (O, rank), (I, rank), and (k_j, rank) for each axis; all columns have one size.
    """
    tensor = kernel.double()
    generator = torch.Generator().manual_seed(0)
    unfolded = [tensor.movedim(axis, 0).flatten(1) for axis in range(tensor.dim())]
    factors = [_leading(each, rank, generator) for each in unfolded]
    for _ in range(sweeps):
        for axis, flat in enumerate(unfolded):
            others = factors[:axis] + factors[axis + 1 :]
            gram = math.prod(
                (f.T @ f for f in others), start=torch.ones_like(others[0].T @ others[0])
            )
            columns = others[0]
            for other in others[1:]:
                columns = (columns[:, None] * other[None]).flatten(0, 1)
            factors[axis] = flat @ columns @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    norms = [factor.norm(dim=0).clamp_min(1e-30) for factor in factors]
    size = torch.stack(norms).log().mean(0).exp()
    return [factor / norm * size for factor, norm in zip(factors, norms, strict=True)]


def _leading(flat: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    left = torch.linalg.svd(flat, full_matrices=False)[0][:, :rank]
    drawn = torch.randn(flat.shape[0], rank - left.shape[1], generator=generator, dtype=flat.dtype)
    return torch.cat([left, drawn.to(flat)], dim=1)


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _largest(sizes: Tensor, vectors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The terms of largest size, (T, O, I) with (T, O, I, k) vectors, sizes spread evenly."""
    kept, index = sizes.topk(min(rank, sizes.shape[0]), dim=0)
    share = kept.pow(1.0 / len(vectors))[..., None]
    chosen = [v.gather(0, index[..., None].expand(*index.shape, v.shape[-1])) for v in vectors]
    return [_padded(share * each, rank) for each in chosen]
