"""Layers that train on their stored weights only: `SparseLinear` and `SparseConv2d` (1x1).

The parameter is `values`, one number per stored weight, not a dense `weight` under a mask: at 90 %
zeros the optimizer then reads and writes a tenth of the memory (AdamW on a dense 768 x 3072 weight
costs more than all its sparse products on few tokens), and no step can move a pruned weight. The
pattern lies beside it in buffers, so that a state dict is complete and small; a state dict with a
dense `weight` can be loaded too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.kernels import BlockRowWeight, TrainedPattern

_PARTS = ("values", "columns", "row_ptr", "block")


class SparseLayer(nn.Module):
    """What both layers share: values, pattern, bias, and how they change.

    Attributes:
        values: (stored weights,) parameter.
        bias: (out,) parameter or None.
        columns, row_ptr, block: the pattern, as in `aerogel.kernels.BlockRowWeight`.
        weight_shape: shape of the dense weight, (out, in) or (out, in, 1, 1).
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    columns: Tensor
    row_ptr: Tensor
    block: Tensor
    layout: str

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        super().__init__()
        self.weight_shape = tuple(weight.shape)
        self._trained: TrainedPattern | None = None
        self.dense_gradient: Tensor | None = None
        self.captures_gradient = False
        self.values = nn.Parameter(weight.new_empty(0), requires_grad=weight.requires_grad)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias)
        for name in _PARTS[1:]:
            self.register_buffer(name, None)
        self._take_pattern(mask)
        self.values.data = self.gather(weight.detach())

    # ------------------------------------------------------------------------------ the weight

    @property
    def pattern(self) -> TrainedPattern:
        """The pattern prepared for the kernels; made on first use."""
        if self._trained is None:
            self._trained = self._prepared(None)
        return self._trained

    @property
    def weight(self) -> Tensor:
        """The dense weight with its zeros, differentiable in `values`; made anew on each access."""
        return self.pattern.dense(self.values).reshape(self.weight_shape)

    @property
    def mask(self) -> Tensor:
        """Which weights are stored: bool, of the dense weight's shape."""
        stored = torch.ones(self.pattern.num_values, device=self.values.device)
        return (self.pattern.dense(stored) != 0).reshape(self.weight_shape)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        rows, cols = self.weight_shape[:2]
        return 1.0 - self.values.numel() / max(rows * cols, 1)

    def gather(self, dense: Tensor) -> Tensor:
        """The entries of a dense (out, in, ...) tensor where weights are stored."""
        row, column = (index.to(dense.device) for index in self.pattern.indices())
        return dense.reshape(self.weight_shape[:2])[row, column]

    def scatter(self, values: Tensor) -> Tensor:
        """The inverse of `gather`: zeros where nothing is stored."""
        return self.pattern.dense(values).reshape(self.weight_shape)

    @torch.no_grad()
    def set_mask(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Store other weights from now on.

        Weights in both masks keep their value and their optimizer state; new ones start at zero
        with a state of zeros. Call it between an optimizer step and the next forward pass.

        Args:
            mask: bool, True = stored, of the dense weight's shape.
            optimizer: the one that trains `values`; its state changes with them.

        Raises:
            ValueError: another shape or dtype.
        """
        if mask.dtype is not torch.bool or tuple(mask.shape) != self.weight_shape:
            raise ValueError(
                f"mask: {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool "
                f"{self.weight_shape}"
            )
        old = self.pattern
        self._take_pattern(mask)

        def carried(values: Tensor) -> Tensor:
            return self.gather(old.dense(values))

        if optimizer is not None:
            move_state(optimizer, self.values, self.values, carried)
        self.values.data = carried(self.values.detach())
        self.values.grad = None
        self.dense_gradient = None

    # ---------------------------------------------------------------------------- the product

    def product(self, x: Tensor, layout: str) -> Tensor:
        """`W x + bias`; inside `dense_gradients` its backward pass notes the dense gradient too."""
        y = self.pattern.multiply(x, self.values, self.bias, layout)
        if self.captures_gradient and y.requires_grad:
            seen = x.detach()
            y.register_hook(lambda grad: self._note_gradient(grad, seen, layout))
        return y

    @torch.no_grad()
    def _note_gradient(self, grad: Tensor, x: Tensor, layout: str) -> None:
        if layout == "tokens":
            dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        else:
            dense = torch.einsum("bnm,bkm->nk", grad.flatten(2), x.flatten(2))
        dense = dense.reshape(self.weight_shape)
        seen = self.dense_gradient
        self.dense_gradient = dense if seen is None else seen + dense

    # ----------------------------------------------------------------------------- persistence

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trained": None, "dense_gradient": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._unpack_dense(state_dict, prefix)
        for name in _PARTS:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape:
                own.data = own.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        try:
            self._trained = self._prepared(None)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error

    def _unpack_dense(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace a dense weight in a state dict by values, and take its pattern if need be."""
        dense = state_dict.pop(prefix + "weight", None)
        if dense is None:
            return
        if tuple(dense.shape) != self.weight_shape:
            raise ValueError(
                f"{prefix}weight: shape {tuple(dense.shape)}, expected {self.weight_shape}"
            )
        nonzero = (dense != 0).to(self.values.device)
        if bool((nonzero & ~self.mask).any()):
            self._take_pattern(nonzero)
        state_dict[prefix + "values"] = self.gather(dense)
        for name in _PARTS[1:]:
            state_dict[prefix + name] = getattr(self, name)

    # ---------------------------------------------------------------------------------- pieces

    def _take_pattern(self, mask: Tensor) -> None:
        matrix = mask.reshape(self.weight_shape[:2]).float()
        # Blocks only where they are full: every stored weight is one that the mask keeps.
        packed = BlockRowWeight.pack(matrix, "auto", min_fill=1.0)
        # Gloo, and so DistributedDataParallel on CPUs, cannot send 16-bit integers.
        self.columns, self.row_ptr = packed.columns.to(torch.int32), packed.row_ptr
        self.block = torch.tensor(packed.block, device=mask.device)
        self._trained = self._prepared(self._trained)

    def _prepared(self, like: TrainedPattern | None) -> TrainedPattern:
        rows, cols = self.weight_shape[:2]
        return TrainedPattern(self.columns, self.row_ptr, (rows, cols), int(self.block), like)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.weight_shape}, sparsity={self.sparsity:.3f}, bias={bias}"


class SparseLinear(SparseLayer):
    """`nn.Linear` on its stored weights only.

    Args:
        source: the layer to take over; its bias parameter is shared.
        mask: bool, True = stored, of the weight's shape.
    """

    def __init__(self, source: nn.Linear, mask: Tensor) -> None:
        super().__init__(source.weight, source.bias, mask)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)."""
        return self.product(x, "tokens")

    def to_dense(self) -> nn.Linear:
        """The plain layer with exact zeros; it shares the bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return _filled(layer, self)


class SparseConv2d(SparseLayer):
    """`nn.Conv2d` with a 1x1 kernel on its stored weights only.

    Args:
        source: the layer to take over, with one group and no padding; its bias is shared.
        mask: bool, True = stored, of the weight's shape.

    Raises:
        ValueError: another kernel, grouping or padding.
    """

    def __init__(self, source: nn.Conv2d, mask: Tensor) -> None:
        if not is_pointwise(source):
            raise ValueError(f"source: {source}, expected a 1x1 kernel, one group, no padding")
        super().__init__(source.weight, source.bias, mask)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.stride = source.stride

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, ...), or the same without a batch."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return self.product(x.permute(0, 2, 3, 1), "tokens").permute(0, 3, 1, 2)
        return self.product(x, "channels")

    def to_dense(self) -> nn.Conv2d:
        """The plain layer with exact zeros; it shares the bias."""
        rows, cols = self.stride
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, 1, (rows, cols), bias=False, device="meta"
        )
        return _filled(layer, self)


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is a matrix product: 1x1 kernel, one group, no padding."""
    plain = layer.padding in ((0, 0), "valid", "same")
    return layer.kernel_size == (1, 1) and layer.groups == 1 and plain


def _filled(layer: Any, source: SparseLayer) -> Any:
    weight = source.weight.detach().clone()
    layer.weight = nn.Parameter(weight, requires_grad=source.values.requires_grad)
    layer.register_parameter("bias", source.bias)
    return layer.train(source.training)


def move_state(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    carried: Callable[[Tensor], Tensor],
) -> None:
    """Let `optimizer` train `new` in place of `old`, with its state of old's shape `carried` over.

    Args:
        optimizer: any `torch.optim` optimizer, or Accelerate's wrapper of one.
        old: a parameter it may hold.
        new: the parameter to hold instead; may be `old` itself.
        carried: a tensor like `old` as one like `new`.
    """
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = inner.state.pop(old, None)
    if state is not None:
        inner.state[new] = {
            key: carried(value)
            if isinstance(value, Tensor) and value.shape == old.shape and value.dim()
            else value
            for key, value in state.items()
        }
