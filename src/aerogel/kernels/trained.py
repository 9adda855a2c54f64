"""Products of a packed weight whose values change every step: forward, backward, all sparse.

A step costs three products over the stored values: `W x`, `W^T grad` and, for the weight itself,
`sddmm`. Both `W` and `W^T` are packed once per pattern; before each product the values are
scattered into its native stream by a map made at packing: a few per cent of the product.

Which variant is fastest is found in passing: the first products of a kind each try another one, and
the fastest stays. All variants give the same bits, so training does not depend on the choice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.formats import BlockRowWeight, dense_weight, entry_indices
from aerogel.kernels.sddmm import sddmm
from aerogel.kernels.spmm import linear_reference, output_shape
from aerogel.kernels.variants import SpmmVariant, spmm_variants

_TRIES = 2  # products timed for each variant; the faster counts
_MAX_STREAMS = 3  # packed forms kept per direction: a model sees few shapes


class ProductShape(NamedTuple):
    """One product's size, and what may change which variant is fastest."""

    columns: int
    batch: int
    layout: str
    threads: int
    isa: str


class _Choice:
    """The search for the fastest variant, one product after the other."""

    def __init__(self, candidates: list[SpmmVariant]) -> None:
        self._waiting = [variant for variant in candidates for _ in range(_TRIES)]
        self._best = candidates[0]
        self._seconds = float("inf")

    def next(self) -> SpmmVariant:
        return self._waiting[0] if self._waiting else self._best

    def note(self, seconds: float) -> None:
        if self._waiting:
            variant = self._waiting.pop(0)
            if seconds < self._seconds:
                self._seconds, self._best = seconds, variant


class Direction:
    """One product of a weight: its streams, and the variants chosen for it.

    Args:
        size: (outputs, inputs) of the product.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.choices: dict[tuple[object, ...], _Choice] = {}
        self._streams: dict[tuple[object, ...], Any] = {}
        self._lock = threading.Lock()

    def _candidates(self, shape: ProductShape) -> list[SpmmVariant]:
        """Variants worth timing."""
        raise NotImplementedError

    def _pack(self, variant: SpmmVariant, columns: int) -> Any:
        """A stream, whose values are nobody's yet."""
        raise NotImplementedError

    def _run(
        self,
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        shape: ProductShape,
        fill: Callable[[Any], bool | None],
    ) -> bool:
        """Fills a stream and multiplies; False, and no product, if `fill` says so."""
        with self._lock:  # the stream holds these values until the product is done
            choice = self._choice(shape)
            stream = self._stream(choice.next(), shape)
            if fill(stream) is False:
                return False
            start = time.perf_counter()
            self._call(stream, shape)(
                x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), 0
            )
            choice.note(time.perf_counter() - start)
        return True

    def _choice(self, shape: ProductShape) -> _Choice:
        # Batches of nearly equal size share a choice.
        key = (shape.columns.bit_length(), *shape[2:])
        choice = self.choices.get(key)
        if choice is None:
            choice = self.choices[key] = _Choice(self._candidates(shape))
        return choice

    def _stream(self, variant: SpmmVariant, shape: ProductShape) -> Any:
        pack = variant.pack or shape.layout == "tokens"
        key = (variant, pack, 0 if pack else shape.columns, shape.isa)
        stream = self._streams.pop(key, None)
        if stream is None:
            stream = self._pack(variant._replace(pack=pack), shape.columns)
            while len(self._streams) >= _MAX_STREAMS:
                del self._streams[next(iter(self._streams))]
        self._streams[key] = stream  # last: the least recently used goes first
        return stream

    def _call(self, stream: Any, shape: ProductShape) -> Any:
        rows, cols = self.size
        columns, batch, layout, threads, _ = shape
        if layout == "tokens":
            strides = (cols, 0, rows, 0, rows, 0)
        else:
            strides = (columns, cols * columns, columns, rows * columns, columns, rows * columns)
        return native().SpmmCall(
            stream, *strides, columns, batch, 0, layout == "tokens", max(threads, 1)
        )


class PatternDirection(Direction):
    """W or W^T of a pattern that stays while values change.

    Args:
        pattern: its packed form.
        order: int32, the number of every value; None: 0, 1, 2, ...
    """

    def __init__(self, pattern: BlockRowWeight, order: Tensor | None) -> None:
        super().__init__(pattern.shape)
        self.pattern = pattern
        self.order = order

    def multiply(self, x: Tensor, values: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        rows, cols = self.size
        y = x.new_empty(output_shape(x, rows, cols, layout))
        if y.numel() == 0:
            return y
        batch = 1 if layout == "tokens" else x.shape[0]
        shape = ProductShape(
            y.numel() // (batch * rows), batch, layout, torch.get_num_threads(), native().isa()
        )
        self._run(x, y, bias, shape, lambda stream: stream.update(values.data_ptr()))
        return y

    def _candidates(self, shape: ProductShape) -> list[SpmmVariant]:
        return spmm_variants(self.pattern, shape.columns, shape.layout, shape.threads)

    def _pack(self, variant: SpmmVariant, columns: int) -> Any:
        return native().spmm_pack_updatable(
            self.pattern.values.data_ptr(),
            0 if self.order is None else self.order.data_ptr(),
            self.pattern.columns.data_ptr(),
            self.pattern.row_ptr.data_ptr(),
            *self.pattern.shape,
            self.pattern.block,
            native().SpmmVariant(*variant),
            columns,
        )


class TrainedPattern:
    """Where a weight under training stores its values, prepared for all three products.

    Args:
        columns: (stored columns,) integers, as in `BlockRowWeight`.
        row_ptr: (rows // block + rows % block + 1,) int64.
        shape: (out_features, in_features).
        block: 1, 2 or 4.
        like: a pattern of the same shape whose choice of variants is taken over.

    Raises:
        ValueError: the parts do not describe a weight matrix.
    """

    def __init__(
        self,
        columns: Tensor,
        row_ptr: Tensor,
        shape: tuple[int, int],
        block: int,
        like: TrainedPattern | None = None,
    ) -> None:
        columns = columns.detach().to("cpu", torch.int32).contiguous()
        row_ptr = row_ptr.detach().to("cpu", torch.int64).contiguous()
        if block not in (1, 2, 4) or row_ptr.shape != (shape[0] // block + shape[0] % block + 1,):
            raise ValueError(
                f"row_ptr: shape {tuple(row_ptr.shape)} with block={block} does not describe rows "
                f"of a {tuple(shape)} weight"
            )
        full = int(row_ptr[shape[0] // block])
        count = full * block + len(columns) - full
        pattern = BlockRowWeight(
            torch.zeros(count, dtype=torch.float32, device="cpu"), columns, row_ptr, shape, block
        )
        pattern.check()
        self.pattern = pattern
        self.shape = shape
        self._forward = PatternDirection(pattern, None)
        self._backward = PatternDirection(*_transposed(pattern))
        if like is not None and like.shape == shape and like.pattern.block == block:
            self._forward.choices = like._forward.choices
            self._backward.choices = like._backward.choices

    @property
    def num_values(self) -> int:
        """How many values are stored."""
        return self.pattern.values.shape[0]

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every value."""
        p = self.pattern
        return entry_indices(p.columns, p.row_ptr, p.shape, p.block, self.num_values)

    def dense(self, values: Tensor) -> Tensor:
        """The (out, in) matrix; differentiable in `values`."""
        p = self.pattern
        columns, row_ptr = p.columns.to(values.device), p.row_ptr.to(values.device)
        return dense_weight(values, columns, row_ptr, p.shape, p.block)

    def multiply(
        self, x: Tensor, values: Tensor, bias: Tensor | None = None, layout: str = "tokens"
    ) -> Tensor:
        """`W x + bias`, differentiable (once) in `x`, `values` and `bias`.

        Native for float32 on the CPU outside of `torch.compile`; everything else is computed by a
        dense product, which is differentiable as often as one likes.

        Args:
            x: (batch, in, *spatial) for layout "channels", (*, in) for "tokens".
            values: (stored values,).
            bias: (out,) or None.
            layout: "channels" or "tokens".

        Returns:
            (batch, out, *spatial) or (*, out).

        Raises:
            ValueError: shapes or layout do not fit.
        """
        output_shape(x, *self.shape, layout)
        if values.shape != (self.num_values,):
            raise ValueError(f"values: shape {tuple(values.shape)}, expected ({self.num_values},)")
        if bias is not None and bias.shape != (self.shape[0],):
            raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({self.shape[0]},)")
        if not native_fits(x, values, bias):
            return linear_reference(x, self.dense(values), bias, layout)
        result = _TrainedProduct.apply(x, values, bias, self, layout)
        assert isinstance(result, Tensor)
        return result


def native_fits(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or native_in_use() is None:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in tensors)


def _transposed(pattern: BlockRowWeight) -> tuple[BlockRowWeight, Tensor]:
    """The pattern of W^T in block rows of one, and which value of W stands where."""
    rows, cols = pattern.shape
    row, column = entry_indices(
        pattern.columns, pattern.row_ptr, pattern.shape, pattern.block, pattern.values.shape[0]
    )
    order = torch.argsort(column * max(rows, 1) + row)
    counts = torch.bincount(column, minlength=cols)
    turned = BlockRowWeight(
        values=torch.zeros(len(order), dtype=torch.float32, device="cpu"),
        columns=row[order].to(torch.int32),
        row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        shape=(cols, rows),
        block=1,
    )
    return turned, order.to(torch.int32)


def _sum_over_columns(grad: Tensor, layout: str) -> Tensor:
    if layout == "tokens":
        rows = grad.reshape(-1, grad.shape[-1])
        return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))  # half the time of rows.sum(0)
    return grad.reshape(*grad.shape[:2], grad.shape[2:].numel()).sum((0, 2))


class _TrainedProduct(torch.autograd.Function):
    """The three sparse products of a step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: TrainedPattern,
        layout: str,
    ) -> Tensor:
        x = x.contiguous()
        ctx.pattern, ctx.layout = pattern, layout
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        bias = None if bias is None else bias.contiguous()
        return pattern._forward.multiply(x, values.contiguous(), bias, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            backward = ctx.pattern._backward
            grad_x = backward.multiply(grad, values.contiguous(), None, ctx.layout)
        if ctx.needs_input_grad[1]:
            grad_values = sddmm(grad, x, ctx.pattern.pattern, layout=ctx.layout)
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_over_columns(grad, ctx.layout)
        return grad_x, grad_values, grad_bias, None, None
