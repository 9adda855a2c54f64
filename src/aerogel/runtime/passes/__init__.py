"""Graph rewrites before lowering: one pure function GraphModule -> GraphModule per file."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from aerogel.runtime.passes.fold_batch_norm import fold_batch_norm
from aerogel.runtime.passes.fold_constants import fold_constants
from aerogel.runtime.passes.fuse_activation import fuse_activation
from aerogel.runtime.passes.fuse_attention import fuse_attention
from aerogel.runtime.passes.fuse_residual import fuse_residual
from aerogel.runtime.passes.layers_before_movement import layers_before_movement
from aerogel.runtime.passes.name_activations import name_activations
from aerogel.runtime.passes.name_layers import name_layers
from aerogel.runtime.passes.remove_identity import remove_identity
from aerogel.runtime.passes.remove_mutation import remove_mutation
from aerogel.runtime.passes.simplify_movement import simplify_movement

# Order matters: an addition must be absorbed before the activation that follows it, and both
# only after batch norm no longer stands between them and their layer. Attention must see the layers
# it is fed by, and leaves views behind that the layer it feeds must see through.
PASSES: tuple[Callable[[fx.GraphModule], fx.GraphModule], ...] = (
    remove_identity,
    fold_constants,
    name_layers,
    name_activations,
    fold_batch_norm,
    layers_before_movement,
    fuse_attention,
    layers_before_movement,
    simplify_movement,
    fuse_residual,
    fuse_activation,
)


def simplify(gm: fx.GraphModule) -> fx.GraphModule:
    """Run all passes in order."""
    for rewrite in PASSES:
        gm = rewrite(gm)
    return gm


__all__ = [
    "PASSES",
    "fold_batch_norm",
    "fold_constants",
    "fuse_activation",
    "fuse_attention",
    "fuse_residual",
    "layers_before_movement",
    "name_activations",
    "name_layers",
    "remove_identity",
    "remove_mutation",
    "simplify",
    "simplify_movement",
]
