"""A causal language model of Combiner blocks.

Paper: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021,
arXiv 2107.05768. Its language model: 12 blocks of width 768, 12 heads, 2048 tokens, seg_len 128,
AdamW with a cosine from 3e-4 after 10,000 steps of warm-up, batches of 128, no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.attention.combiner_base import Variant
from aerogel.attention.combiner_cache import CombinerCache
from aerogel.attention.combiner_layer import CombinerAttention
from aerogel.models.decoder_block import DecoderBlock


class CombinerLM(nn.Module):
    """Tokens to logits of the next token; learned positions.

    Args:
        vocab: tokens there are.
        dim: width.
        depth: blocks.
        max_seq_len: longest sequence, cached tokens included.
        num_heads: query heads of every block.
        dropout: of both branches of a block.
        hidden: width of the perceptrons, default four times `dim`.
        activation: of the perceptrons, "gelu" or "relu".
        norm_eps: of the normalisations.
        head_bias: whether the last projection has a bias.
        options: further options of `CombinerAttention` (``variant``, ``seg_len``, ...).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        num_heads: int = 8,
        dropout: float = 0.0,
        hidden: int | None = None,
        activation: Literal["gelu", "relu"] = "gelu",
        norm_eps: float = 1e-5,
        head_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(max_seq_len, dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim,
                CombinerAttention(dim, num_heads, **options),
                dropout,
                hidden,
                activation,
                norm_eps,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab, bias=head_bias)

    def forward(
        self,
        ids: Tensor,
        key_padding: Tensor | None = None,
        cache: list[CombinerCache] | None = None,
    ) -> Tensor:
        """Logits (batch, n, vocab) of ids (batch, n).

        Raises:
            ValueError: ids and cache together are longer than `max_seq_len`.
        """
        start = cache[0].tokens if cache else 0
        stop = start + ids.shape[1]
        if stop > self.max_seq_len:
            raise ValueError(f"ids: {stop} tokens, expected at most {self.max_seq_len}")
        x = self.embed(ids) + self.place(torch.arange(start, stop, device=ids.device))
        for number, block in enumerate(self.blocks):
            own = None if cache is None else cache[number]
            x = block(x, key_padding=key_padding, cache=own)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_cache(self) -> list[CombinerCache]:
        """An empty cache, one for each block."""
        return [CombinerCache() for _ in self.blocks]

    @classmethod
    def from_published(
        cls, params: Mapping[str, Any], max_seq_len: int, *, variant: Variant, seg_len: int = 128
    ) -> CombinerLM:
        """The authors' JAX language model from its parameters.

        Args:
            params: what its ``init`` returns, or the tree below "params": nested mappings of
                arrays, of the layers named ``transformer_layer_0``, ...
            max_seq_len: its ``max_len``.
            variant: "fixed", "logsparse" ("logn" there), "axial" or "mixture".
            seg_len: its ``max_seg_len``.

        Raises:
            ValueError: the parameters are of something else.
        """
        tree = dict(_flat(params.get("params", params)))
        layers = {name.split("/")[1] for name in tree if "/transformer_layer_" in name}
        query = tree.get("autoreg_model/transformer_layer_0/LayerNorm_0/scale")
        heads = next((t.shape[1] for n, t in tree.items() if n.endswith("query/kernel")), 0)
        if query is None or not heads or "Embed_0/embedding" not in tree:
            raise ValueError(f"params: {sorted(tree)[:3]}, expected those of the authors' model")
        vocab, dim = tree["Embed_0/embedding"].shape
        hidden = tree["autoreg_model/transformer_layer_0/MlpBlock_0/Dense_0/kernel"].shape[1]
        made = cls(
            vocab, dim, len(layers), max_seq_len, heads, hidden=hidden, activation="relu",
            norm_eps=_FLAX_EPS, head_bias=True, variant=variant, seg_len=seg_len,
        )  # fmt: skip
        learned = tree.pop("autoreg_model/AddPositionEmbs_0/pos_embedding", None)
        places = _sines(max_seq_len, dim) if learned is None else learned[0]
        weights = {_renamed(name): _laid_out(name, tensor) for name, tensor in tree.items()}
        made.load_state_dict(weights | {"place.weight": places})
        return made


_FLAX_EPS = 1e-6  # flax's default for its LayerNorm
_NAMES = {
    "Embed_0/embedding": "embed.weight",
    "autoreg_model/LayerNorm_0/scale": "norm.weight",
    "autoreg_model/LayerNorm_0/bias": "norm.bias",
    "autoreg_model/Dense_0/kernel": "head.weight",
    "autoreg_model/Dense_0/bias": "head.bias",
}
_IN_BLOCKS = {
    "LayerNorm_0/scale": "before.weight",
    "LayerNorm_0/bias": "before.bias",
    "LayerNorm_1/scale": "between.weight",
    "LayerNorm_1/bias": "between.bias",
    "MlpBlock_0/Dense_0/kernel": "mlp.0.weight",
    "MlpBlock_0/Dense_0/bias": "mlp.0.bias",
    "MlpBlock_0/Dense_1/kernel": "mlp.2.weight",
    "MlpBlock_0/Dense_1/bias": "mlp.2.bias",
}
_IN_ATTENTION = {
    "query/kernel": "query.weight",
    "key/kernel": "key.weight",
    "value/kernel": "value.weight",
    "DenseGeneral_0/kernel": "out.weight",
}
_IN_AXIAL = {
    "DenseGeneral_0/kernel": "selector.row_out.weight",
    "LayerNorm_0/scale": "selector.row_norm.weight",
    "LayerNorm_0/bias": "selector.row_norm.bias",
    "DenseGeneral_1/kernel": "selector.row_key.weight",
    "DenseGeneral_2/kernel": "out.weight",
}


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Leaves of nested mappings as ("a/b/c", tensor)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", torch.as_tensor(value)


def _renamed(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, layer, inside = name.split("/", 2) if name.count("/") >= 2 else ("", "", name)
    block = f"blocks.{layer.removeprefix('transformer_layer_')}"
    if inside in _IN_BLOCKS:
        return f"{block}.{_IN_BLOCKS[inside]}"
    kind, _, inner = inside.partition("/")
    names = _IN_ATTENTION | _IN_AXIAL if kind.startswith("_SelfAttAxial") else _IN_ATTENTION
    if inner not in names:
        raise ValueError(f"params: {name!r} is of no part of the authors' model")
    return f"{block}.attention.{names[inner]}"


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    """(in, out) kernels to (out, in); heads of either side side by side."""
    if not name.endswith("kernel"):
        return tensor
    if tensor.dim() == 3:
        entering = name.split("/")[-2] in ("query", "key", "value", "DenseGeneral_1")
        tensor = tensor.flatten(1) if entering else tensor.flatten(0, 1)
    return tensor.T.contiguous()


def _sines(length: int, dim: int) -> Tensor:
    """(length, dim) fixed positions of the authors' code: sines, then cosines."""
    half = dim // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000.0) / (half - 1)))
    angle = torch.arange(length)[:, None] * rates
    table = torch.zeros(length, dim)
    table[:, :half], table[:, half : 2 * half] = angle.sin(), angle.cos()
    return table
