"""Selectors: the part that each published sparse attention brings, and the list of them.

A selector looks at one attention call and returns a plan. It brings no softmax, kernel, cache or
causal rule of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.shape import AttentionShape

NEEDS = frozenset({"pre_rope", "cache", "calibration", "layer_input", "next_layer"})
DECODE_ROWS = 8  # query rows at most for a call to count as decoding


@dataclass
class AttentionContext:
    """One attention call, as a selector sees it.

    Attributes:
        q: (B, Hq, Lq, D) after rotary embedding.
        k: (B, Hkv, Lk, D), the same.
        v: (B, Hkv, Lk, Dv).
        shape: sizes, positions and causal rule.
        scale: factor of the logits.
        layer_idx: number of the layer in its model.
        key_padding: (B, Lk) bool, True at real keys, or None.
        window: tokens of the model's own sliding window, or None.
        positions: (B, Lq) position ids of the model, or None.
        q_pre: (B, Hq, Lq, D) before rotary embedding, if asked for by ``needs``.
        k_pre: (B, Hkv, Lq, D), the same, of the new tokens.
        layer_input: (B, Lq, d_model), if asked for.
        cache_layer: the layer of the KV cache, if there is one.
        generator: for selectors that draw; None is torch's default.
        info: whatever else the caller knows (``grid`` of a picture).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shape: AttentionShape
    scale: float
    layer_idx: int = 0
    key_padding: Tensor | None = None
    window: int | None = None
    positions: Tensor | None = None
    q_pre: Tensor | None = None
    k_pre: Tensor | None = None
    layer_input: Tensor | None = None
    cache_layer: Any = None
    generator: torch.Generator | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """A few new rows on a longer history."""
        return self.shape.q_len <= DECODE_ROWS and self.shape.k_len > self.shape.q_len

    def first_keys(self) -> Tensor | None:
        """(B,) int32 first real key of each batch element, None without left padding."""
        if self.key_padding is None:
            return None
        first = self.key_padding.to(torch.uint8).argmax(-1).int()
        return first if bool((first > 0).any()) else None


class Selector(nn.Module):
    """Base of all selectors; parameters only if it learns.

    A subclass works for batches with padding, grouped heads, and any lengths.
    """

    slug: ClassVar[str] = ""
    alias: ClassVar[str] = ""  # a second name
    config_key: ClassVar[str] = ""  # attribute of a model's configuration that holds the options
    built_in: ClassVar[bool] = False  # only for models whose configuration has that attribute
    needs: ClassVar[frozenset[str]] = frozenset()
    differentiable: ClassVar[bool] = False

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        """What the rows of a prompt (or of a chunk of it) read."""
        return DensePlan()

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        """What the new rows read."""
        return DensePlan()

    def on_append(self, ctx: AttentionContext) -> None:
        """Called once the cache holds the new keys: keep side state."""

    def on_attach(self, model: nn.Module) -> None:
        """Called with a transformers model before it is attached: look at its sizes.

        Raises:
            ValueError: the selector does not fit the model.
        """

    def on_name(self, options: dict[str, Any]) -> None:
        """Called once when models use it by name, with what their configuration holds."""

    def attention(self, ctx: AttentionContext, **options: Any) -> Tensor | None:
        """(B, Hq, Lq, Dv), for weights that are no softmax over a plan; None: the engine attends.

        Args:
            ctx: the call.
            options: window, softcap, sink_logit and dropout_p, as `attend` takes them.
        """
        return None

    def loss(self, ctx: AttentionContext) -> Tensor | None:
        """An auxiliary loss, for selectors that learn by one."""
        return None

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        """The KV cache layer that this selector wants, or None for the usual one."""
        return None

    def options(self) -> dict[str, Any]:
        """What `__init__` was given, as JSON can hold it."""
        return {}


def select(selector: Selector, ctx: AttentionContext) -> Plan:
    """The selector's plan for a call; without gradients unless it is differentiable."""
    quiet = contextlib.nullcontext() if selector.differentiable else torch.no_grad()
    with quiet:
        if ctx.cache_layer is not None:
            selector.on_append(ctx)
        return selector.plan_decode(ctx) if ctx.is_decode else selector.plan_prefill(ctx)


class Entry(NamedTuple):
    """A selector by name.

    Attributes:
        factory: makes it from its options.
        needs: as `Selector.needs`; empty: models may use it by name alone.
    """

    factory: Callable[..., Selector]
    needs: frozenset[str]


SELECTORS: dict[str, Entry] = {}
"""Every selector by its slug."""

ALIASES: dict[str, str] = {}
"""Slugs by their second names."""

# transformers dispatches on these parts of an implementation's name.
_RESERVED = ("/", "sdpa", "flash", "flex_attention")


def add_selector(kind: type[Selector]) -> type[Selector]:
    """Lists a selector under its slug (a class decorator).

    Raises:
        ValueError: the slug is empty, reserved or taken, or it needs something unknown.
    """
    slug = kind.slug
    if not slug or any(part in slug for part in _RESERVED):
        raise ValueError(f"slug={slug!r}: expected a name without {_RESERVED}")
    if slug in SELECTORS:
        raise ValueError(f"slug={slug!r}: taken by {SELECTORS[slug].factory}")
    if not kind.needs <= NEEDS:
        raise ValueError(f"needs={set(kind.needs)}: expected some of {set(NEEDS)}")
    SELECTORS[slug] = Entry(kind, kind.needs)
    if kind.alias:
        ALIASES[kind.alias] = slug
    return kind


def configured(slug: str, config: Any) -> dict[str, Any]:
    """A selector's options as a model's configuration holds them, such as ``config.aerogel_s2``.

    Raises:
        ValueError: it holds none, and the selector is only for models that were built with it.
    """
    kind = SELECTORS[slug].factory
    key = getattr(kind, "config_key", "")
    found = getattr(config, key, None) if key else None
    if found is None and getattr(kind, "built_in", False):
        raise ValueError(
            f"{slug}: expected a model that was built with it, which means nothing to one trained "
            f"densely; set config.{key} = {{...}} before the model is made"
        )
    return dict(found or {})


def make_selector(slug: str, **options: Any) -> Selector:
    """A selector by name.

    Raises:
        ValueError: no selector has this name.
    """
    slug = ALIASES.get(slug, slug)
    if slug not in SELECTORS:
        raise ValueError(f"selector={slug!r}: expected one of {sorted(SELECTORS)}")
    return SELECTORS[slug].factory(**options)
