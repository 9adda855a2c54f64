"""KV caches: growing without copies, and rings of a size known beforehand.

Needs transformers 5 or later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from aerogel.attention.span_cache import SpanCacheLayer
from aerogel.kernels.huge_pages import empty_rows

__all__ = ["AerogelCache", "SelectorCacheLayer", "SpanCacheLayer"]

_FIRST_CAPACITY = 64  # tokens


class SelectorCacheLayer(DynamicLayer):
    """Keys and values in buffers that double, and side state per token beside them.

    `side` maps names to tensors whose dimension 0 is the batch and whose second-last is the token
    (labels as (B, H, L, 1), compressed keys as (B, H, L, r)); `append_side` grows them, and they
    follow `crop`, `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.side: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends new keys and values; returns all of them, as views of the buffers.

        Raises:
            ValueError: they require gradients, which writing in place would lose.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "key_states: require gradients, but this cache writes in place; "
                "use it under torch.no_grad()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def append_side(self, name: str, new: Tensor) -> Tensor:
        """Appends side state (B, ..., tokens, n) under a name; returns all of it."""
        self.side[name] = self._appended(name, self.side.get(name), new)
        return self.side[name]

    def _appended(self, name: str, old: Tensor | None, new: Tensor) -> Tensor:
        have = 0 if old is None or old.numel() == 0 else old.shape[-2]
        need = have + new.shape[-2]
        buffer = self._buffers.get(name)
        ours = (
            buffer is not None
            and have
            and old is not None
            and old.data_ptr() == buffer.data_ptr()
            and buffer.shape[:-2] == new.shape[:-2]
        )
        if buffer is None or not ours or buffer.shape[-2] < need:
            room = max(_FIRST_CAPACITY, 1 << (need - 1).bit_length())
            buffer = empty_rows(new, *new.shape[:-2], room, new.shape[-1])
            if have and old is not None:
                buffer[..., :have, :] = old
            self._buffers[name] = buffer
        buffer[..., have:need, :] = new
        return buffer[..., :need, :]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.side.clear()
        self._buffers.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their negative number."""
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.side = {name: t[..., :tokens_to_remove, :] for name, t in self.side.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.side = {n: t.index_select(0, beam_idx.to(t.device)) for n, t in self.side.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        super().batch_select_indices(indices)
        self.side = {name: t[indices] for name, t in self.side.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        super().batch_repeat_interleave(repeats)
        self.side = {name: t.repeat_interleave(repeats, 0) for name, t in self.side.items()}


class AerogelCache(Cache):
    """A cache whose layers are what each layer's selector asks for.

    Args:
        model: a transformers model with `aerogel.attention.attach`, or any other (all layers then
            are `SelectorCacheLayer`).
    """

    def __init__(self, model: Any) -> None:
        from aerogel.attention.hf import attached_layers

        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        states = {state.layer_idx: state for state in attached_layers(model)}
        layers: list[Any] = []
        for index in range(config.num_hidden_layers):
            state = states.get(index)
            wanted = None if state is None else state.selector.cache_layer(index, heads)
            layers.append(SelectorCacheLayer() if wanted is None else wanted)
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes of the keys and values that all layers hold, in whatever form."""
        layers: list[Any] = list(self.layers)
        total = 0
        for layer in layers:
            if hasattr(layer, "nbytes"):
                total += layer.nbytes()
            elif layer.is_initialized and isinstance(layer.keys, Tensor):
                total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return total
