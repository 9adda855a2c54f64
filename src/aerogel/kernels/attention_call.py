"""The checked arguments of attention over a stream of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_KEYS = 64  # keys of a tile at most
FULL, EDGE, GATHER, NO_WINDOW = 0, 1, 2, 4  # bits of a tile's kind
MAX_BLOCK_Q = 512
MAX_DIM = 256
MAX_KEYS = 1 << 24  # positions are compared as float32 differences

_STREAM = (
    ("tile_ptr", torch.int64),
    ("kind", torch.uint8),
    ("start", torch.int32),
    ("length", torch.int16),
    ("gather_idx", torch.int32),
    ("tile_bias", torch.float32),
)


STREAM_TYPES = tuple(dtype for _, dtype in _STREAM[:5])


@dataclass(eq=False, slots=True)
class AttentionCall:
    """What a kernel reads; `of` checks it.

    Attributes:
        q, k, v: with unit last strides.
        stream: tile_ptr, kind, start, length, gather_idx, tile_bias (or None), contiguous.
        plan: Bp, Hp, block_q.
        window: (Hp,) int64, 0 for none, or None.
        softcap: 0 for none.
        linear: weights are the scores themselves.
        dropout_p: probability of dropping a weight, by `dropout_factors` of the seed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    stream: tuple[Any, ...]
    plan: tuple[int, int, int]
    q_offset: int
    scale: float
    causal: bool
    window: Tensor | None
    window_block: int
    key_padding: Tensor | None
    softcap: float
    sink_logit: Tensor | None
    threads: int
    linear: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stream: tuple[Tensor | None, ...],
        *,
        plan: tuple[int, int, int],
        rules: tuple[Any, ...],
        weights: tuple[bool, float, int] = (False, 0.0, 0),
        threads: int | None = None,
    ) -> AttentionCall:
        """Checks shapes, dtypes and sizes; tiles themselves are checked natively.

        Raises:
            ValueError: naming the argument, its value and what was expected.
        """
        q_offset, scale, causal, window, window_block, key_padding, softcap, sink_logit = rules
        # A step of decoding makes this call once a layer, on cold caches: every attribute is read
        # once, and what is right already is not touched.
        shape, k_shape = q.shape, k.shape
        _check_tensors(q, k, v, shape, k_shape)
        _check_plan(shape, k_shape, plan)
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise ValueError(f"threads={threads}: expected at least 1")
        if window_block < 1:
            raise ValueError(f"window_block={window_block}: expected at least 1")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap}: expected a positive number, or None")
        linear, dropout_p, seed = weights
        if linear and (softcap is not None or sink_logit is not None or stream[5] is not None):
            raise ValueError("linear=True: expected no softcap, sink_logit and tile_bias")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p={dropout_p}: expected in [0, 1)")
        batch, q_heads, q_len, dim = shape
        padding = sink = None
        if key_padding is not None:
            padding = _checked("key_padding", key_padding, (batch, k_shape[2]), torch.bool, q)
        if sink_logit is not None:
            sink = _checked("sink_logit", sink_logit, (q_heads,), torch.float32, q)
        return cls(
            q=unit_rows(q),
            k=unit_rows(k),
            v=unit_rows(v),
            stream=_checked_stream(stream, plan, q, q_len),
            plan=plan,
            q_offset=k_shape[2] - q_len if q_offset is None else q_offset,
            scale=dim**-0.5 if scale is None else float(scale),
            causal=bool(causal),
            window=None if window is None else _window(window, plan[1], q),
            window_block=window_block,
            key_padding=padding,
            softcap=0.0 if softcap is None else float(softcap),
            sink_logit=sink,
            threads=threads,
            linear=linear,
            dropout_p=float(dropout_p),
            seed=seed & 0xFFFFFFFF,
        )

    def check_results(self, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None) -> None:
        """Raises ValueError unless these belong to this call's results."""
        rows = tuple(self.q.shape[:3])
        shapes = {"o": (*rows, self.v.shape[-1]), "lse": rows, "dlse": rows}
        shapes["do"] = shapes["o"]
        for name, x in (("o", o), ("lse", lse), ("do", do), ("dlse", dlse)):
            if x is not None and tuple(x.shape) != shapes[name]:
                raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {shapes[name]}")
        if o.dtype != self.q.dtype:
            raise ValueError(f"o: {o.dtype}, expected {self.q.dtype}")


def unit_rows(x: Tensor) -> Tensor:
    """`x` itself if neighbours in its last dimension are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, shape: torch.Size, k_shape: torch.Size) -> None:
    v_shape, dtype, device = v.shape, q.dtype, q.device
    for name, x, size in (("q", q, shape), ("k", k, k_shape), ("v", v, v_shape)):
        if len(size) != 4:
            raise ValueError(f"{name}: shape {tuple(size)}, expected 4 dimensions")
        if x.dtype is not dtype or x.device != device:
            raise ValueError(f"{name}: {x.dtype} on {x.device}, expected {dtype} on {device}")
        if not 1 <= size[3] <= MAX_DIM:
            raise ValueError(f"{name}: {size[3]} dimensions a head, expected 1 to {MAX_DIM}")
    if k_shape[0] != shape[0] or k_shape[3] != shape[3]:
        raise ValueError(f"k: shape {tuple(k_shape)}, expected B and D of q, {tuple(shape)}")
    if v_shape[:3] != k_shape[:3]:
        raise ValueError(f"v: shape {tuple(v_shape)}, expected B, Hkv, Lk of k, {tuple(k_shape)}")
    if k_shape[1] < 1 or shape[1] % k_shape[1]:
        raise ValueError(f"q: {shape[1]} heads, expected a multiple of k's {k_shape[1]}")
    if k_shape[2] >= MAX_KEYS:
        raise ValueError(f"k: {k_shape[2]} keys, expected fewer than {MAX_KEYS}")


def _check_plan(shape: torch.Size, k_shape: torch.Size, plan: tuple[int, int, int]) -> None:
    batch, heads, block_q = plan
    if batch not in (1, shape[0]):
        raise ValueError(f"Bp={batch}: expected 1 or {shape[0]}")
    if heads not in (1, k_shape[1], shape[1]):
        raise ValueError(f"Hp={heads}: expected 1, {k_shape[1]} or {shape[1]}")
    if not 1 <= block_q <= MAX_BLOCK_Q:
        raise ValueError(f"block_q={block_q}: expected 1 to {MAX_BLOCK_Q}")


def _checked(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    if tuple(x.shape) != shape or x.device != like.device:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)} on {x.device}, expected {shape} on {like.device}"
        )
    if x.dtype is not dtype and (dtype is torch.bool or not x.is_floating_point()):
        raise ValueError(f"{name}: {x.dtype}, expected {dtype}")
    return x.detach().to(dtype).contiguous()


def _checked_stream(
    stream: tuple[Tensor | None, ...], plan: tuple[int, int, int], q: Tensor, q_len: int
) -> tuple[Tensor | None, ...]:
    batch, heads, block_q = plan
    rows = batch * heads * -(-q_len // block_q)
    kind, device = stream[1], q.device
    tiles = 0 if kind is None else kind.numel()
    sizes = (rows + 1, tiles, tiles, tiles, None, tiles)
    whole = True
    for (name, dtype), x, size in zip(_STREAM, stream, sizes, strict=True):
        if x is None and name == "tile_bias":
            continue
        if x is None or x.dtype is not dtype or x.dim() != 1 or x.device != device:
            found = "None" if x is None else f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name}: {found}, expected one dimension of {dtype} on {device}")
        if size is not None and x.numel() != size:
            raise ValueError(f"{name}: {x.numel()} entries, expected {size}")
        whole = whole and x.is_contiguous()
    return stream if whole else tuple(None if x is None else x.contiguous() for x in stream)


def _window(window: int | Tensor, heads: int, q: Tensor) -> Tensor:
    if isinstance(window, Tensor):
        if tuple(window.shape) != (heads,) or window.is_floating_point():
            raise ValueError(
                f"window: {window.dtype} {tuple(window.shape)}, expected integers ({heads},)"
            )
        return window.to(q.device, torch.int64).contiguous()
    if window < 1:
        raise ValueError(f"window={window}: expected at least 1, or None")
    return torch.full((heads,), window, dtype=torch.int64, device=q.device)
