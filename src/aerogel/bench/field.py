"""Who takes part in a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from aerogel.bench.engines import Aerogel, Engine, TorchChannelsLast, TorchCompile, TorchEager
from aerogel.bench.onnx_engines import DeepSparse, OnnxRuntime, OpenVino

Weights = Literal["dense", "sparse"]

DENSE_ENGINES: tuple[Engine, ...] = (
    TorchEager(), TorchChannelsLast(), TorchCompile(), OnnxRuntime(), OpenVino(),
)  # fmt: skip
# Peers that are faster on networks with zeros than on those without.
SPARSE_ENGINES: tuple[Engine, ...] = (DeepSparse(),)
ENGINES: tuple[Engine, ...] = (*DENSE_ENGINES, *SPARSE_ENGINES, Aerogel())


@dataclass(frozen=True)
class Source:
    """How another process builds a network; the weights come from the network at hand.

    Attributes:
        builder: Import path of a function that returns it, as "package.module:function".
        arguments: Its keyword arguments, JSON values.
    """

    builder: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One engine with one network's weights.

    Attributes:
        engine: What runs it.
        model: The network.
        weights: Whether these are the dense or the sparse ones.
        source: For engines that run modules in a process of their own.
    """

    engine: Engine
    model: nn.Module
    weights: Weights = "dense"
    source: Source | None = None

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.engine.name} ({self.weights})"


def lineup(
    dense: nn.Module | None = None,
    sparse: nn.Module | None = None,
    *,
    engines: Sequence[Engine] = DENSE_ENGINES,
    sparse_engines: Sequence[Engine] = (TorchEager(), Aerogel()),
    source: Source | None = None,
    sparse_source: Source | None = None,
) -> list[Contender]:
    """The usual field: dense weights on every engine, sparse weights on aerogel.

    Args:
        dense: The network before pruning.
        sparse: The network after pruning, masks on or baked.
        engines: Those that run the dense weights.
        sparse_engines: Those that run the sparse weights. Eager torch is among them by default,
            to show what zeros alone buy.
        source: Of both networks, for `Workers`.
        sparse_source: Of the sparse one, where it is not built like the dense one.

    Returns:
        Contenders, in the order in which the table lists them.
    """
    pairs = [] if dense is None else [Contender(e, dense, "dense", source) for e in engines]
    if sparse is not None:
        pairs += [Contender(e, sparse, "sparse", sparse_source or source) for e in sparse_engines]
    return pairs


def find_engine(name: str) -> Engine:
    """The engine of that name or alias.

    Raises:
        ValueError: There is none; the message lists them.
    """
    known = {engine.name: (engine.name, *getattr(engine, "aliases", ())) for engine in ENGINES}
    for engine in ENGINES:
        if name.strip().lower() in known[engine.name]:
            return engine
    short = ", ".join(min(names, key=len) for names in known.values())
    raise ValueError(f"engine = {name!r}: expected one of {short}")
