"""A causal language model of Routing Transformer blocks.

Paper: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", 2020,
arXiv 2003.05997. Its PG-19 model: depth 22, width 1032, 8 heads of which 2 route, and only in the
last layer, 16 clusters of 512 tokens, local blocks of 256, length 8192.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aerogel.attention.routing_layer import RoutingAttention
from aerogel.models.decoder_block import DecoderBlock

if TYPE_CHECKING:
    from aerogel.attention.cache import SelectorCacheLayer


class RoutingTransformerLM(nn.Module):
    """Tokens to logits of the next token.

    Args:
        vocab: tokens there are.
        dim: width.
        depth: blocks.
        max_seq_len: longest sequence, cached tokens included.
        num_heads: heads of every block.
        num_local_heads: of them, heads with a local window.
        num_clusters: clusters of a routing head.
        window: tokens per cluster; default ``max_seq_len / num_clusters``.
        skip_first: so many first blocks have local heads only.
        dropout: of both branches of a block.
        head_bias: whether the last projection has a bias.
        options: further options of `RoutingAttention`.

    Raises:
        ValueError: `skip_first` is out of range, or `RoutingAttention` does not take the options.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        num_heads: int = 8,
        num_local_heads: int = 4,
        num_clusters: int = 16,
        window: int | None = None,
        skip_first: int = 0,
        dropout: float = 0.0,
        head_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= skip_first <= depth:
            raise ValueError(f"skip_first={skip_first}: expected 0 to depth={depth}")
        self.max_seq_len = max_seq_len
        window = max(1, max_seq_len // num_clusters) if window is None else window
        options.setdefault("fit", True)
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList()
        for number in range(depth):
            local = num_heads if number < skip_first else num_local_heads
            attention = RoutingAttention(dim, num_heads, local, num_clusters, window, **options)
            self.blocks.append(DecoderBlock(dim, attention, dropout))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=head_bias)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)

    def forward(
        self,
        ids: Tensor,
        key_padding: Tensor | None = None,
        cache: list[SelectorCacheLayer] | None = None,
    ) -> Tensor:
        """Logits (batch, n, vocab) of ids (batch, n).

        Raises:
            ValueError: ids and cache together are longer than `max_seq_len`.
        """
        length = ids.shape[1] + (0 if not cache else int(cache[0].get_seq_length()))
        if length > self.max_seq_len:
            raise ValueError(f"ids: {length} tokens, expected at most {self.max_seq_len}")
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            own = None if cache is None else cache[number]
            x = block(x, key_padding=key_padding, cache=own)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_cache(self) -> list[SelectorCacheLayer]:
        """An empty cache, one layer for each block."""
        from aerogel.attention.cache import SelectorCacheLayer  # needs transformers

        return [SelectorCacheLayer() for _ in self.blocks]

    def auxiliary_loss(self) -> Tensor:
        """The commitment losses of the last training pass; add it to the task's loss."""
        total = self.embed.weight.new_zeros(())
        for module in self.modules():
            if isinstance(module, RoutingAttention) and module.auxiliary is not None:
                total = total + module.auxiliary
        return total

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        causal: bool = True,
        local_window: int | None = None,
    ) -> RoutingTransformerLM:
        """A model of the PyTorch code by lucidrains (`routing-transformer` 1.6) from its weights.

        Sizes are read off the weights. The model's block sizes are those of its last layer; layers
        before may have local heads only.

        Args:
            state_dict: of its `RoutingTransformerLM`, with learned positions, reversible layers,
                gated or shared or product-key layers and narrower embeddings all off.
            causal: as it was made.
            local_window: its ``local_attn_window_size``, default its ``window_size``.

        Raises:
            ValueError: weights of options that are not supported, or that do not fit together.
        """
        return _from_published(cls, state_dict, causal, local_window)


_LAYER = re.compile(r"routing_transformer\.layers\.layers\.(\d+)\.([01])\.(.+)")
_RENAMED = {
    "0.norm.weight": "before.weight",
    "0.norm.bias": "before.bias",
    "1.norm.weight": "between.weight",
    "1.norm.bias": "between.bias",
    "1.fn.fn.w1.weight": "mlp.0.weight",
    "1.fn.fn.w1.bias": "mlp.0.bias",
    "1.fn.fn.w2.weight": "mlp.2.weight",
    "1.fn.fn.w2.bias": "mlp.2.bias",
}
_ATTENTION = (
    *("to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"),
    *("local_to_qkv.weight", "local_to_qkv.bias"),
    *("global_attn.mem_key", "global_attn.mem_value"),
    *("global_attn.kmeans.means", "global_attn.kmeans.initted"),
)


def _from_published(
    kind: type[RoutingTransformerLM],
    state_dict: Mapping[str, Tensor],
    causal: bool,
    local_window: int | None,
) -> RoutingTransformerLM:
    outer, layers = _sorted_out(state_dict)
    vocab, dim = outer["token_emb.weight"].shape
    length, head_dim = outer["sinu_pos_emb.emb"].shape
    heads = layers[0]["attention"]["to_out.weight"].shape[1] // head_dim
    if heads * head_dim != dim:
        raise ValueError(f"state_dict: {heads} heads of {head_dim}, expected together {dim}")
    routed = [len(layer["attention"].get("global_attn.kmeans.means", ())) for layer in layers]
    skipped = next((n for n, count in enumerate(routed) if count), len(routed))
    if len(set(routed[skipped:])) > 1:
        raise ValueError(f"state_dict: {routed} routing heads, expected as many from some layer on")
    last = layers[-1]["attention"]
    clusters = last["global_attn.kmeans.means"].shape[1] if routed[-1] else 1
    made = kind(
        vocab, dim, len(layers), length, heads, heads - routed[-1], clusters, length // clusters,
        skipped, causal=causal, share_qk=not routed[-1] or "to_k.weight" not in last,
        local_window=length // clusters if local_window is None else local_window, norm="l2",
        num_mem_kv=last["global_attn.mem_key"].shape[2] if routed[-1] else 0, bias=True,
        rel_pos="rope_values", mask_self="to_k.weight" not in last, head_bias="out.bias" in outer,
    )  # fmt: skip
    weights = made.state_dict()
    weights["embed.weight"] = outer["token_emb.weight"]
    weights["head.weight"] = outer["out.weight" if "out.weight" in outer else "out.tensor"]
    for name in ("norm.weight", "norm.bias"):
        weights[name] = outer[name]
    if "out.bias" in outer:
        weights["head.bias"] = outer["out.bias"]
    for number, layer in enumerate(layers):
        found = {_RENAMED[name]: weight for name, weight in layer["block"].items()}
        found |= {
            f"attention.{name}": weight
            for name, weight in _attention_weights(layer["attention"], dim, head_dim).items()
        }
        weights |= {f"blocks.{number}.{name}": weight for name, weight in found.items()}
    made.load_state_dict(weights)
    return made


def _sorted_out(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[dict[str, dict[str, Tensor]]]]:
    """Weights of no layer, and of every layer: of its attention, and of the rest."""
    outer: dict[str, Tensor] = {}
    layers: dict[int, dict[str, dict[str, Tensor]]] = {}
    known = (
        *("token_emb.weight", "sinu_pos_emb.emb", "norm.weight", "norm.bias"),
        *("out.weight", "out.bias", "out.tensor"),
    )
    for name, weight in state_dict.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            if name not in known:
                raise ValueError(f"state_dict: {name!r} is of an option that is not supported")
            outer[name] = weight
            continue
        layer = layers.setdefault(int(match[1]), {"attention": {}, "block": {}})
        part = match[3].removeprefix("fn.")
        if match[2] == "0" and part in _ATTENTION:
            layer["attention"][part] = weight
        elif f"{match[2]}.{match[3]}" in _RENAMED:
            layer["block"][f"{match[2]}.{match[3]}"] = weight
        elif not part.startswith("local_attn."):  # rotary rates, which are the same here
            raise ValueError(f"state_dict: {name!r} is of an option that is not supported")
    missing = {"token_emb.weight", "sinu_pos_emb.emb", "norm.weight", "norm.bias"} - set(outer)
    if missing or sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(
            f"state_dict: layers {sorted(layers)}, expected all from 0 on and {sorted(missing)}"
        )
    return outer, [layers[number] for number in range(len(layers))]


def _attention_weights(
    published: Mapping[str, Tensor], dim: int, head_dim: int
) -> dict[str, Tensor]:
    """One layer's weights under our names.

    The channels that turn together stand side by side there and half a head apart here; products
    of queries, keys and centroids do not mind, and the last projection undoes it for values.
    """
    order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])

    def turned(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)

    empty = published["to_out.weight"].new_zeros(0)
    local = published.get("local_to_qkv.weight", empty.view(0, dim)).chunk(3)
    biases = published.get("local_to_qkv.bias", empty).chunk(3)
    local = local if len(local) == 3 else (empty.view(0, dim),) * 3
    biases = biases if len(biases) == 3 else (empty,) * 3
    found: dict[str, Tensor] = {}
    for part, name in enumerate(("query", "key", "value")):
        routed = published.get(f"to_{name[0]}.weight", empty.view(0, dim))
        whole = torch.cat([local[part], turned(routed) if len(routed) else routed])
        if len(whole):
            bias = torch.cat([biases[part], whole.new_zeros(len(routed))])
            found |= {f"{name}.weight": whole, f"{name}.bias": bias}
    heads = published["to_out.weight"].unflatten(1, (-1, head_dim))
    first = len(local[0]) // head_dim
    found["out.weight"] = torch.cat([heads[:, :first], heads[:, first:, order]], 1).flatten(1)
    found["out.bias"] = heads.new_zeros(dim)
    if "global_attn.kmeans.means" in published:
        found["selector.kmeans.mu"] = published["global_attn.kmeans.means"][..., order]
        found["selector.kmeans.initialised"] = published["global_attn.kmeans.initted"]
        memory = [published[f"global_attn.mem_{kind}"] for kind in ("key", "value")]
        if memory[0].shape[2]:
            found["memory"] = torch.stack([m.flatten(1, 2)[..., order] for m in memory])
    return found
