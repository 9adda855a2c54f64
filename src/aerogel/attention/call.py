"""What one call of `attend` asks for, and whether it may."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.arguments import check_count, check_number
from aerogel.attention.plan import Plan
from aerogel.attention.shape import AttentionShape

LARGEST_HEAD = 256
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Call:
    """The checked arguments of one call, the same for every backend."""

    shape: AttentionShape
    plan: Plan
    scale: float
    window: int | None = None
    key_padding: Tensor | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0

    def mask(self) -> Tensor:
        """(B or 1, Hp, q_len, k_len) bool: plan, causal rule, window and padding."""
        mask = self.plan.to_dense_mask(self.shape)
        device = mask.device if self.key_padding is None else self.key_padding.device
        mask = mask.to(device)
        if self.window is not None:
            j = torch.arange(self.shape.k_len, device=device)
            mask = mask & (self.shape.positions(device)[:, None] - j < self.window)
        if self.key_padding is not None:
            mask = mask & self.key_padding[:, None, None]
        return mask


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless the three fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected 4 dimensions")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, expected {q.dtype} on {q.device} as q"
            )
    if q.dtype not in _TYPES:
        raise ValueError(f"q: {q.dtype}, expected a floating type")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected "
            "(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads, expected a multiple of k's {k.shape[1]}")
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        raise ValueError(
            f"head size {max(q.shape[3], v.shape[3])}: expected at most {LARGEST_HEAD}"
        )


def check_call(call: Call, sink_logit: Tensor | None) -> None:
    """Raises ValueError unless the options fit the shape."""
    shape = call.shape
    if shape.causal and shape.offset is None and shape.q_len > shape.k_len:
        raise ValueError(
            f"causal attention of {shape.q_len} queries on {shape.k_len} keys: expected no more "
            "queries than keys, or q_offset"
        )
    padding = call.key_padding
    if padding is not None and (
        padding.dtype != torch.bool or padding.shape != (shape.batch, shape.k_len)
    ):
        raise ValueError(
            f"key_padding: {padding.dtype} {tuple(padding.shape)}, expected bool "
            f"{(shape.batch, shape.k_len)}, True at real keys"
        )
    if call.window is not None:
        check_count("window", call.window)
    if call.softcap is not None:
        check_number("softcap", call.softcap, "(0, inf)")
    check_number("scale", call.scale)
    check_number("dropout_p", call.dropout_p, "[0, 1)")
    if call.dropout_p and shape.causal and shape.q_len == 1 and shape.k_len > 1:
        raise ValueError(f"dropout_p={call.dropout_p}: expected 0 in decoding")
    if sink_logit is not None and sink_logit.shape != (shape.q_heads,):
        raise ValueError(
            f"sink_logit: shape {tuple(sink_logit.shape)}, expected {(shape.q_heads,)}"
        )
