"""Sparse attention in any transformers model, by name or attached.

    AutoModelForCausalLM.from_pretrained(path, attn_implementation="aerogel:minference")
    config.aerogel_s2 = {"stride": 4, ...}    # options of a name go with the configuration
    attach(model, "double-sparsity", ...)     # selectors that need the cache, or q before RoPE
    detach(model)                             # the model is bit-identical to before

Names work once `aerogel.attention` is imported. Nothing is written into the model's own config but
the name of its attention.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aerogel.attention.engine import attend
from aerogel.attention.hooks import (
    LayerState,
    add_hooks,
    attention_layers,
    link_layers,
    text_decoder,
)
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.selector import (
    ALIASES,
    SELECTORS,
    AttentionContext,
    Selector,
    configured,
    make_selector,
    select,
)
from aerogel.attention.selector_file import load_selector
from aerogel.attention.shape import AttentionShape
from aerogel.attention.when_imported import when_imported

PREFIX = "aerogel:"
_READ = ("sliding_window", "softcap", "s_aux", "position_ids", "is_causal")
# Keywords of the models' own that say nothing about attention.
_HARMLESS = frozenset(
    {
        "cache_position",
        "return_dict",
        "output_hidden_states",
        "use_cache",
        "num_items_in_batch",
        "logits_to_keep",
        "layer_idx",
        "position_embeddings",
        "past_key_values",
        "layer_past",
    }
)
_states: WeakKeyDictionary[nn.Module, LayerState] = WeakKeyDictionary()
_defaults: dict[tuple[str, str], Selector] = {}
_warned: set[str] = set()


def register() -> bool:
    """Makes ``aerogel:<slug>`` known to transformers for every selector; False without it.

    Needs transformers 4.53 or later.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        return False
    names = {slug: slug for slug in SELECTORS} | ALIASES
    for name, slug in names.items():
        AttentionInterface.register(PREFIX + name, _function(slug))
        AttentionMaskInterface.register(PREFIX + name, padding_mask)
    return True


def register_once_there() -> None:
    """The same as soon as somebody imports transformers' models; `aerogel.attention` calls it."""
    when_imported("transformers.modeling_utils", register)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_: Any,
) -> Tensor | None:
    """What transformers calls to make a mask: the 2-D padding mask, or None without padding.

    Raises:
        ValueError: the call has a static cache, packed sequences or a mask of its own, which a
            padding mask cannot say.
    """
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError(
            f"cache: {kv_length} keys for queries up to {int(q_offset) + q_length}; static caches "
            "and prefixes are not supported, use the default cache or AerogelCache"
        )
    if use_vmap or not (allow_is_causal_skip or allow_is_bidirectional_skip):
        raise ValueError("attention_mask: packed sequences and mask overlays are not supported")
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].bool()
    return None if bool(attention_mask.all()) else attention_mask


def attach(
    model: nn.Module, selector: Selector | str | Path, *, strict: bool = False, **options: Any
) -> Selector:
    """Lets a selector choose what every attention layer of a model reads.

    Args:
        model: a transformers model; of a vision-language model, the text decoder is meant.
        selector: an instance, a name with `options`, or the path of a selector file.
        strict: a 4-D mask is an error instead of a warning and a slow path.
        options: of the named selector.

    Returns:
        The selector, now shared by all layers.

    Raises:
        ValueError: the model has no attention layer that transformers can redirect, is attached
            already, or does not match the selector file.
    """
    if attached_layers(model):
        raise ValueError("model: attached already; call detach(model) first")
    slug = ALIASES.get(str(selector), str(selector))
    if isinstance(selector, Selector):
        chosen = selector
    elif slug in SELECTORS:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
        chosen = make_selector(slug, **(configured(slug, text) | options))
    else:
        chosen = load_selector(Path(selector), model)
    decoder = text_decoder(model)
    layers = attention_layers(decoder)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no attention layer with a layer_idx")
    chosen.on_attach(model)
    before = getattr(decoder.config, "_attn_implementation", None)
    _know(chosen.slug)
    decoder.set_attn_implementation(PREFIX + chosen.slug)  # type: ignore[operator]
    for module in layers:
        state = LayerState(chosen, int(module.layer_idx), strict, before)  # type: ignore[arg-type]
        add_hooks(module, state)
        _states[module] = state
    if "next_layer" in chosen.needs:
        try:
            link_layers({module: _states[module] for module in layers})
        except ValueError:
            detach(model)
            raise
    return chosen


def detach(model: nn.Module) -> None:
    """Undoes `attach`; without it, does nothing."""
    states = attached_layers(model)
    for module in model.modules():
        state = _states.pop(module, None)
        for handle in [] if state is None else state.handles:
            handle.remove()
    if states:
        text_decoder(model).set_attn_implementation(states[0].implementation)  # type: ignore[operator]


def attached_layers(model: nn.Module) -> list[LayerState]:
    """The states of a model's attached attention layers."""
    found = (_states.get(module) for module in model.modules())
    return [state for state in found if state is not None]


def _know(slug: str) -> None:
    """Registers a selector's name that `SELECTORS` does not list."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PREFIX + slug, _function(slug))
    AttentionMaskInterface.register(PREFIX + slug, padding_mask)


def _function(slug: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        tensors = (query, key, value)
        return _attention(slug, module, tensors, attention_mask, scaling, dropout, options)

    return attention


def _selector(slug: str, state: LayerState | None, module: nn.Module) -> Selector:
    if state is not None:
        return state.selector
    if slug not in SELECTORS or SELECTORS[slug].needs:
        raise ValueError(
            f"{PREFIX}{slug}: needs more than q, k and v; call "
            f"aerogel.attention.attach(model, {slug!r}, ...) instead of naming it"
        )
    options = configured(slug, getattr(module, "config", None))
    key = (slug, json.dumps(options, sort_keys=True))
    if key not in _defaults:
        made = make_selector(slug, **options)
        if any(True for _ in made.parameters()):
            raise ValueError(f"{PREFIX}{slug}: the options {options} need parameters of their own")
        made.on_name(options)
        _defaults[key] = made
    return _defaults[key]


def _check_options(options: dict[str, Any]) -> None:
    if options.get("output_attentions"):
        raise ValueError("output_attentions=True: sparse attention does not return weights")
    for name, value in options.items():
        known = name in _READ or name in _HARMLESS or name == "output_attentions"
        if not known and value is not None and value is not False:
            raise ValueError(f"{name}: not understood by aerogel's attention, expected None")


def _attention(
    slug: str,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    _check_options(options)
    q, k, v = tensors
    state = _states.get(module)
    selector = _selector(slug, state, module)
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    common: dict[str, Any] = {
        "scale": scale,
        "window": options.get("sliding_window"),
        "softcap": options.get("softcap"),
        "sink_logit": options.get("s_aux"),
        "dropout_p": dropout,
    }
    cache_layer = None if state is None else state.cache_layer()
    if cache_layer is not None and hasattr(cache_layer, "attend"):
        out = cache_layer.attend(q, k, v, **common)
        return out.transpose(1, 2), None
    context = AttentionContext(
        q=q,
        k=k,
        v=v,
        shape=AttentionShape.of(q, k, causal=causal),
        scale=scale,
        layer_idx=int(getattr(module, "layer_idx", 0)),
        key_padding=mask if mask is not None and mask.dim() == 2 else None,
        window=common["window"],
        positions=options.get("position_ids"),
        q_pre=None if state is None else state.q_pre,
        k_pre=None if state is None else state.k_pre,
        layer_input=None if state is None else state.layer_input,
        cache_layer=cache_layer,
        info={"mask": mask} if mask is not None and mask.dim() == 4 else {},
    )
    own = selector.attention(context, **common)
    if own is not None:
        if mask is not None and mask.dim() == 4:
            raise ValueError(f"attention_mask: 4-D, expected 2-D or none with {selector.slug}")
        return own.transpose(1, 2), None
    plan = select(selector, context)
    if mask is not None and mask.dim() == 4:
        strict = state is not None and state.strict
        plan, causal = _with_mask(plan.to_dense_mask(context.shape), mask, strict), False
    out = attend(
        q, k, v, plan=plan, causal=causal, key_padding=context.key_padding, validate=False, **common
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def _with_mask(kept: Tensor, mask: Tensor, strict: bool) -> KeyListPlan:
    """A plan's pairs under a model's own 4-D mask."""
    if strict:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, expected 2-D or none (strict)"
        )
    if "mask" not in _warned:
        _warned.add("mask")
        warnings.warn("a 4-D attention mask takes a slow path in sparse attention", stacklevel=2)
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise ValueError("attention_mask: expected zeros and the lowest number, no other bias")
        mask = mask == 0
    return KeyListPlan.from_bitmask((kept & mask[..., : kept.shape[-1]]).contiguous())
