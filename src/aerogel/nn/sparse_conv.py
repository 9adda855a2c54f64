"""A 1x1 convolution that is born sparse: masked and dense while it trains, packed afterwards.

Reference: Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets", arXiv 1911.09723.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel import kernels
from aerogel.kernels import BlockRowWeight
from aerogel.kernels.formats import BLOCKS
from aerogel.sparsity import Block, build_masks

_PACKED = ("values", "columns", "row_ptr", "shape", "block_width")


class SparseConv1x1(nn.Module):
    """``activation(W x + bias)`` at every pixel, for a W of which only a share is not zero.

    While it trains it holds a dense weight and a mask: masked weights are zero in the forward pass,
    get no gradient and keep their value. `finalize` packs what is left; the layer is then for
    inference, computes only with the non-zeros, and its state dict holds nothing else.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        density: fraction of the weights that is not zero, in [0, 1]; 0 leaves the bias alone.
        block: neighbouring output channels that share their zeros: 1, 2 or 4.
        bias: add a bias.
        activation: one of `aerogel.kernels.ACTIVATIONS`, fused into the packed kernel.
        generator: source of the random mask and weights.

    Raises:
        ValueError: an argument out of range, or `block` does not divide `out_channels`.

    Reference:
        Elsen et al., arXiv 1911.09723.
    """

    mask: Tensor
    values: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        density: float,
        block: int = 1,
        *,
        bias: bool = True,
        activation: str = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ValueError(
                f"in_channels={in_channels}, out_channels={out_channels}: expected at least 1"
            )
        if block not in BLOCKS:
            raise ValueError(f"block={block}: expected one of {', '.join(map(str, BLOCKS))}")
        if out_channels % block:
            raise ValueError(f"block={block} does not divide out_channels={out_channels}")
        kernels.reference_activation(torch.zeros(()), activation)  # names the nearest if unknown
        self.in_channels, self.out_channels = in_channels, out_channels
        self.block, self.activation = block, activation
        self._packed: BlockRowWeight | None = None
        shape = (out_channels, in_channels, 1, 1)
        # Uniform as nn.Conv2d's, for the fan-in that is left.
        bound = 1.0 / math.sqrt(max(1.0, in_channels * density))
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = (
            nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound, generator=generator))
            if bias
            else None
        )
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self._set_mask(torch.rand(shape, generator=generator), density)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        density: float | None = None,
        block: int = 1,
        *,
        activation: str = "none",
    ) -> SparseConv1x1:
        """Take over the weights of a plain 1x1 convolution.

        Args:
            conv: kernel size 1, stride 1, no padding, one group.
            density: keep this fraction of largest magnitude; None keeps what is not zero now.
            block: as above.
            activation: as above.

        Raises:
            ValueError: another convolution, or an argument out of range.
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        for name, wanted in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            if getattr(conv, name) != (wanted, wanted):
                raise ValueError(f"conv.{name}={getattr(conv, name)}: expected {wanted}")
        if conv.groups != 1:
            raise ValueError(f"conv.groups={conv.groups}: expected 1")
        made = cls(
            *(conv.in_channels, conv.out_channels),
            1.0,
            block,
            bias=conv.bias is not None,
            activation=activation,
        ).to(conv.weight)
        with torch.no_grad():
            made.weight.copy_(conv.weight)
            if made.bias is not None and conv.bias is not None:
                made.bias.copy_(conv.bias)
        if density is None:
            made.mask = (conv.weight.detach() != 0).clone()
        else:
            made.prune_(density)
        return made.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels, H, W).

        Args:
            x: activations; channels first is what the packed kernel reads without a copy.
            residual: added before the activation; of the output's shape.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x: shape {tuple(x.shape)}, expected (batch, {self.in_channels}, H, W)"
            )
        if self.finalized:
            return kernels.spmm(
                x, self.packed, self.bias, activation=self.activation, residual=residual
            )
        y = F.conv2d(x, self.masked_weight, self.bias)
        y = y if residual is None else y + residual
        return kernels.reference_activation(y, self.activation)

    @property
    def finalized(self) -> bool:
        """Whether only the packed weight is left."""
        return "values" in self._buffers

    @property
    def masked_weight(self) -> Tensor:
        """The weight as it counts, (out_channels, in_channels, 1, 1)."""
        if self.finalized:
            return self.packed.unpack()[:, :, None, None]
        # A product with the mask would let a masked NaN through.
        return torch.where(self.mask, self.weight, 0.0)

    @property
    def density(self) -> float:
        """Fraction of the weights that is stored."""
        return self.packed.density if self.finalized else float(self.mask.float().mean())

    @property
    def packed(self) -> BlockRowWeight:
        """The packed weight of a finalized layer.

        Raises:
            RuntimeError: the layer is not finalized.
        """
        if not self.finalized:
            raise RuntimeError("the layer still trains: call finalize() first")
        if self._packed is None or self._packed.values is not self.values:
            parts = {name: getattr(self, name) for name in _PACKED}
            self._packed = BlockRowWeight.from_tensors({**parts, "block": parts["block_width"]})
        return self._packed

    @torch.no_grad()
    def prune_(self, density: float) -> SparseConv1x1:
        """Choose the mask anew: the weights (or blocks) of largest magnitude, masked ones included.

        Args:
            density: fraction kept, in [0, 1].

        Raises:
            ValueError: out of range, or a weight is NaN or infinite.
            RuntimeError: the layer is finalized.
        """
        self._still_trains()
        self._set_mask(self.weight.abs(), density)
        return self

    @torch.no_grad()
    def finalize(self) -> SparseConv1x1:
        """Pack the non-zeros and forget the rest; the layer is for inference from now on.

        Returns:
            The layer itself.

        Raises:
            RuntimeError: it is finalized already.
        """
        self._still_trains()
        packed = BlockRowWeight.pack(self.masked_weight.detach(), self.block)
        self._keep(packed)
        return self.eval()

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """A plain convolution with the same zeros (the activation is left out)."""
        has_bias = self.bias is not None
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=has_bias)
        conv = conv.to(self.masked_weight)
        conv.weight.copy_(self.masked_weight)
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, density, block, activation."""
        words = f"{self.in_channels}, {self.out_channels}, density={self.density:.3g}"
        words += f", block={self.block}, activation={self.activation!r}"
        return words + (", packed" if self.finalized else "")

    def _set_mask(self, score: Tensor, density: float) -> None:
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"density={density}: expected a fraction from 0 to 1")
        if density == 0.0:
            self.mask = torch.zeros_like(self.mask)
            return
        pattern = Block(self.block, 1)
        self.mask = build_masks({"weight": score}, density, pattern)["weight"]

    def _still_trains(self) -> None:
        if self.finalized:
            raise RuntimeError("the layer is finalized: its masked weights are gone")

    def _keep(self, packed: BlockRowWeight) -> None:
        parts = packed.to_tensors()
        parts["block_width"] = parts.pop("block")
        del self.weight, self.mask
        for name in _PACKED:
            self.register_buffer(name, parts[name])
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A packed state finalizes the layer that loads it."""
        found = {name: state_dict.get(f"{prefix}{name}") for name in _PACKED}
        if all(isinstance(each, Tensor) for each in found.values()):
            packed = BlockRowWeight.from_tensors({**found, "block": found["block_width"]})
            if packed.shape != (self.out_channels, self.in_channels):
                raise ValueError(
                    f"{prefix}shape: packed weight {packed.shape}, expected "
                    f"{(self.out_channels, self.in_channels)}"
                )
            if not self.finalized:
                self._keep(packed)
            for name in _PACKED:
                self._buffers[name] = found[name].clone()
            self._packed, self.block = None, packed.block
        super()._load_from_state_dict(state_dict, prefix, *args)
