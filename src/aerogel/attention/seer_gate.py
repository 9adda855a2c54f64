"""SeerAttention's gates: small networks that foretell which blocks of an attention map matter.

Paper: Gao et al., arXiv 2410.13276; the decoding gate is of SeerAttention-R, arXiv 2506.08889.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.kernels import pool_rows

POOLINGS = ("max", "min", "avg")
BLOCKS = (16, 32, 64, 128)
Grouping = Literal["project", "mean_project", "mean"]
GROUPINGS = ("project", "mean_project", "mean")
_INIT_STD = 0.02
_NORM_EPS = 1e-6


def pool_blocks(
    x: Tensor, block: int, poolings: tuple[str, ...], real: Tensor | None = None
) -> Tensor:
    """Pools a sequence block by block over its real tokens.

    Args:
        x: (B, H, L, d).
        block: tokens of a block; the last one may be partial.
        poolings: some of "max", "min" and "avg"; their results are joined on channels in that
            order.
        real: (B, L) bool, True at real tokens.

    Returns:
        (B, H, ceil(L / block), d * len(poolings)) float32; zero for blocks without real tokens.
    """
    if real is None and not (x.requires_grad and torch.is_grad_enabled()):
        return pool_rows(x, block, poolings)
    x = x.float()
    short = -x.shape[2] % block
    if real is None:
        real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    parts = nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block))
    mask = nn.functional.pad(real, (0, short)).unflatten(1, (-1, block))[:, None, :, :, None]
    count = mask.sum(3)
    found = []
    for name in (n for n in POOLINGS if n in poolings):
        if name == "avg":
            found.append((parts * mask).sum(3) / count.clamp(min=1))
        else:
            worst = -torch.inf if name == "max" else torch.inf
            filled = torch.where(mask, parts, worst)
            pooled = filled.amax(3) if name == "max" else filled.amin(3)
            found.append(torch.where(count > 0, pooled, 0.0))
    return torch.cat(found, -1)


def real_blocks(real: Tensor, block: int) -> Tensor:
    """(B, L) bool to (B, ceil(L / block)) bool: blocks with a real token."""
    return nn.functional.pad(real, (0, -real.shape[1] % block)).unflatten(1, (-1, block)).any(-1)


class _Gate(nn.Module):
    """What the two gates share: sizes and rotary embedding."""

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        gate_dim: int,
        block_size: int,
        k_pool: tuple[str, ...],
        rope_theta: float | None,
    ) -> None:
        super().__init__()
        check_count("num_q_heads", num_q_heads)
        check_count("num_kv_heads", num_kv_heads)
        check_count("head_dim", head_dim)
        check_count("gate_dim", gate_dim, 2)
        if rope_theta is not None:
            check_number("rope_theta", rope_theta, "(0, inf)")
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads={num_q_heads}, num_kv_heads={num_kv_heads}: expected a multiple"
            )
        if block_size not in BLOCKS:
            raise ValueError(f"block_size={block_size}: expected one of {BLOCKS}")
        if gate_dim % 2:
            raise ValueError(f"gate_dim={gate_dim}: expected an even number")
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.gate_dim, self.block_size = gate_dim, block_size
        self.k_pool = _poolings("k_pool", k_pool)
        self.has_rope = rope_theta is not None
        half = torch.arange(0, gate_dim, 2, dtype=torch.float32) / gate_dim
        base = torch.zeros_like(half) if rope_theta is None else 1.0 / rope_theta**half
        self.register_buffer("inv_freq", base)
        self.register_buffer("rope_scale", torch.ones(()))

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.num_q_heads // self.num_kv_heads

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (B or 1, 1, n, dg / 2) at positions (B or 1, n); None without rope."""
        if not self.has_rope:
            return None
        inv_freq: Any = self.inv_freq
        scale: Any = self.rope_scale
        angle = positions[:, None, :, None] * inv_freq.float()
        return angle.cos() * scale, angle.sin() * scale

    @staticmethod
    def _turned(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotary embedding of x (B, H, n, dg)."""
        if rotation is None:
            return x
        cos, sin = rotation
        first, second = x.chunk(2, -1)
        halves = (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        )
        return torch.cat(halves, -1)

    def check_heads(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError if the gate is for other heads."""
        mine = (self.num_q_heads, self.num_kv_heads, self.head_dim)
        if mine != (q_heads, kv_heads, head_dim):
            raise ValueError(
                f"gate: for (query heads, key heads, width) {mine}, but the layer has "
                f"{(q_heads, kv_heads, head_dim)}"
            )


class SeerGate(_Gate):
    """Scores of key blocks for query blocks, per query head.

    Args:
        num_q_heads: query heads.
        num_kv_heads: key heads; divides the query heads.
        head_dim: channels of a head.
        gate_dim: channels of the gate.
        block_size: tokens of a block: 16, 32, 64 or 128.
        q_pool: poolings of queries, some of "max", "min" and "avg".
        k_pool: poolings of keys.
        force_double: queries get a map of their own also where one pooling of the right width would
            do without, as the authors' code does.
        rope_theta: base of the rotary embedding over block positions; None for models without.

    Raises:
        ValueError: a size or a pooling is none of these.
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        gate_dim: int = 128,
        block_size: int = 64,
        q_pool: tuple[str, ...] | list[str] = ("avg",),
        k_pool: tuple[str, ...] | list[str] = ("max", "min", "avg"),
        force_double: bool = False,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        k_pool = tuple(k_pool)
        super().__init__(
            num_q_heads, num_kv_heads, head_dim, gate_dim, block_size, k_pool, rope_theta
        )
        self.q_pool = _poolings("q_pool", tuple(q_pool))
        single = len(self.q_pool) == 1 and gate_dim == head_dim and not force_double
        key_maps = num_q_heads if single else num_kv_heads
        self.k_weight = nn.Parameter(torch.empty(key_maps, head_dim * len(self.k_pool), gate_dim))
        self.q_weight: nn.Parameter | None = None
        self._kept: tuple[Any, tuple[Tensor, Tensor] | None] | None = None
        if not single:
            self.q_weight = nn.Parameter(
                torch.empty(num_q_heads, head_dim * len(self.q_pool), gate_dim)
            )
        for weight in self.parameters():
            nn.init.normal_(weight, std=_INIT_STD)

    def pool(self, q: Tensor, k: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pooled q (B, Hq, n, ..) and k (B, Hkv, n, ..) of one sequence before rotary embedding."""
        self.check_heads(q.shape[1], k.shape[1], q.shape[-1])
        return (
            pool_blocks(q, self.block_size, self.q_pool, real),
            pool_blocks(k, self.block_size, self.k_pool, real),
        )

    def score(
        self, q_pooled: Tensor, k_pooled: Tensor, *, real: Tensor | None = None, causal: bool = True
    ) -> Tensor:
        """Scores of pooled sequences.

        Args:
            q_pooled: (B, Hq, n, d * poolings).
            k_pooled: (B, Hkv, n, d * poolings).
            real: (B, L) bool, True at real tokens.
            causal: later blocks are -inf.

        Returns:
            (B, Hq, n, n); -inf also at key blocks without real tokens.
        """
        if self.k_weight.shape[0] == self.num_q_heads != k_pooled.shape[1]:
            k_pooled = k_pooled.repeat_interleave(self.group, 1)
        q = q_pooled if self.q_weight is None else q_pooled @ self.q_weight
        k = k_pooled @ self.k_weight
        rotation = self._block_rotation(q.shape[2], real, q.device)
        q, k = self._turned(q, rotation), self._turned(k, rotation)
        if k.shape[1] != self.num_q_heads:
            k = k.repeat_interleave(self.group, 1)
        scores = (q * self.gate_dim**-0.5) @ k.transpose(-1, -2)
        n = scores.shape[-1]
        if causal:
            later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill_(later, -torch.inf)
        if real is not None:
            empty = ~real_blocks(real, self.block_size)[:, None, None]
            scores = scores.masked_fill_(empty, -torch.inf)
        return scores

    def forward(
        self, q: Tensor, k: Tensor, real: Tensor | None = None, *, causal: bool = True
    ) -> Tensor:
        """Scores (B, Hq, n, n) of q (B, Hq, L, d) and k (B, Hkv, L, d) before rotary embedding."""
        return self.score(*self.pool(q, k, real), real=real, causal=causal)

    def _block_rotation(
        self, n: int, real: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """The rotation of n blocks; without padding the one of the last call, if that fits."""
        buffers: list[Any] = [self.inv_freq, self.rope_scale]
        special = torch.is_inference_mode_enabled() or any(b.is_inference() for b in buffers)
        if real is not None or special or torch.compiler.is_compiling():
            return self._rotation(self._positions(n, real, device))
        key = (n, device, *((b.data_ptr(), b._version) for b in buffers))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._rotation(self._positions(n, None, device)))
        return self._kept[1]

    def _positions(self, n: int, real: Tensor | None, device: torch.device) -> Tensor:
        """Place of the first real token of every block, counted in the padded sequence."""
        start = torch.arange(n, device=device)[None] * self.block_size
        if real is None:
            return start
        first = real.to(torch.uint8).argmax(-1, keepdim=True)
        inside = (first >= start) & (first < start + self.block_size)
        return torch.where(inside, first, start)


class SeerDecodeGate(_Gate):
    """Scores of key blocks for single queries, one decision per key head (SeerAttention-R).

    Args:
        num_q_heads: query heads.
        num_kv_heads: key heads.
        head_dim: channels of a head.
        gate_dim: channels of the gate.
        block_size: tokens of a block: 16, 32 or 64.
        k_pool: poolings of keys.
        grouping: the query of a group: "project" sums a map per query head, "mean_project" maps the
            mean, "mean" is the mean itself and needs ``gate_dim == head_dim``.
        norm: root-mean-square norms on both sides.
        rope_theta: as for `SeerGate`.

    Raises:
        ValueError: a size, pooling or grouping is none of these.
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        gate_dim: int = 128,
        block_size: int = 64,
        k_pool: tuple[str, ...] | list[str] = ("max", "min", "avg"),
        grouping: Grouping = "project",
        norm: bool = True,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        k_pool = tuple(k_pool)
        super().__init__(
            num_q_heads, num_kv_heads, head_dim, gate_dim, block_size, k_pool, rope_theta
        )
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping={grouping!r}: expected one of {GROUPINGS}")
        if grouping == "mean" and gate_dim != head_dim:
            raise ValueError(f"grouping='mean': expected gate_dim={head_dim}, got {gate_dim}")
        self.grouping = grouping
        self.k_weight = nn.Parameter(
            torch.empty(num_kv_heads, head_dim * len(self.k_pool), gate_dim)
        )
        self.q_weight: nn.Parameter | None = None
        if grouping == "project":
            self.q_weight = nn.Parameter(torch.empty(num_kv_heads, self.group * head_dim, gate_dim))
        elif grouping == "mean_project":
            self.q_weight = nn.Parameter(torch.empty(num_kv_heads, head_dim, gate_dim))
        for weight in (self.k_weight, self.q_weight):
            for matrix in [] if weight is None else weight:
                nn.init.xavier_uniform_(matrix)
        self.q_norm = nn.RMSNorm(gate_dim, _NORM_EPS) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(gate_dim, _NORM_EPS) if norm else nn.Identity()

    def compress(self, k: Tensor, first_block: int = 0, real: Tensor | None = None) -> Tensor:
        """Keys of blocks: k (B, Hkv, L, d) before rotary embedding to (B, Hkv, n, gate_dim).

        `first_block` is the number of the first of these blocks, `real` (B, L) as elsewhere.
        """
        return self.finish(pool_blocks(k, self.block_size, self.k_pool, real), first_block)

    def finish(self, pooled: Tensor, first_block: int = 0) -> Tensor:
        """Pooled keys (B, Hkv, n, d * poolings) to those that `score` takes."""
        place = first_block + torch.arange(pooled.shape[2], device=pooled.device)[None]
        keys = self.k_norm(pooled @ self.k_weight)
        return self._turned(keys, self._rotation(place * self.block_size))

    def queries(self, q: Tensor, first_row: int) -> Tensor:
        """Gate queries (B, Hkv, L, gate_dim) of q (B, Hq, L, d) before rotary embedding."""
        grouped = q.float().unflatten(1, (self.num_kv_heads, self.group))
        if self.grouping == "project":
            x = grouped.transpose(2, 3).flatten(3)
        else:
            x = grouped.mean(2)
        if self.q_weight is not None:
            x = x @ self.q_weight
        place = first_row + torch.arange(q.shape[2], device=q.device)[None]
        return self._turned(self.q_norm(x), self._rotation(place))

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores (B, Hkv, L, n) of gate queries and compressed keys."""
        return queries @ keys.transpose(-1, -2) * self.gate_dim**-0.5


def _poolings(name: str, given: tuple[str, ...]) -> tuple[str, ...]:
    if not given or set(given) - set(POOLINGS) or len(set(given)) != len(given):
        raise ValueError(f"{name}={given}: expected some of {POOLINGS}, each at most once")
    return tuple(p for p in POOLINGS if p in given)
