"""SwinIR: attention within shifted windows, at the resolution of the small image.

State-dict names are BasicSR's, so weights published for it load (`attn_mask`, which it stores for
one size of image, is computed here and passed over).

Reference: Liang et al., "SwinIR: Image Restoration Using Swin Transformer", 2021, arXiv 2108.10257.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.models.layers import DropPath
from aerogel.models.upscaling import UpscalingModel, conv3x3, upsample_layers
from aerogel.models.vit import INIT_STD, Mlp

Upsampler = Literal["pixelshuffledirect", "pixelshuffle"]

# Width of the last layers with "pixelshuffle".
_TAIL_CHANNELS = 64
# Added to scores between tokens that only the shift brought into one window.
_APART = -100.0


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each offset of two tokens."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"embed_dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        offsets = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)
        self.register_buffer("relative_position_index", _relative_positions(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """Windows attend to themselves.

        Args:
            x: (B, windows, N, C), the N = window_size^2 tokens of every window.
            apart: (windows, N, N), added to the scores; None adds nothing.

        Returns:
            The shape of x.
        """
        batch, windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, windows, tokens, 3, self.num_heads, -1)
        # Windows and heads together: [B, windows * heads, N, head_dim]
        q, k, v = (part.flatten(1, 2) for part in qkv.permute(3, 0, 1, 4, 2, 5).unbind(0))
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = table.view(tokens, tokens, -1).permute(2, 0, 1)[None]  # [1, heads, N, N]
        bias = bias.expand(windows, -1, -1, -1) if apart is None else bias + apart[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, bias.flatten(0, 1)[None])
        mixed = mixed.unflatten(1, (windows, -1)).transpose(2, 3).reshape(x.shape)
        return self.proj(mixed)


class SwinBlock(nn.Module):
    """x + attention(norm(x)) in windows moved by ``shift``, then x + MLP(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size, self.shift = window_size, shift
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window_size, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio), "gelu", 0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """x: (B, H, W, C); apart: as `_tokens_apart` gives it, used if the windows are moved."""
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(_windows(y, self.window_size), apart if self.shift else None)
        y = _unwindowed(windows, self.window_size, x.shape)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BlockGroup(nn.Module):
    """Blocks, every second one with its windows moved by half."""

    def __init__(self, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """x: (B, H, W, C) -> the same shape."""
        for block in self.blocks:
            x = block(x, apart)
        return x


class ResidualGroup(nn.Module):
    """x + conv(blocks(x))."""

    def __init__(self, dim: int, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.residual_group = BlockGroup(blocks)
        self.conv = conv3x3(dim, dim)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """x: (B, H, W, C) -> the same shape."""
        y = self.conv(self.residual_group(x, apart).permute(0, 3, 1, 2))
        return x + y.permute(0, 2, 3, 1)


class PatchNorm(nn.Module):
    """The normalisation of tokens, under the name it has in published weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C) -> the same shape."""
        return self.norm(x)


class SwinIR(UpscalingModel):
    """A convolution, groups of window attention, upsampling.

    The defaults are SwinIR-lightweight. Published counts of its parameters (878k at scale 2, 897k
    at 4) leave out the tables of relative positions, 32.4k.

    Args:
        scale: of both sides: 3, or a power of two.
        embed_dim: channels of every map.
        depths: blocks of each group.
        num_heads: heads of each group's attention.
        window_size: side of a window; images of other sizes are padded by reflection.
        mlp_ratio: hidden width of the MLPs, in embed_dim.
        upsampler: ``"pixelshuffledirect"`` (one convolution) or ``"pixelshuffle"`` (as EDSR's).
        in_chans: channels of the images, both ways.
        img_range: what an image in 0..1 is multiplied by first.
        drop_path_rate: stochastic depth of the last block, rising from 0.

    Raises:
        ValueError: another scale or upsampler, heads that do not divide the width, or depths and
            heads of different lengths.
    """

    def __init__(
        self,
        scale: int = 2,
        embed_dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        upsampler: Upsampler = "pixelshuffledirect",
        *,
        in_chans: int = 3,
        img_range: float = 1.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__(scale, in_chans, img_range)
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths={tuple(depths)} and num_heads={tuple(num_heads)} must pair")
        if window_size < 2:
            raise ValueError(f"window_size must be at least 2, got {window_size}")
        if upsampler not in ("pixelshuffledirect", "pixelshuffle"):
            raise ValueError(
                f"upsampler must be 'pixelshuffledirect' or 'pixelshuffle', got {upsampler!r}"
            )
        self.window_size = window_size
        self.conv_first = conv3x3(in_chans, embed_dim)
        self.patch_embed = PatchNorm(embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.layers = nn.ModuleList(
            ResidualGroup(
                embed_dim,
                [
                    SwinBlock(
                        embed_dim, heads, window_size, i % 2 * window_size // 2, mlp_ratio, rate
                    )
                    for i, rate in zip(range(depth), rates, strict=False)
                ],
            )
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = conv3x3(embed_dim, embed_dim)
        self._add_tail(embed_dim, upsampler)
        self.apply(_init_linear)
        self.register_load_state_dict_pre_hook(_without_masks)

    def upscaled(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, scale * H, scale * W)."""
        height, width = x.shape[-2:]
        x = self.conv_first(_padded(x, self.window_size))
        x = self.conv_after_body(self._features(x)) + x
        x = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        return x[..., : height * self.scale, : width * self.scale]

    def _features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        apart = _tokens_apart(x.shape[1], x.shape[2], self.window_size).to(x)
        for layer in self.layers:
            x = layer(x, apart)
        return self.norm(x).permute(0, 3, 1, 2)

    def _add_tail(self, dim: int, upsampler: Upsampler) -> None:
        self.conv_before_upsample: nn.Module = nn.Identity()
        self.conv_last: nn.Module = nn.Identity()
        if upsampler == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(conv3x3(dim, _TAIL_CHANNELS), nn.LeakyReLU())
            self.upsample = upsample_layers(self.scale, _TAIL_CHANNELS)
            self.conv_last = conv3x3(_TAIL_CHANNELS, self.in_chans)
        else:
            direct = conv3x3(dim, self.scale**2 * self.in_chans)
            self.upsample = nn.Sequential(direct, nn.PixelShuffle(self.scale))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)


def _without_masks(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    for name in [name for name in state if name.endswith(".attn_mask")]:
        del state[name]


def _padded(x: Tensor, window: int) -> Tensor:
    down, right = -x.shape[-2] % window, -x.shape[-1] % window
    return F.pad(x, (0, right, 0, down), mode="reflect") if down or right else x


def _windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, window^2, C)."""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, dim)
    return x.transpose(2, 3).reshape(batch, -1, window**2, dim)


def _unwindowed(x: Tensor, window: int, shape: torch.Size) -> Tensor:
    """The inverse of `_windows`."""
    batch, height, width, dim = shape
    x = x.reshape(batch, height // window, width // window, window, window, dim)
    return x.transpose(2, 3).reshape(shape)


def _relative_positions(window: int) -> Tensor:
    """(N, N): the row of the bias table for each pair of tokens of a window."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    places = torch.stack((row.flatten(), column.flatten()))
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def _tokens_apart(height: int, width: int, window: int) -> Tensor:
    """(windows, N, N): -100 where a moved window holds tokens of opposite edges, else 0."""
    shift = window // 2

    def bands(size: int) -> Tensor:
        place = torch.arange(size)
        return (place >= size - window).long() + (place >= size - shift).long()

    regions = bands(height)[:, None] * 3 + bands(width)[None, :]
    ids = _windows(regions[None, :, :, None], window)[0, :, :, 0]
    return _APART * (ids[:, :, None] != ids[:, None, :]).float()
