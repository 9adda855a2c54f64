"""What an attached attention layer remembers during its own call: cache, and q, k before RoPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from aerogel.attention.selector import Selector


@dataclass
class LayerState:
    """One attached attention module.

    `cache`, `q_pre`, `k_pre` and `layer_input` are of the current call only.
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

    def cache_layer(self) -> Any:
        """This layer's part of the cache, or None."""
        layers = getattr(self.cache, "layers", None)
        if layers is None or self.layer_idx >= len(layers):
            return None
        return layers[self.layer_idx]

    def forget(self) -> None:
        """Drops what belonged to the last call."""
        self.cache = self.q_pre = self.k_pre = self.layer_input = None


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

    return hook


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
