"""Foreign ViT checkpoints in timm's names, and position embeddings at another grid.

Taken: timm and DeiT as they are; transformers' `ViTForImageClassification`, whose queries, keys and
values are apart; and files that keep the heads as an axis of their own, (C, heads, head_dim), as
the released weights of arXiv 2307.11988 do.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

_TRANSFORMERS = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_HEADS_APART = (
    (r"^embedding\.", "patch_embed.proj."),
    (r"^transformer\.pos_embedding\.pos_embedding$", "pos_embed"),
    (r"^transformer\.encoder_layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"^transformer\.norm\.", "norm."),
    (r"^classifier\.", "head."),
)
_QKV = {"query": 0, "q": 0, "key": 1, "k": 1, "value": 2, "v": 2}
_PART = re.compile(r"^(blocks\.\d+\.attn)\.(query|key|value|q|k|v)\.(weight|bias)$")


def convert_vit_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT checkpoint in timm's names; unknown names stay as they are.

    Args:
        state: as `read_state_dict` gives it; not changed.

    Raises:
        ValueError: a block that lacks its queries, keys or values.
    """
    if any(name.startswith("transformer.encoder_layers.") for name in state):
        state = {_renamed(name, _HEADS_APART): _flat(name, value) for name, value in state.items()}
    elif any("attention" in name for name in state):
        state = {_renamed(name, _TRANSFORMERS): value for name, value in state.items()}
    return _fuse_qkv(state)


def resize_position_embedding(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic (antialiased) positions for another grid of patches; the class token's is kept.

    Args:
        positions: (1, 1 + side * side, C), the class token first, patches row by row.
        grid: (height, width) in patches.

    Returns:
        (1, 1 + height * width, C), the argument itself if the grid is its own.

    Raises:
        ValueError: positions of no square grid.
    """
    patches = positions.shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"pos_embed holds {patches} patches, which is no square grid")
    if grid == (side, side):
        return positions
    maps = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized = maps.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], resized], dim=1)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _flat(name: str, value: Tensor) -> Tensor:
    """A layer whose heads are an axis, as a linear layer: (in, heads, dim) -> (heads * dim, in)."""
    if ".attn." not in name:
        return value
    if name.endswith(".out.weight"):  # (heads, dim, out)
        return value.flatten(0, 1).t().contiguous()
    if name.endswith(".weight"):
        return value.flatten(1).t().contiguous()
    return value.flatten()


def _fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    fused = {name: value for name, value in state.items() if not _PART.match(name)}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        if match := _PART.match(name):
            whole = f"{match[1]}.qkv.{match[3]}"
            parts.setdefault(whole, {})[_QKV[match[2]]] = value
    for name, found in parts.items():
        if len(found) < 3:
            raise ValueError(f"{name} needs queries, keys and values, the file has {len(found)}")
        fused[name] = torch.cat([found[part] for part in range(3)])
    return fused
