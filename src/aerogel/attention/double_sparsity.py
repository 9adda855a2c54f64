"""Double Sparsity: decoding reads a few channels of all keys, then all channels of a few keys.

Paper: Yang, Sheng, Gonzalez, Stoica and Zheng, "Post-Training Sparse Attention with Double
Sparsity", 2024, arXiv 2408.07092.

The idea: which channels of a head's keys carry its logits hardly depends on the input. They are
found once, offline; a small label cache keeps those channels of every key side by side. A new
query's same channels give an approximate score for every key from the labels alone, and only the
best keys' full rows are read, for an exact softmax among them. The full cache may lie in slow
memory: the keys that the next layer will want are foretold from this layer's input.

When to use it: long contexts, where decoding waits for the KV cache; no training. Costs and buys:
one pass over some text, labels of a quarter to a sixteenth of the keys; about L / k times fewer
bytes a token. Prompts stay dense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aerogel.attention.channel_order import ChannelOrder
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.labels import (
    LABEL_BITS,
    PackedLabels,
    gather_channels,
    label_scores,
    pack_labels,
    unpack_labels,
)
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.shape import AttentionShape
from aerogel.attention.topk import stable_topk

_SCORED = 1 << 24  # approximate scores of a prompt at a time: 64 MB


@add_selector
class DoubleSparsitySelector(Selector):
    """Keys by their labels.

    Args:
        channels: a `ChannelOrder`, its JSON, or the path of a channel file.
        heavy_tokens: keys that every query head reads in a decoding step.
        group_factor: a label has ``head_dim / group_factor`` channels.
        run: keys are taken in runs of so many neighbours, by the best of each run; 1 is the
            published method, 16 reads memory faster.
        label_bits: 16 keeps labels in the keys' type; 8, 4 and 2 quantise them.
        quantize_query: queries' labels are quantised too, as in the authors' evaluation.
        dense_layers: layers that read everything.
        share_group: one label for the query heads of a group: True makes it by the mean rank;
            "auto" does as the channels say.
        always_keep_last: a query's own key is always among those that it reads.
        sparse_prefill: prompts select too, row by row; for studies of accuracy, not for speed.
        offload: the KV cache lies in `storage`; needs `AerogelCache`.
        storage: device of the offloaded keys and values.

    Raises:
        ValueError: an option is out of range.

    Reference:
        Yang et al., arXiv 2408.07092.
    """

    slug = "double-sparsity"
    needs = frozenset({"cache", "calibration"})

    def __init__(
        self,
        channels: ChannelOrder | str | Path | dict[str, Any],
        heavy_tokens: int = 128,
        group_factor: int = 4,
        run: int = 1,
        label_bits: int = 16,
        quantize_query: bool = False,
        dense_layers: tuple[int, ...] | list[int] = (0, 1),
        share_group: bool | Literal["auto"] = "auto",
        always_keep_last: bool = True,
        sparse_prefill: bool = False,
        offload: bool = False,
        storage: str = "cpu",
    ) -> None:
        super().__init__()
        for name, value in {
            "heavy_tokens": heavy_tokens,
            "group_factor": group_factor,
            "run": run,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if label_bits not in LABEL_BITS:
            raise ValueError(f"label_bits={label_bits}: expected one of {LABEL_BITS}")
        if run > heavy_tokens:
            raise ValueError(f"run={run}: expected at most heavy_tokens={heavy_tokens}")
        if isinstance(channels, (str, Path)):
            channels = ChannelOrder.load(channels)
        elif not isinstance(channels, ChannelOrder):
            channels = ChannelOrder.from_json(channels)
        for layer, order in channels.layers.items():
            if order.shape[1] % group_factor:
                raise ValueError(
                    f"group_factor={group_factor}: expected a divisor of {order.shape[1]}, the "
                    f"head width of layer {layer}"
                )
        if offload:
            self.needs = self.needs | {"next_layer"}  # type: ignore[misc]
        self.channels = channels
        self.heavy_tokens, self.group_factor, self.run = heavy_tokens, group_factor, run
        self.label_bits, self.quantize_query = label_bits, quantize_query
        self.dense_layers = tuple(dense_layers)
        self.share_group: bool | Literal["auto"] = share_group
        self.always_keep_last, self.sparse_prefill = always_keep_last, sparse_prefill
        self.offload, self.storage = offload, storage
        self._shared: ChannelOrder | None = None

    def options(self) -> dict[str, Any]:
        return {
            "channels": self.channels.to_json(),
            "heavy_tokens": self.heavy_tokens,
            "group_factor": self.group_factor,
            "run": self.run,
            "label_bits": self.label_bits,
            "quantize_query": self.quantize_query,
            "dense_layers": list(self.dense_layers),
            "share_group": self.share_group,
            "always_keep_last": self.always_keep_last,
            "sparse_prefill": self.sparse_prefill,
            "offload": self.offload,
            "storage": self.storage,
        }

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        from aerogel.attention.label_cache import LabelCacheLayer, OffloadedCacheLayer

        if self.offload:
            return OffloadedCacheLayer(self, layer_idx)
        return LabelCacheLayer(self)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer reads everything; offloading leaves the last one dense too."""
        return layer in self.dense_layers or (self.offload and layer == max(self.channels.layers))

    def label_channels(self, layer: int, q_heads: int, kv_heads: int, head_dim: int) -> Tensor:
        """(q_heads or kv_heads, r) channels of a layer's labels."""
        order = self.channels
        if self.share_group is True and next(iter(order.layers.values())).shape[0] != kv_heads:
            self._shared = order.shared(kv_heads) if self._shared is None else self._shared
            order = self._shared
        whole = order.layer(layer, q_heads, kv_heads, head_dim)
        return whole[:, : head_dim // self.group_factor]

    def labels_of(self, k: Tensor, layer: int, q_heads: int) -> dict[str, Tensor]:
        """What a label cache keeps of keys (B, Hkv, L, D) after rotary embedding."""
        channels = self.label_channels(layer, q_heads, k.shape[1], k.shape[-1])
        label = gather_channels(k, channels.to(k.device))
        if self.label_bits == 16:
            return {"label": label}
        packed = pack_labels(label, self.label_bits)
        return {"label": packed.codes, "span": packed.span}

    def scores(self, q: Tensor, side: dict[str, Tensor], layer: int, kv_heads: int) -> Tensor:
        """Approximate logits (B, Hq, Lq, L) of queries (B, Hq, Lq, D) from labels alone."""
        heads, dim = q.shape[1], q.shape[-1]
        channels = self.label_channels(layer, heads, kv_heads, dim).to(q.device)
        if channels.shape[0] != heads:
            channels = channels.repeat_interleave(heads // channels.shape[0], 0)
        q = gather_channels(q, channels)
        if self.label_bits == 16:
            return label_scores(q, side["label"])
        if self.quantize_query:
            q = unpack_labels(pack_labels(q, self.label_bits), self.label_bits)
        return label_scores(q, PackedLabels(side["label"], side["span"]), self.label_bits)

    def on_append(self, ctx: AttentionContext) -> None:
        if self.is_dense(ctx.layer_idx) or not hasattr(ctx.cache_layer, "append_labels"):
            return
        ctx.cache_layer.append_labels(ctx.k, ctx.layer_idx, ctx.shape.q_heads)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if not self.sparse_prefill or self.is_dense(ctx.layer_idx):
            return DensePlan()
        return self._planned(ctx, self.labels_of(ctx.k, ctx.layer_idx, ctx.shape.q_heads))

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        if self.is_dense(ctx.layer_idx):
            return DensePlan()
        if ctx.cache_layer is None:
            return self._planned(ctx, self.labels_of(ctx.k, ctx.layer_idx, ctx.shape.q_heads))
        if not hasattr(ctx.cache_layer, "append_labels"):
            raise ValueError(
                f"past_key_values: a {type(ctx.cache_layer).__name__} keeps no labels; pass "
                "past_key_values=aerogel.attention.cache.AerogelCache(model)"
            )
        return self._planned(ctx, ctx.cache_layer.side)

    def _planned(self, ctx: AttentionContext, side: dict[str, Tensor]) -> KeyListPlan:
        shape = ctx.shape
        if shape.k_len <= self.heavy_tokens:
            everything = torch.ones(1, 1, shape.q_len, shape.k_len, dtype=torch.bool)
            return KeyListPlan.from_bitmask((everything & shape.causal_mask()).to(ctx.q.device))
        step = max(1, _SCORED // (shape.batch * shape.q_heads * shape.k_len))
        taken = []
        for begin in range(0, shape.q_len, step):
            q = ctx.q[:, :, begin : begin + step]
            allowed = self.allowed(shape, ctx.key_padding, begin, q.shape[2], ctx.q.device)
            if ctx.window is not None:
                row = torch.arange(begin, begin + q.shape[2], device=q.device) + shape.q_offset
                near = torch.arange(shape.k_len, device=q.device) > row[:, None] - ctx.window
                allowed = allowed & near
            scores = self.scores(q, side, ctx.layer_idx, shape.kv_heads)
            taken.append(self.best(scores, allowed, begin + shape.q_offset))
        return KeyListPlan.from_index(torch.cat(taken, 2))

    @staticmethod
    def allowed(
        shape: AttentionShape,
        key_padding: Tensor | None,
        begin: int,
        rows: int,
        device: torch.device,
    ) -> Tensor:
        """(B or 1, 1, rows, L) bool: real keys that do not lie behind the row."""
        keys = torch.arange(shape.k_len, device=device)
        row = torch.arange(begin, begin + rows, device=device) + shape.q_offset
        mask = (keys <= row[:, None])[None, None]
        if not shape.causal:
            mask = torch.ones_like(mask)
        return mask if key_padding is None else mask & key_padding[:, None, None]

    def best(self, scores: Tensor, allowed: Tensor, first_row: int) -> Tensor:
        """The keys that rows read, from their approximate scores.

        Args:
            scores: (B, Hq, rows, L), overwritten.
            allowed: (B or 1, 1, rows, L) bool.
            first_row: position of the first row.

        Returns:
            (B, Hq, rows, n) int64; -1 is no key.
        """
        rows, length = scores.shape[2:]
        if self.always_keep_last:
            row = torch.arange(rows, device=scores.device)
            own = (first_row + row).clamp(max=length - 1)
            scores[:, :, row, own] = torch.inf
        scores = scores.masked_fill_(~allowed, -torch.inf)
        if self.run == 1:
            taken = stable_topk(scores, min(self.heavy_tokens, length))
            return taken.masked_fill(scores.gather(-1, taken) == -torch.inf, -1)
        short = -length % self.run
        runs = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        united = runs.unflatten(-1, (-1, self.run)).amax(-1)
        chosen = stable_topk(united, min(self.heavy_tokens // self.run, united.shape[-1]))
        taken = chosen[..., None] * self.run + torch.arange(self.run, device=scores.device)
        taken = taken.flatten(-2)
        return taken.masked_fill(runs.gather(-1, taken) == -torch.inf, -1)
