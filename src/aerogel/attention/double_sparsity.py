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

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aerogel import kernels
from aerogel.arguments import check_count
from aerogel.attention.channel_order import ChannelOrder
from aerogel.attention.engine import attend
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.labels import LABEL_BITS, gather_channels, pack_labels, unpack_labels
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.shape import AttentionShape
from aerogel.kernels import KeyRule

_SCORED = 1 << 24  # approximate scores of a prompt at a time: 64 MB
# What a step by labels costs besides memory, in bytes that dense attention reads meanwhile, and how
# much slower it reads keys that lie apart. Measured at about 15 GB/s: on one thread and on two, a
# step breaks even between none and half of it.
_STEP_BYTES = 1 << 20
_SCATTERED = 2.5


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
        dense_when_short: decoding steps read everything where that is faster than choosing.

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
        dense_when_short: bool = True,
    ) -> None:
        super().__init__()
        check_count("heavy_tokens", heavy_tokens)
        check_count("group_factor", group_factor)
        check_count("run", run)
        for layer in dense_layers:
            check_count("each of dense_layers", layer, 0)
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
        if offload and heavy_tokens < 2:
            raise ValueError(
                f"heavy_tokens={heavy_tokens}: expected at least 2 with offload (one is the own)"
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
        self.dense_when_short = dense_when_short
        self._shared: ChannelOrder | None = None
        self._own: dict[tuple[Any, ...], Tensor] = {}  # what `label_channels` has found

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
            "dense_when_short": self.dense_when_short,
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
        # Asked twice in every step of decoding; options may be changed between calls.
        key = (layer, q_heads, kv_heads, head_dim, self.group_factor, self.share_group)
        found = self._own.get(key)
        if found is None:
            found = self._own[key] = self._find_channels(layer, q_heads, kv_heads, head_dim)
        return found

    def _find_channels(self, layer: int, q_heads: int, kv_heads: int, head_dim: int) -> Tensor:
        order = self.channels
        if self.share_group is True and next(iter(order.layers.values())).shape[0] != kv_heads:
            self._shared = order.shared(kv_heads) if self._shared is None else self._shared
            order = self._shared
        whole = order.layer(layer, q_heads, kv_heads, head_dim)
        return whole[:, : head_dim // self.group_factor].contiguous()

    def labels_of(self, k: Tensor, layer: int, q_heads: int) -> dict[str, Tensor]:
        """What a label cache keeps of keys (B, Hkv, L, D) after rotary embedding."""
        channels = self.label_channels(layer, q_heads, k.shape[1], k.shape[-1])
        label = gather_channels(k, channels if k.is_cpu else channels.to(k.device))
        if self.label_bits == 16:
            return {"label": label}
        packed = pack_labels(label, self.label_bits)
        return {"label": packed.codes, "span": packed.span}

    def query_labels(self, q: Tensor, layer: int, kv_heads: int) -> Tensor:
        """The labels' channels of queries (B, Hq, Lq, D): (B, Hq, Lq, r)."""
        heads, dim = q.shape[1], q.shape[-1]
        channels = self.label_channels(layer, heads, kv_heads, dim)
        if not q.is_cpu:
            channels = channels.to(q.device)
        if channels.shape[0] != heads:
            channels = channels.repeat_interleave(heads // channels.shape[0], 0)
        q = gather_channels(q, channels)
        if self.quantize_query and self.label_bits != 16:
            q = unpack_labels(pack_labels(q, self.label_bits), self.label_bits)
        return q

    def scores(self, q: Tensor, side: dict[str, Tensor], layer: int, kv_heads: int) -> Tensor:
        """Approximate logits (B, Hq, Lq, L) of queries (B, Hq, Lq, D) from labels alone."""
        query = self.query_labels(q, layer, kv_heads)
        return kernels.label_scores(query, side["label"], side.get("span"), bits=self.label_bits)

    def choose(
        self,
        q: Tensor,
        side: dict[str, Tensor],
        layer: int,
        kv_heads: int,
        rule: KeyRule,
        key_padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best keys of queries (B, Hq, Lq, D) by labels; see `kernels.choose_by_labels`."""
        query = self.query_labels(q, layer, kv_heads)
        return kernels.choose_by_labels(
            query, side["label"], side.get("span"), rule=rule, bits=self.label_bits,
            key_padding=key_padding,
        )  # fmt: skip

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

    def attention(self, ctx: AttentionContext, **options: Any) -> Tensor | None:
        """A decoding step in one go: labels, the best keys, and attention over those.

        None, so that the engine runs the plan, wherever the kernels cannot do it. A context that is
        too short for the detour to pay is read whole.
        """
        layer = ctx.cache_layer
        if not self._fuses(ctx, options) or not hasattr(layer, "append_labels"):
            return None
        self.on_append(ctx)
        if self.reads_all(ctx.shape, ctx.k.element_size()):
            out = attend(
                ctx.q, ctx.k, ctx.v, causal=True, key_padding=ctx.key_padding, validate=False,
                **{"scale": ctx.scale, **options},
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out
        return kernels.label_attention(
            ctx.q,
            ctx.k,
            ctx.v,
            self.query_labels(ctx.q, ctx.layer_idx, ctx.shape.kv_heads),
            layer.side["label"],
            layer.side.get("span"),
            rule=self._rule(ctx),
            bits=self.label_bits,
            key_padding=ctx.key_padding,
            scale=ctx.scale,
            softcap=options.get("softcap"),
            sink_logit=options.get("sink_logit"),
        )[0]

    def _fuses(self, ctx: AttentionContext, options: dict[str, Any]) -> bool:
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (ctx.q, ctx.k, ctx.v))
        return (
            ctx.is_decode
            and ctx.shape.causal
            and not learns
            and not self.is_dense(ctx.layer_idx)
            and not options.get("dropout_p")
            and "mask" not in ctx.info
            and ctx.q.dtype != torch.float64
            and kernels.selects_natively(ctx.q, ctx.k, ctx.v, ctx.key_padding)
        )

    def reads_all(self, shape: AttentionShape, size: int) -> bool:
        """Whether a decoding step would take longer by labels than over all keys.

        By the bytes that either reads, of keys in `size` bytes; see `_STEP_BYTES` and `_SCATTERED`.
        """
        if not self.dense_when_short:
            return False
        order = next(iter(self.channels.layers.values()))
        dim, length = order.shape[1], shape.k_len
        heads = shape.kv_heads if self._is_shared(order, shape.kv_heads) else shape.q_heads
        width = dim // self.group_factor
        label = width * self.label_bits // 8 + 8 if self.label_bits < 16 else width * size
        scattered = _SCATTERED if self.run == 1 else 1.0
        taken = min(self.heavy_tokens, length) * shape.q_heads * shape.q_len
        sparse = length * heads * label + scattered * 2 * taken * dim * size
        dense = 2 * length * shape.kv_heads * dim * size
        return shape.batch * (dense - sparse) < _STEP_BYTES

    def _is_shared(self, order: Tensor, kv_heads: int) -> bool:
        return order.shape[0] == kv_heads or self.share_group is True

    def _planned(self, ctx: AttentionContext, side: dict[str, Tensor]) -> KeyListPlan:
        shape = ctx.shape
        if shape.k_len <= self.heavy_tokens:
            everything = torch.ones(1, 1, shape.q_len, shape.k_len, dtype=torch.bool)
            return KeyListPlan.from_bitmask((everything & shape.causal_mask()).to(ctx.q.device))
        rule = self._rule(ctx)
        step = max(1, _SCORED // (shape.batch * shape.q_heads * shape.k_len))
        parts = [
            self.choose(
                ctx.q[:, :, begin : begin + step],
                side,
                ctx.layer_idx,
                shape.kv_heads,
                replace(rule, q_offset=shape.q_offset + begin),
                ctx.key_padding,
            )
            for begin in range(0, shape.q_len, step)
        ]
        keys, found = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        return KeyListPlan.from_found(keys, found)

    def _rule(self, ctx: AttentionContext) -> KeyRule:
        """How many keys a row reads, and which it may."""
        runs = min(self.heavy_tokens // self.run, -(-ctx.shape.k_len // self.run))
        return KeyRule(
            runs, self.run, ctx.shape.q_offset, ctx.shape.causal, ctx.window, self.always_keep_last
        )
