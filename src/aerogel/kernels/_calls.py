"""Native calls prepared once per shape and packed streams kept with their weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.values import VALUE_TYPES

_MAX_STREAMS = 8  # packed forms kept per weight: one per variant and row stride in use
_MAX_CALLS = 64  # prepared calls kept per weight: one per shape in use
_cache_lock = threading.Lock()


def needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd must see the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fits_native(t: Tensor | None) -> bool:
    """Whether the native kernels can read this operand."""
    return t is None or (t.dtype is torch.float32 and t.is_cpu)


def runs_natively(weight: BlockRowWeight, operands: tuple[Tensor | None, ...]) -> bool:
    """Whether the native kernels can multiply this weight by these operands."""
    values = weight.values
    known = values.is_cpu if weight.low_bit else fits_native(values)
    return known and all(map(fits_native, operands))


def checked_out(out: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`out`, if a result of `x` can be written to it; else ValueError."""
    if tuple(out.shape) != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: {out.dtype} of shape {tuple(out.shape)}, expected contiguous {x.dtype} {shape}"
        )
    return out


class Rows(NamedTuple):
    """How a kernel reads a tensor: floats from row to row and from image to image."""

    row: int
    image: int
    copy: bool  # its strides do not fit: only a contiguous copy does


def row_strides(x: Tensor, columns: int, layout: str) -> Rows:
    """The strides of (batch, channels, *spatial), or of (*, features) for layout "tokens"."""
    if layout == "tokens":
        return Rows(x.shape[-1], 0, not x.is_contiguous())
    batch, channels = x.shape[:2]
    if not x.is_contiguous():
        whole = x.dim() == 2 or x[:1, :1].is_contiguous()
        rows_fit = channels <= 1 or x.stride(1) >= columns
        if whole and rows_fit and (batch <= 1 or x.stride(0) >= 0):
            return Rows(max(x.stride(1), columns), x.stride(0), False)
    return Rows(columns, channels * columns, not x.is_contiguous())


class PreparedCall(NamedTuple):
    """A product prepared for one shape: what remains is addresses."""

    native: Any  # None where the result is empty
    shape: tuple[int, ...]
    copy_x: bool
    copy_residual: bool

    def run(self, x: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
        """Writes the result for operands of the prepared shapes and strides to `y`."""
        if self.native is None:
            return
        # Copies are bound to names: they live until the kernel has read them.
        if self.copy_x:
            x = x.contiguous()
        if residual is not None and self.copy_residual:
            residual = residual.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        self.native(
            x.data_ptr(),
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
        )


def version(weight: BlockRowWeight) -> int:
    """Changes whenever the values do: training changes them in place."""
    values = weight.values
    return 0 if values.is_inference() else values._version


def kept_call(
    weight: BlockRowWeight, key: tuple[object, ...], prepare: Callable[[], PreparedCall]
) -> PreparedCall:
    """The call kept under a key that ends in `version(weight)`, prepared if there is none."""
    call: PreparedCall | None = weight._calls.get(key)
    if call is None:
        call = prepare()
        with _cache_lock:
            stale = [k for k in weight._calls if k[-1] != key[-1]]  # they hold old streams
            for k in stale if len(weight._calls) < _MAX_CALLS else list(weight._calls):
                del weight._calls[k]
            weight._calls[key] = call
    return call


def kept_stream(weight: BlockRowWeight, key: tuple[object, ...], pack: Callable[[], Any]) -> Any:
    """The native stream kept under a key, packed if there is none."""
    stream = weight._streams.get(key)
    if stream is None:
        stream = pack()
        with _cache_lock:
            while len(weight._streams) >= _MAX_STREAMS:
                weight._streams.pop(next(iter(weight._streams)))
            weight._streams[key] = stream
    return stream


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def stored_arrays(weight: BlockRowWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Checked values as they are stored, columns (int32) and row_ptr."""
    weight.check()
    columns = weight.columns.to(torch.int32).contiguous()
    return weight.values.detach().contiguous(), columns, weight.row_ptr.contiguous()


def pack_stored(weight: BlockRowWeight, pack: Callable[..., Any], *rest: int) -> Any:
    """A native stream: what `pack` makes of the stored values, scales, columns, shape and rest."""
    values, columns, row_ptr = stored_arrays(weight)
    scales = None if weight.scales is None else weight.scales.contiguous()
    return pack(
        values.data_ptr(),
        VALUE_TYPES[values.dtype],
        address(scales),
        columns.data_ptr(),
        row_ptr.data_ptr(),
        *weight.shape,
        *rest,
    )


def native_arrays(weight: BlockRowWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Checked float32 values, columns (int32) and row_ptr as the native library reads them.

    Kernels that compute more than they read take bfloat16 and int8 values as float32 too.
    """
    values, columns, row_ptr = stored_arrays(weight)
    return (weight.float_values() if weight.low_bit else values), columns, row_ptr
