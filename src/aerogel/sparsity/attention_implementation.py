"""How a transformers model computes its attention: which modules ask for it, and switching it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from torch import nn


def switchable_attention(model: nn.Module) -> Iterator[nn.Module]:
    """The attention modules whose products are done by what the model's configuration names."""
    for module in model.modules():
        # Modules of transformers that follow the configuration look its functions up in this table.
        known = vars(sys.modules[type(module).__module__])
        by_name = "ALL_ATTENTION_FUNCTIONS" in known and "Attention" in type(module).__name__
        if by_name and isinstance(getattr(module, "scaling", None), float):
            yield module


def switch_attention(model: nn.Module, name: str) -> Callable[[], None]:
    """Let every transformers model inside compute attention by this name.

    Whole models, not single blocks: they build one attention mask in their implementation's format.

    Returns:
        What switches them back.
    """
    switched: list[tuple[Callable[[str], None], str]] = []
    for module in model.modules():  # outermost first, which switches what it contains
        setter = getattr(module, "set_attn_implementation", None)
        before = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if setter is not None and before is not None and before != name:
            setter(name)
            switched.append((setter, before))

    def restore() -> None:
        for setter, before in switched:
            setter(before)

    return restore
