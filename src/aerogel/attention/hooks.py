"""What an attached attention layer remembers during its own call: cache, and q, k before RoPE."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.attention.selector import Selector


@dataclass
class LayerState:
    """One attached attention module.

    `cache`, `q_pre`, `k_pre` and `layer_input` are of the current call only; `following` is the
    next attention module, for selectors that need it.
    """

    selector: Selector
    layer_idx: int
    strict: bool
    implementation: str | None
    handles: list[Any] = field(default_factory=list)
    cache: Any = None
    q_pre: Tensor | None = None
    k_pre: Tensor | None = None
    layer_input: Tensor | None = None
    following: Any = None

    def cache_layer(self) -> Any:
        """This layer's part of the cache, or None."""
        return self._cached(self.layer_idx)

    def next_cache_layer(self) -> Any:
        """The following layer's part of the cache, or None."""
        return None if self.following is None else self._cached(int(self.following.layer_idx))

    def _cached(self, index: int) -> Any:
        layers = getattr(self.cache, "layers", None)
        return None if layers is None or index >= len(layers) else layers[index]

    def forget(self) -> None:
        """Drops what belonged to the last call."""
        self.cache = self.q_pre = self.k_pre = self.layer_input = None


def text_decoder(model: nn.Module) -> nn.Module:
    """The part of a vision-language model that reads text; any other model itself."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return model
    text = config.get_text_config(decoder=True)
    if text is config:
        return model
    parts = (m for m in model.modules() if getattr(m, "config", None) is text)
    return next((m for m in parts if hasattr(m, "set_attn_implementation")), model)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Modules that call an attention function of transformers."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    ]


def add_hooks(module: nn.Module, state: LayerState) -> None:
    """Adds the hooks that a state's selector needs to its module.

    Raises:
        ValueError: the selector needs q and k before RoPE, and the layer has no known projection.
    """
    state.handles.append(
        module.register_forward_pre_hook(_before(state), with_kwargs=True, prepend=True)
    )
    state.handles.append(module.register_forward_hook(_after(state), always_call=True))
    if "pre_rope" in state.selector.needs:
        _add_pre_rope(module, state)


def _before(state: LayerState) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.forget()
        cache = kwargs.get("past_key_values")
        state.cache = kwargs.get("layer_past") if cache is None else cache
        if "layer_input" in state.selector.needs:
            state.layer_input = args[0] if args else kwargs.get("hidden_states")
        layer = state.cache_layer()
        mask = kwargs.get("attention_mask")
        if hasattr(layer, "note_mask") and mask is not None and mask.dim() == 2:
            layer.note_mask(mask)
        if hasattr(layer, "note_padding") and mask is not None and mask.dim() == 2:
            layer.note_padding((mask.long().cumsum(1) == 0).sum(1))
        if hasattr(layer, "note_next") and state.following is not None:
            x = args[0] if args else kwargs["hidden_states"]
            rotary = kwargs.get("position_embeddings")
            if x.shape[1] == 1 and rotary is not None:
                layer.note_next(_foretold(state.following, x, rotary), state.next_cache_layer())

    return hook


def link_layers(states: dict[nn.Module, LayerState]) -> None:
    """Tells every layer its successor, for selectors that foretell the next layer's queries.

    Raises:
        ValueError: there are no two layers in succession, or they have no rotary embedding or no
            query projection that is known.
    """
    modules = sorted(states, key=lambda module: states[module].layer_idx)
    if len(modules) < 2:
        raise ValueError(f"model: {len(modules)} attention layer, expected two in succession")
    for module, following in itertools.pairwise(modules):
        if not hasattr(following, "q_proj") or _rotation(following) is None:
            raise ValueError(
                f"model: {type(following).__name__} has no q_proj with a rotary embedding, so its "
                "queries cannot be foretold"
            )
        if states[following].layer_idx == states[module].layer_idx + 1:
            states[module].following = following


def _rotation(module: nn.Module) -> Any:
    return getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)


@torch.no_grad()
def _foretold(following: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """What a layer's query would be if its input were this one's: (B, Hq, L, D)."""
    q = following.q_proj(x)
    norm = getattr(following, "q_norm", None)
    if norm is not None and norm.weight.numel() != following.head_dim:
        q, norm = norm(q), None
    q = q.unflatten(-1, (-1, following.head_dim))
    q = (q if norm is None else norm(q)).transpose(1, 2)
    turned: Tensor = _rotation(following)(q, q, *rotary)[0]
    return turned


def _after(state: LayerState) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        state.forget()

    return hook


def _add_pre_rope(module: Any, state: LayerState) -> None:

    def keep(name: str, x: Tensor) -> None:
        setattr(state, name, x.transpose(1, 2))

    def watch(child: nn.Module, record: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            record(output)

        state.handles.append(child.register_forward_hook(hook))

    def heads(x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unflatten(-1, (-1, module.head_dim))

    if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        watch(getattr(module, "q_norm", module.q_proj), lambda x: keep("q_pre", heads(x)))
        watch(getattr(module, "k_norm", module.k_proj), lambda x: keep("k_pre", heads(x)))
    elif hasattr(module, "qkv_proj"):

        def record(x: Tensor) -> None:
            split = x.unflatten(-1, (-1, module.head_dim))
            queries = module.config.num_attention_heads
            keep("q_pre", split[:, :, :queries])
            keep("k_pre", split[:, :, queries : queries + module.num_key_value_heads])

        watch(module.qkv_proj, record)
    elif hasattr(module, "query_key_value"):

        def record_joint(x: Tensor) -> None:
            parts = x.unflatten(-1, (-1, 3, module.head_size))
            keep("q_pre", parts[..., 0, :])
            keep("k_pre", parts[..., 1, :])

        watch(module.query_key_value, record_joint)
    else:
        raise ValueError(
            f"model: {type(module).__name__} has no q_proj, qkv_proj or query_key_value"
        )
