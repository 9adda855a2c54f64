"""Attention of a few queries over keys and values in 2, 4 or 8 bits.

Codes become numbers in registers, next to the products they are for: a key's step and low go into
the query, a value's into its weight, so that a step of decoding reads little more than the codes.
`csrc/attention_codes.h` describes the layout and the kernels.

Reference: the grouping of ranges is that of He et al., ZipCache, arXiv 2405.14256.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._calls import address, needs_grad
from aerogel.kernels._library import native, native_in_use

TILE_TOKENS = 16  # whose bytes lie side by side
CODE_BITS = (2, 4, 8)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNK = 128  # tiles that the reference turns into numbers at a time


def pack_tokens(codes: Tensor, bits: int) -> Tensor:
    """Codes (B, H, n, D) uint8 below ``2 ** bits`` in tiles of 16 tokens, the last one filled up.

    Returns:
        (B, H, ceil(n / 16), D * bits / 8, 16) uint8. A byte holds neighbouring channels of one
        token, the first lowest.

    Raises:
        ValueError: `bits` is unknown, or D is no multiple of the codes in a byte.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"bits={bits}: expected one of {CODE_BITS}")
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(
            f"head_dim={codes.shape[-1]}: expected a multiple of {per_byte} with {bits} bits"
        )
    short = -codes.shape[2] % TILE_TOKENS
    codes = torch.nn.functional.pad(codes, (0, 0, 0, short))
    lanes = codes.unflatten(-1, (-1, per_byte)).unflatten(2, (-1, TILE_TOKENS))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed.transpose(-1, -2).contiguous()


def unpack_tokens(packed: Tensor, bits: int) -> Tensor:
    """Undoes `pack_tokens`, but for the tokens that fill the last tile: (B, H, tiles * 16, D)."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    bytewise = packed.transpose(-1, -2).flatten(2, 3)
    return ((bytewise[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


@dataclass(frozen=True, eq=False)
class TokenCodes:
    """Keys or values of tokens as codes with ``x = (code * step + low) * channel``.

    Attributes:
        codes: (B, H, tiles, D * bits / 8, 16) uint8, see `pack_tokens`.
        bits: of a code.
        tokens: of each batch element; what fills the last tile does not count.
        low: smallest number of each group, (B, H, 1, D) or (B, 1, tiles * 16, 1).
        step: distance of two codes, of the same shape.
        channel: factor of each channel (B, H, 1, D), or None.
    """

    codes: Tensor
    bits: int
    tokens: int
    low: Tensor
    step: Tensor
    channel: Tensor | None = None

    def dequantised(self, tiles: slice = slice(None)) -> Tensor:
        """(B, H, n, D) float32, of some tiles; those of no token are numbers of no meaning."""
        first = (tiles.start or 0) * TILE_TOKENS
        codes = unpack_tokens(self.codes[:, :, tiles], self.bits).float()
        part = slice(first, first + codes.shape[2])
        low, step = (t if t.shape[2] == 1 else t[:, :, part] for t in (self.low, self.step))
        x = codes * step.float() + low.float()
        x = x if self.channel is None else x * self.channel.float()
        return x[:, :, : self.tokens - first]

    def parts(self) -> list[Tensor]:
        """What it stores."""
        channel = [] if self.channel is None else [self.channel]
        return [self.codes, self.low, self.step, *channel]

    def select(self, index: Tensor) -> TokenCodes:
        """Some batch elements."""
        codes, low, step, *rest = (t[index].contiguous() for t in self.parts())
        return replace(self, codes=codes, low=low, step=step, channel=rest[0] if rest else None)


class CodedTokens:
    """Segments of coded tokens, to which `attend` attends; those there are stay as they are."""

    def __init__(self) -> None:
        self.segments: list[tuple[TokenCodes, TokenCodes, Tensor]] = []
        self._native: Any = None

    def append(self, keys: TokenCodes, values: TokenCodes, counts: Tensor) -> None:
        """Adds tokens that were coded together.

        Args:
            keys: one range per channel, no factors.
            values: one range per token, and factors of the channels.
            counts: (B,) int64, tokens of each batch element that are real: its first ones.

        Raises:
            ValueError: keys and values are in other bits, or of other tokens.
        """
        apart = keys.codes.shape[:3] != values.codes.shape[:3] or keys.tokens != values.tokens
        if keys.bits != values.bits or apart:
            raise ValueError(
                f"values: {values.tokens} tokens in {values.bits} bits, expected those of the keys"
                f": {keys.tokens} in {keys.bits}"
            )
        self.segments.append((keys, values, counts.to(torch.int64).contiguous()))
        if self._native is not None:
            _add(self._native, *self.segments[-1])

    def attend(
        self,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        prior: tuple[Tensor, Tensor] | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over all tokens: every query sees every one.

        Native for float32, bfloat16 and float16 on the CPU without gradients; everything else, and
        `AEROGEL_KERNELS=reference`, takes the torch reference.

        Args:
            q: (B, Hq, Lq, D).
            scale: of the logits.
            softcap: logits become ``softcap * tanh(logit / softcap)``.
            prior: (o, lse) of the same queries over other keys, which joins the softmax.
            threads: default `torch.get_num_threads()`; the result does not depend on it.

        Returns:
            o (B, Hq, Lq, Dv) in q's type and lse (B, Hq, Lq) float32; 0 and -inf without tokens.

        Raises:
            ValueError: q does not fit the tokens, or there is nothing to attend to.
        """
        if not self.segments:
            if prior is None:
                raise ValueError("segments: expected at least one, or a prior")
            return prior
        keys, values, _ = self.segments[0]
        batch, heads, dim = *keys.codes.shape[:2], keys.codes.shape[3] * 8 // keys.bits
        fits = q.shape[0] == batch and q.shape[1] % heads == 0 and q.shape[3] == dim
        if q.dim() != 4 or not fits:
            raise ValueError(
                f"q: shape {tuple(q.shape)}, expected ({batch}, a multiple of {heads}, rows, {dim})"
            )
        cpu = q.is_cpu and q.dtype in _TYPES and native_in_use() is not None
        if not cpu or needs_grad((q, *(prior or ()))):
            return coded_attention_reference(q, self.segments, scale, softcap, prior)
        if self._native is None:
            self._native = native().CodedSegments()
            for segment in self.segments:
                _add(self._native, *segment)
        q = q if q.stride(-1) == 1 else q.contiguous()
        value_dim = values.codes.shape[3] * 8 // values.bits
        o = q.new_empty(*q.shape[:3], value_dim)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
        args = native().AttendArgs()
        args.sizes(_TYPES[q.dtype], batch, q.shape[1], heads, q.shape[2], 0, dim, value_dim)
        args.q(q.data_ptr(), *q.stride()[:3])
        args.o(o.data_ptr(), *o.stride()[:3])
        args.lse(lse.data_ptr())
        args.rules(0, scale, False, 0, 1, 0, softcap or 0.0, 0)
        seen, seen_lse = None, None
        if prior is not None:
            seen, seen_lse = prior[0].to(q.dtype).contiguous(), prior[1].float().contiguous()
        strides = (0, 0, 0) if seen is None else seen.stride()[:3]
        threads = torch.get_num_threads() if threads is None else threads
        self._native.attend(args, address(seen), *strides, address(seen_lse), threads)
        return o, lse


def coded_attention_reference(
    q: Tensor,
    segments: list[tuple[TokenCodes, TokenCodes, Tensor]],
    scale: float,
    softcap: float | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `CodedTokens.attend` computes, in torch, some tokens at a time; differentiable in q."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = segments[0][0].codes.shape[1]
    grouped = q.to(kind).unflatten(1, (heads, -1))
    parts = [] if prior is None else [(prior[0].to(kind), prior[1].to(kind))]
    for keys, values, counts in segments:
        for first in range(0, keys.codes.shape[2], _CHUNK):
            tiles = slice(first, first + _CHUNK)
            k, v = (x.dequantised(tiles).to(kind)[:, :, None] for x in (keys, values))
            s = grouped @ k.transpose(-1, -2) * scale
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            token = first * TILE_TOKENS + torch.arange(s.shape[-1], device=s.device)
            real = token < counts.to(s.device)[:, None]
            s = s.masked_fill(~real[:, None, None, None], -torch.inf)
            lse = torch.logsumexp(s, -1)
            shift = torch.where(torch.isinf(lse), 0, lse)
            o = torch.exp(s - shift[..., None]) @ v
            parts.append((o.flatten(1, 2), lse.flatten(1, 2)))
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - torch.where(torch.isinf(total), 0, total))
    out = torch.stack([o for o, _ in parts])
    return (out * shares[..., None]).sum(0).to(q.dtype), total


def _add(store: Any, keys: TokenCodes, values: TokenCodes, counts: Tensor) -> None:
    scales = (keys.low, keys.step, values.low, values.step, values.channel)
    places = ((t.data_ptr(), _TYPES[t.dtype]) for t in scales if t is not None)
    codes = keys.codes.data_ptr(), values.codes.data_ptr()
    store.add(*codes, keys.codes.shape[2], keys.bits, counts.data_ptr(), *places)
