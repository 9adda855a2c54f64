"""The plain vision transformer: patches as tokens, pre-norm blocks, a class token.

State-dict names are timm's (and DeiT's); weights of transformers' `ViTForImageClassification` load
too (`vit_weights`).

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aerogel.models.layers import Activation, DropPath, make_activation
from aerogel.models.registry import register_model
from aerogel.models.vision import VisionModel, make_head
from aerogel.models.vit_weights import convert_vit_state, resize_position_embedding

NORM_EPS = 1e-6
INIT_STD = 0.02
POOLS = ("token", "avg", "")


class DotProductAttention(nn.Module):
    """softmax(q k^T * scale) v, as a module: what penalties watch and quantisers replace.

    Args:
        scale: of the scores.
        dropout: of the probabilities, in training.
    """

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, heads, N, head_dim) -> the same shape."""
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=self.scale)

    def extra_repr(self) -> str:
        """Scale and dropout."""
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"embed_dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.core = DotProductAttention(head_dim**-0.5 if qk_scale is None else qk_scale, attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.core(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(self.proj(mixed))


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, dim: int, hidden: int, act_layer: Activation, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = make_activation(act_layer)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., C)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """A factor per channel on a residual branch."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self,
        attn: Attention,
        mlp: Mlp,
        dim: int,
        drop_path: float,
        init_values: float | None,
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=NORM_EPS), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=NORM_EPS), mlp
        scaled = init_values is not None
        self.ls1 = LayerScale(dim, float(init_values or 0.0)) if scaled else nn.Identity()
        self.ls2 = LayerScale(dim, float(init_values or 0.0)) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, embed_dim, H / patch, W / patch)."""
        return self.proj(x)


class VisionTransformer(VisionModel):
    """A plain ViT with timm's names.

    Args:
        img_size: height and width of the images.
        patch_size: of the square patches; divides `img_size`.
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.
        global_pool: "token" (class token), "avg" (mean of the patches) or "" (with no classes).
        embed_dim: channels C.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        mlp_ratio: hidden channels of an MLP, as a multiple of C.
        qkv_bias: whether queries, keys and values have biases.
        qk_scale: of the attention scores; None is 1 / sqrt(head_dim).
        drop_rate: dropout before the classifier.
        pos_drop_rate: after the position embedding.
        attn_drop_rate: of attention probabilities.
        proj_drop_rate: after the output projection and inside the MLP.
        drop_path_rate: stochastic depth, from 0 at the first block linearly to this at the last.
        init_values: initial LayerScale; None has none.
        act_layer: activation of the MLPs; exact GELU by default.
        dynamic_img_size: take other image sizes too, by resizing the position embedding.

    Raises:
        ValueError: sizes that do not divide each other, a rate outside [0, 1), an unknown pooling
            or activation.
    """

    classifier_name = "head"

    def __init__(
        self,
        img_size: int = 224,
        *,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        act_layer: Activation = "gelu",
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(img_size, patch_size, depth, num_classes)
        self.img_size, self.patch_size, self.dynamic_img_size = (
            img_size,
            patch_size,
            dynamic_img_size,
        )
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.global_pool = _check_pool(global_pool, num_classes)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(
            *(
                Block(
                    Attention(
                        embed_dim, num_heads, qkv_bias, qk_scale, attn_drop_rate, proj_drop_rate
                    ),
                    Mlp(embed_dim, int(embed_dim * mlp_ratio), act_layer, proj_drop_rate),
                    embed_dim,
                    drop_path_rate * number / max(1, depth - 1),
                    init_values,
                )
                for number in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = make_head(embed_dim, num_classes)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{number}"}
            for number in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for linear weights and positions, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not self.pos_embed.is_meta:
            nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
            nn.init.normal_(self.cls_token, std=1e-6)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> normalised tokens (B, 1 + patches, C), the class token first."""
        x, _ = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> pooled features (B, C) if `pre_logits`, else logits (B, num_classes)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
        stop_early: bool = True,
    ) -> Any:
        """Tokens behind chosen blocks, and the final ones.

        Args:
            x: (B, C, H, W).
            indices: the last n blocks, or a list of block numbers; None is all.
            norm: apply the last norm to each.
            output_fmt: "NCHW" (maps) or "NLC" (tokens); both without the class token.
            return_prefix_tokens: give (features, class tokens (B, 1, C)) instead of features.
            intermediates_only: return the list alone.
            stop_early: with `intermediates_only`, do not compute past the last chosen block.

        Raises:
            ValueError: unknown format or a block that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = self._stage_indices(indices)
        x, (height, width) = self._embed(x)
        found: list[Any] = []
        for number, block in enumerate(self.blocks):
            x = self._run(block, x)
            if number in wanted:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, 1:]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, (height, width))
                found.append((patches, tokens[:, :1]) if return_prefix_tokens else patches)
            if intermediates_only and stop_early and len(found) == len(wanted):
                break
        return found if intermediates_only else (self.norm(x), found)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `num_classes=0` leaves the pooled features."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool, num_classes)
        super().reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        """The class token and the position embedding."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": re.compile(r"^blocks\.(\d+)"),
        }

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "linear") of the linear layers of all blocks."""
        for name, module in self.named_modules():
            if name.startswith("blocks.") and isinstance(module, nn.Linear):
                yield name, "linear"

    def attention_modules(self) -> list[nn.Module]:
        """The attention product of each block, in order."""
        return [module for module in self.modules() if isinstance(module, DotProductAttention)]

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors in this model's names, positions at this model's grid."""
        state = convert_vit_state(state)
        if "pos_embed" in state:
            side = self.img_size // self.patch_size
            state["pos_embed"] = resize_position_embedding(state["pos_embed"], (side, side))
        return state

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        self._check_input(x)
        size, patch = (int(x.shape[2]), int(x.shape[3])), self.patch_size
        if size != (self.img_size, self.img_size) and not self.dynamic_img_size:
            raise ValueError(
                f"images are {size[0]}x{size[1]}, the model is for {self.img_size}x{self.img_size};"
                " other sizes need dynamic_img_size=True"
            )
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"images of {size[0]}x{size[1]} do not divide into {patch}x{patch}")
        grid = (size[0] // patch, size[1] // patch)
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.pos_drop(tokens + resize_position_embedding(self.pos_embed, grid)), grid


def _check_sizes(img_size: int, patch_size: int, depth: int, num_classes: int) -> None:
    if patch_size < 1 or img_size < patch_size or img_size % patch_size:
        raise ValueError(f"img_size={img_size} must be a multiple of patch_size={patch_size}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")


def _check_pool(global_pool: str, num_classes: int) -> str:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
    if global_pool == "" and num_classes:
        raise ValueError("global_pool='' needs num_classes=0: a classifier wants pooled features")
    return global_pool


_IMAGENET = {
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "paper": "2010.11929",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@register_model(params=5_717_416, gmacs=1.2537, **_IMAGENET)
def vit_tiny_patch16_224(img_size: int = 224, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16: 5.7 M parameters, 1.25 G MACs at 224."""
    return VisionTransformer(img_size, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model(params=22_050_664, gmacs=4.5989, **_IMAGENET)
def vit_small_patch16_224(img_size: int = 224, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16: 22 M parameters, 4.6 G MACs at 224."""
    return VisionTransformer(img_size, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model(params=86_567_656, gmacs=17.5638, **_IMAGENET)
def vit_base_patch16_224(img_size: int = 224, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16: 86.6 M parameters, 17.6 G MACs at 224."""
    return VisionTransformer(img_size, **kwargs)


@register_model(
    input_size=(1, 28, 28), num_classes=10, params=306_826, gmacs=0.01674, paper="2010.11929"
)
def vit_laptop(img_size: int = 28, **kwargs: Any) -> VisionTransformer:
    """A small ViT for Fashion-MNIST: 0.3 M parameters, 16.7 M MACs."""
    sizes = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    return VisionTransformer(img_size, **{"in_chans": 1, "num_classes": 10, **sizes, **kwargs})


@register_model(
    input_size=(1, 8, 8), num_classes=10, params=58_570, gmacs=0.001027, paper="2010.11929"
)
def vit_digits(img_size: int = 8, **kwargs: Any) -> VisionTransformer:
    """A tiny ViT for scikit-learn's digits: 17 tokens of 48 channels, 3 blocks."""
    sizes = {"patch_size": 2, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}
    return VisionTransformer(img_size, **{"in_chans": 1, "num_classes": 10, **sizes, **kwargs})
