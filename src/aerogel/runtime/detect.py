"""Which pattern do the zeros of a weight follow? The runtime asks the tensor, not its maker."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from aerogel.kernels.nm import LEAST_GROUP_FILL, NM_PATTERNS

BLOCKS = (4, 2)
# From few zeros in a group to many: what has a kernel of its own, and what is published besides.
_NM = sorted([*NM_PATTERNS, (4, 8), (1, 16)], key=lambda pattern: pattern[0] / pattern[1])
# Share of a stored block that must be non-zero before storing blocks pays (XNNPACK's rule).
MIN_FILL = 0.9
# A pattern is named only where chance alone would not produce it; see `_beyond_chance`.
_CLEARLY_BEYOND_CHANCE = 0.8


@dataclass(frozen=True)
class Zeros:
    """The zeros of one weight.

    Attributes:
        pattern: "dense", "unstructured", "2x1", "4x1" (output channels x inputs) or "N:M".
        sparsity: Fraction of zeros.
        block: Widest output-channel block (4, 2 or 1) whose stored blocks are full enough.
        fill: Non-zero share of the stored blocks, by block width.
    """

    pattern: str
    sparsity: float
    block: int
    fill: dict[int, float] = field(default_factory=dict, hash=False)


def block_fill(weight: Tensor, block: int) -> float:
    """Non-zero share of the stored `block` x 1 blocks along the output channels.

    Args:
        weight: (out, ...); trailing dimensions count as inputs. Rows beyond a multiple of
            `block` are left out, as a packer stores them one by one.
        block: Consecutive output channels that share their columns.

    Returns:
        A fraction in [0, 1]; 1.0 where nothing is stored.
    """
    rows = weight.shape[0] // block * block
    if rows == 0:
        return 0.0
    kept = (weight.detach()[:rows].flatten(1) != 0).unflatten(0, (-1, block))
    stored = int(kept.any(dim=1).sum()) * block
    return float(kept.sum()) / stored if stored else 1.0


def satisfies_n_of_m(weight: Tensor, n: int, m: int) -> bool:
    """Whether no group of `m` consecutive inputs holds more than `n` non-zeros.

    Args:
        weight: (out, in, ...); trailing dimensions count as inputs that lie next to each other.
        n: Most non-zeros of a group.
        m: Inputs of a group.
    """
    kept = weight.detach().flatten(1) != 0
    if kept.shape[1] % m:
        return False
    return bool((kept.unflatten(1, (-1, m)).sum(dim=2) <= n).all())


def detect_zeros(weight: Tensor, min_fill: float = MIN_FILL) -> Zeros:
    """Find the tightest known pattern that the zeros of a weight follow.

    Args:
        weight: (out, in) or (out, in, kh, kw). NaN counts as non-zero.
        min_fill: Share of a stored block that must be non-zero to admit that block width.

    Returns:
        A `Zeros`. `block` may be wider than `pattern` says: a dense weight fills every block.
    """
    if weight.numel() == 0 or weight.dim() < 2:
        return Zeros("dense", 0.0, 1)
    sparsity = 1.0 - float((weight.detach() != 0).sum()) / weight.numel()
    fill = {block: block_fill(weight, block) for block in BLOCKS}
    widest = next((block for block in BLOCKS if fill[block] >= min_fill), 1)
    return Zeros(_name(weight, sparsity, fill), sparsity, widest, fill)


def _name(weight: Tensor, sparsity: float, fill: dict[int, float]) -> str:
    if sparsity == 0.0:
        return "dense"
    density = 1.0 - sparsity
    for block in BLOCKS:
        if _beyond_chance(density, block, fill[block]) >= _CLEARLY_BEYOND_CHANCE:
            return f"{block}x1"
    # Convolutions are pruned in groups of input channels, at every place of the kernel.
    layouts = (weight, weight.movedim(1, -1)) if weight[0, 0].numel() > 1 else (weight,)
    for n, m in _NM:
        full = density >= LEAST_GROUP_FILL * n / m
        if full and any(satisfies_n_of_m(layout, n, m) for layout in layouts):
            return f"{n}:{m}"
    return "unstructured"


def _beyond_chance(density: float, block: int, fill: float) -> float:
    """0 where the fill is that of random zeros, 1 where every stored block is full."""
    if density == 0.0:
        return 0.0
    by_chance = density / (1.0 - (1.0 - density) ** block)
    return (fill - by_chance) / (1.0 - by_chance) if by_chance < 1.0 else 0.0
