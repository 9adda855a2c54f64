"""Sparse weights x dense activations: 1x1 convolutions and linear layers.

`y = activation(W x + bias (+ residual))` for a packed `W`, on activations as torch holds them:
`(batch, channels, *spatial)` or token-major `(*, features)`. Values that are not stored do not take
part: infinities and NaN in `x` reach exactly the outputs whose row stores their column.

Reference: Elsen, Dukhan, Gale, Simonyan, Fast Sparse ConvNets, arXiv 1911.09723.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels._library import native, native_available, reference_mode
from aerogel.kernels.formats import BlockRowWeight, dense_weight

# Codes of csrc/epilogue.h.
ACTIVATIONS: dict[str, int] = {
    "none": 0,
    "relu": 1,
    "relu6": 2,
    "hardswish": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "sigmoid": 7,
}
LAYOUTS = ("channels", "tokens")

_REFERENCE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}

_MAX_STREAMS = 8  # packed forms kept per weight: one per variant and row stride in use
_streams_lock = threading.Lock()


class SpmmVariant(NamedTuple):
    """How a weight is executed. Every variant gives the same bits; only the time differs.

    Attributes:
        vectors: widest panel of columns, in vectors of the instruction set.
        groups: block rows walked together, 1, 2 or 4.
        k_blocks: slabs into which the input features are cut, to keep them in the first cache.
        row_tiles: tiles into which the outputs are cut, for reuse and for several threads.
        pack: copy slabs to aligned scratch first (always so for tokens).
    """

    vectors: int
    groups: int = 1
    k_blocks: int = 1
    row_tiles: int = 1
    pack: bool = False


def reference_activation(x: Tensor, activation: str) -> Tensor:
    """The activation by name, in torch."""
    check_activation(activation)
    return _REFERENCE_ACTIVATIONS[activation](x)


def check_activation(activation: str) -> int:
    """The native code of an activation; ValueError names the nearest."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}{hint}"
        )
    return code


def output_shape(x: Tensor, rows: int, cols: int, layout: str) -> tuple[int, ...]:
    """Shape of the result, after checking that `x` fits a (rows, cols) weight."""
    shape = tuple(x.shape)
    if layout == "channels":
        if len(shape) < 2 or shape[1] != cols:
            raise ValueError(f"x: shape {shape}, expected (batch, {cols}, *spatial)")
        return (shape[0], rows, *shape[2:])
    if layout == "tokens":
        if not shape or shape[-1] != cols:
            raise ValueError(f"x: shape {shape}, expected (*, {cols})")
        return (*shape[:-1], rows)
    raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")


def check_operands(
    x: Tensor, rows: int, cols: int, bias: Tensor | None, residual: Tensor | None, layout: str
) -> tuple[int, ...]:
    """The output's shape; ValueError names the operand that does not fit."""
    shape = output_shape(x, rows, cols, layout)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({rows},)")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)}, expected {shape}")
    return shape


def linear_reference(x: Tensor, dense: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    """W x + bias with a dense weight."""
    if layout == "tokens":
        return F.linear(x, dense, bias)
    planes = x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel())
    out = torch.matmul(dense, planes)
    if bias is not None:
        out = out + bias[:, None]
    return out.reshape(x.shape[0], dense.shape[0], *x.shape[2:])


def spmm_reference(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    layout: str = "channels",
) -> Tensor:
    """`spmm` with a dense product in torch: any dtype, any device, differentiable."""
    check_operands(x, *weight.shape, bias, residual, layout)
    dense = dense_weight(weight.values, weight.columns, weight.row_ptr, weight.shape, weight.block)
    out = linear_reference(x, dense, bias, layout)
    if residual is not None:
        out = out + residual
    return reference_activation(out, activation)


def spmm(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    layout: str = "channels",
    variant: SpmmVariant | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies a packed weight by dense activations.

    Native for float32 on the CPU; other dtypes and devices, and `AEROGEL_KERNELS=reference`, take
    the torch reference. Where a gradient is needed it goes through `torch.ops.aerogel.spmm`.

    Args:
        x: (batch, in, *spatial) for layout "channels", (*, in) for "tokens"; other strides than
            torch's default are copied first.
        weight: packed (out, in) weight.
        bias: (out,) or None.
        activation: one of `ACTIVATIONS`, default "none".
        residual: added before the activation; shape of the result.
        layout: "channels" or "tokens".
        variant: how to execute; default `spmm_variants(...)[0]`.
        threads: default `torch.get_num_threads()`; the result does not depend on it.
        out: contiguous tensor to write to (no gradient flows then).

    Returns:
        (batch, out, *spatial) or (*, out).

    Raises:
        ValueError: shapes, activation, layout, variant, threads or out do not fit.
    """
    operands = (x, weight.values, bias, residual)
    if torch.compiler.is_compiling() or _needs_grad(operands):
        if out is not None:
            raise ValueError("out: expected None where a gradient is needed")
        return torch.ops.aerogel.spmm(
            x,
            weight.values,
            weight.columns,
            weight.row_ptr,
            weight.shape[0],
            weight.shape[1],
            weight.block,
            bias,
            residual,
            activation,
            layout,
        )
    shape = check_operands(x, *weight.shape, bias, residual, layout)
    if not _native_operands(operands) or reference_mode() or not native_available():
        result = spmm_reference(
            x, weight, bias, activation=activation, residual=residual, layout=layout
        )
        return result if out is None else _checked_out(out, x, shape).copy_(result)
    y = x.new_empty(shape) if out is None else _checked_out(out, x, shape)
    _run_native(x, weight, bias, activation, residual, layout, variant, threads, y)
    return y


def _needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _native_operands(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in tensors)


def _checked_out(out: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(out.shape) != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: {out.dtype} of shape {tuple(out.shape)}, expected contiguous {x.dtype} {shape}"
        )
    return out


class _Planes(NamedTuple):
    """A tensor seen as images of rows: address, floats from row to row and from image to image."""

    tensor: Tensor  # keeps a copy alive
    row: int
    image: int


def _planes(x: Tensor, columns: int) -> _Planes:
    """(batch, channels, *spatial) whose planes are contiguous; copied if they are not."""
    if x.is_contiguous():
        return _Planes(x, columns, x.shape[1] * columns)
    batch, channels = x.shape[:2]
    whole = x.dim() == 2 or x[:1, :1].is_contiguous()
    if whole and (channels <= 1 or x.stride(1) >= columns) and (batch <= 1 or x.stride(0) >= 0):
        return _Planes(x, max(x.stride(1), columns), x.stride(0))
    x = x.contiguous()
    return _Planes(x, columns, channels * columns)


def _run_native(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    layout: str,
    variant: SpmmVariant | None,
    threads: int | None,
    y: Tensor,
) -> None:
    code = check_activation(activation)
    if threads is None:
        threads = torch.get_num_threads()
    elif threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    rows, cols = weight.shape
    if y.numel() == 0:
        return
    tokens = layout == "tokens"
    if tokens:
        columns, batch = y.numel() // rows, 1
        source = _Planes(x.contiguous(), cols, 0)
        target, extra = _Planes(y, rows, 0), _Planes(y, rows, 0)
        if residual is not None:
            extra = _Planes(residual.contiguous(), rows, 0)
    else:
        batch = x.shape[0]
        columns = y.numel() // (batch * rows)
        source = _planes(x, columns)
        target, extra = _Planes(y, columns, rows * columns), _Planes(y, columns, 0)
        if residual is not None:
            extra = _planes(residual, columns)
    if bias is not None:
        bias = bias.contiguous()
    if variant is None:
        variant = default_variant(weight, columns, layout)
    native().spmm_run(
        native_weight(weight, variant, source.row, layout),
        source.tensor.data_ptr(),
        source.row,
        source.image,
        y.data_ptr(),
        target.row,
        target.image,
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else extra.tensor.data_ptr(),
        extra.row,
        extra.image,
        columns,
        batch,
        code,
        tokens,
        False,
        threads,
    )


def native_weight(
    weight: BlockRowWeight, variant: SpmmVariant, ldx: int, layout: str = "channels"
) -> Any:
    """The native stream of a weight for one variant and row stride; packed once, then kept.

    Args:
        weight: float32 weight on the CPU.
        variant: how it will be executed; layout "tokens" always packs activations.
        ldx: floats from one row of activations to the next (a packing variant takes any).
        layout: "channels" or "tokens".

    Returns:
        A `_native.SpmmWeight`, immutable.
    """
    pack = variant.pack or layout == "tokens"
    module = native()
    values = weight.values
    key = (
        *variant[:4],
        0 if pack else ldx,
        module.isa(),
        0 if values.is_inference() else values._version,  # training changes values in place
    )
    stream = weight._streams.get(key)
    if stream is None:
        stream = _pack_native(weight, variant, pack, ldx)
        with _streams_lock:
            while len(weight._streams) >= _MAX_STREAMS:
                weight._streams.pop(next(iter(weight._streams)))
            weight._streams[key] = stream
    return stream


def _pack_native(weight: BlockRowWeight, variant: SpmmVariant, pack: bool, ldx: int) -> Any:
    module = native()
    weight.check()
    values = weight.values.detach().contiguous()
    columns = weight.columns.to(torch.int32).contiguous()
    row_ptr = weight.row_ptr.contiguous()
    native_variant = module.SpmmVariant(
        variant.vectors, variant.groups, variant.k_blocks, variant.row_tiles, pack
    )
    return module.spmm_pack(
        values.data_ptr(),
        columns.data_ptr(),
        row_ptr.data_ptr(),
        *weight.shape,
        weight.block,
        native_variant,
        ldx,
    )


def default_variant(weight: BlockRowWeight, columns: int, layout: str = "channels") -> SpmmVariant:
    """A good variant without timing: the first of `spmm_variants`, remembered."""
    key = (columns, layout, native().isa())
    variant = weight._defaults.get(key)
    if variant is None:
        variant = weight._defaults[key] = spmm_variants(weight, columns, layout)[0]
    return variant


# Register tiles worth trying by block, as (groups, share of the widest panel), the likeliest first:
# a greedy cover of an exhaustive search over MobileNetV1's layers at 70 and 90 % zeros (AVX2).
_TILES: dict[int, tuple[tuple[int, float], ...]] = {
    1: ((2, 1.0), (2, 2 / 3), (1, 5 / 6)),
    2: ((1, 5 / 6), (2, 1.0), (1, 1.0)),
    4: ((1, 1.0), (1, 2 / 3)),
}
_SLAB_BYTES = 32 << 10  # what a slab of activations may take: about a first-level cache
_SLAB_STEPS = 25  # a shorter row per slab costs more in beginnings and ends than the cache returns
_REUSE_TO_PACK = 8  # uses of an activation that pay for copying it
_TASKS = 8  # panels x tiles that keep a few threads busy
_TILE_ROWS = 64


def spmm_variants(
    weight: BlockRowWeight, columns: int, layout: str = "channels"
) -> list[SpmmVariant]:
    """The variants worth timing for a weight and a number of columns, the likeliest first.

    Args:
        weight: packed weight.
        columns: pixels of one image, or tokens.
        layout: "channels" (packing and direct variants) or "tokens" (packing ones only).

    Returns:
        4 to 12 different variants.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    rows = max(weight.shape[0], 1)
    pack_first = weight.values.numel() / max(weight.shape[1], 1) >= _REUSE_TO_PACK
    packs = (pack_first, not pack_first) if layout == "channels" else (True,)
    found: dict[SpmmVariant, None] = {}
    for pack in packs:
        for vectors, groups in _register_tiles(weight.block, columns):
            panels = -(-columns // (vectors * native().lanes()))
            tiles = min(-(-_TASKS // max(panels, 1)), max(rows // _TILE_ROWS, 1))
            for k_blocks in _slab_counts(weight, vectors):
                found[SpmmVariant(vectors, groups, k_blocks, tiles, pack)] = None
    return list(found)


def _register_tiles(block: int, columns: int) -> list[tuple[int, int]]:
    """(vectors, groups) worth trying; panels of equal widths, none wider than needed."""
    module = native()
    needed = max(1, -(-columns // module.lanes()))
    found: dict[tuple[int, int], None] = {}
    widest_of_four = module.spmm_max_vectors(4, block)
    if needed <= widest_of_four:  # few columns: independent sums come from more rows
        found[needed, 4] = None
    for groups, share in _TILES[block]:
        limit = max(1, round(share * module.spmm_max_vectors(groups, block)))
        found[-(-needed // -(-needed // limit)), groups] = None
    return list(found)


def _slab_counts(weight: BlockRowWeight, vectors: int) -> list[int]:
    """Numbers of slabs worth trying: by the rule above, and half of that."""
    if weight.block > 1:  # more multiply-adds than loads: the cache is not the limit
        return [1]
    steps = weight.columns.shape[0] / max(len(weight.row_ptr) - 1, 1)
    slab_bytes = weight.shape[1] * vectors * native().lanes() * 4
    wanted = 1
    while steps / (2 * wanted) >= _SLAB_STEPS and slab_bytes / wanted > _SLAB_BYTES:
        wanted *= 2
    return sorted({wanted, max(wanted // 2, 1)}, reverse=True)
