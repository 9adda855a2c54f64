"""Double Sparsity's offline step: the channels of each head that matter, from running text.

Paper: Yang et al., arXiv 2408.07092.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.attention.calibration import OnProgress, add_calibration
from aerogel.attention.channel_order import ChannelOrder
from aerogel.attention.double_sparsity import DoubleSparsitySelector
from aerogel.attention.hf import attach, detach
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.selector import AttentionContext, Selector
from aerogel.attention.topk import share_over_group

Metric = Literal["q", "k", "qk"]
METRICS = ("q", "k", "qk")


class ChannelStatistics(Selector):
    """Attends to everything and sums the size of every channel.

    Args:
        metric: "q" or "k": mean abs(q) or abs(k) before rotary embedding; "qk": mean abs(q * k) of
            the same token after it, for every query head.

    Raises:
        ValueError: another metric.
    """

    slug = "double-sparsity-statistics"
    needs = frozenset({"pre_rope"})

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: expected one of {METRICS}")
        self.metric: Metric = metric
        self.sums: dict[int, Tensor] = {}
        self.kv_heads: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if self.metric == "qk":
            keys = ctx.k.unsqueeze(2).expand(
                -1, -1, ctx.shape.q_heads // ctx.shape.kv_heads, -1, -1
            )
            values = ctx.q.float() * keys.flatten(1, 2).float()
        else:
            before = ctx.q_pre if self.metric == "q" else ctx.k_pre
            if before is None:
                raise ValueError(
                    f"metric={self.metric!r}: the model's queries and keys before rotary embedding "
                    "could not be read"
                )
            values = before.float()
        size = values.abs()
        count = ctx.shape.batch * ctx.shape.q_len
        if ctx.key_padding is not None:
            size = size * ctx.key_padding[:, None, :, None]
            count = int(ctx.key_padding.sum())
        layer = ctx.layer_idx
        total = size.double().sum((0, 2))
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total
        self.tokens[layer] = self.tokens.get(layer, 0) + count
        self.kv_heads[layer] = ctx.shape.kv_heads
        return DensePlan()

    def order(self, share_group: bool | Literal["auto"] = "auto") -> ChannelOrder:
        """Channels by falling mean; equal ones in their own order.

        Args:
            share_group: one order for the query heads of a group; "auto" does so where groups are
                of more than one head.

        Raises:
            ValueError: no token was seen.
        """
        if not self.sums or not min(self.tokens.values()):
            raise ValueError("batches: no tokens, expected some to calibrate on")
        layers = {}
        for layer in sorted(self.sums):
            mean = (self.sums[layer] / self.tokens[layer]).cpu()
            if share_group and mean.shape[0] != self.kv_heads[layer]:
                mean = share_over_group(mean[None], self.kv_heads[layer])[0]
            layers[layer] = torch.sort(mean, dim=-1, descending=True, stable=True).indices
        return ChannelOrder(layers, self.metric)


@torch.no_grad()
def calibrate_channels(
    model: nn.Module,
    batches: Iterable[Tensor | dict[str, Tensor]],
    metric: Metric | Literal["auto"] = "auto",
    share_group: bool | Literal["auto"] = "auto",
) -> ChannelOrder:
    """The channels of every head by their size on some text.

    Args:
        model: a transformers model; left as it was.
        batches: token ids (B, L), or keywords of the model's call.
        metric: "q", "k" or "qk" as for `ChannelStatistics`; "auto" is the authors' choice: "qk"
            where every query head has a key head of its own, else "q".
        share_group: as for `ChannelStatistics.order`.

    Raises:
        ValueError: no tokens, an unknown metric, or a model whose layers cannot be hooked.
    """
    if metric == "auto":
        transformer: Any = model
        config = transformer.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        grouped = (getattr(config, "num_key_value_heads", None) or heads) != heads
        metric = "q" if grouped else "qk"
    statistics = ChannelStatistics(metric)
    attach(model, statistics)
    try:
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            if inputs["input_ids"].numel():
                base = getattr(model, "base_model", model)
                base(**inputs, **({} if "use_cache" in inputs else {"use_cache": False}))
    finally:
        detach(model)
    return statistics.order(share_group)


@add_calibration("double-sparsity")
def calibrate_double_sparsity(
    model: nn.Module,
    windows: Tensor,
    *,
    on_progress: OnProgress | None = None,
    metric: Metric | Literal["auto"] = "auto",
    share_group: bool | Literal["auto"] = "auto",
    **options: Any,
) -> DoubleSparsitySelector:
    """Calibrates window by window.

    Args:
        model: a transformers model.
        windows: (windows, length) token ids.
        on_progress: called after every window.
        metric: as for `calibrate_channels`.
        share_group: the same.
        options: of `DoubleSparsitySelector`.
    """

    def batches() -> Iterable[Tensor]:
        for number in range(len(windows)):
            yield windows[number : number + 1]
            if on_progress is not None:
                on_progress(number + 1, len(windows))

    order = calibrate_channels(model, batches(), metric, share_group)
    return DoubleSparsitySelector(order, **options)
