"""The layer as torch computes it: always a candidate, so nothing ever gets slower."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from aerogel.runtime import ops
from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

NAME = "torch"


class TorchLayer(nn.Module):
    """A layer of the graph as a module of its own."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(layer(x) + residual)."""
        it = self._layer
        if it.op == "linear":
            return ops.linear(x, it.weight, it.bias, it.activation, residual)
        geometry = (it.stride, it.padding, it.dilation, it.groups)
        return ops.conv2d(x, it.weight, it.bias, *geometry, it.activation, residual)


@provides("conv2d", "linear")
def torch_dense(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """`F.conv2d` or `F.linear` with the epilogue done in place."""
    yield Candidate(NAME, sparse=False, module=lambda: TorchLayer(layer))
