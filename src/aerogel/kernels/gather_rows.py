"""Lookups in a table whose rows keep their nonzeros only, and the search among its scores.

Reference: csrc/gather_rows.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels._library import native_in_use

_ROOM = 4096  # for entries that are found; more are looked for twice
_VALUES = {torch.float32: False, torch.float16: True}  # whether half
_COLUMNS = {torch.int32: False, torch.uint8: True}  # whether narrow
_IDS = {torch.int32: False, torch.int64: True}  # whether wide


def gather_rows(values: Tensor, columns: Tensor, row_ptr: Tensor, ids: Tensor, dim: int) -> Tensor:
    """Dense rows of a compressed table.

    Args:
        values: (nonzeros,) float32 or float16.
        columns: (nonzeros,) uint8 or int32, each in [0, dim).
        row_ptr: (rows + 1,) int64, from 0 to nonzeros.
        ids: integers of any shape, each in [0, rows).
        dim: length of a row.

    Returns:
        (*ids.shape, dim) float32.

    Raises:
        ValueError: an id out of range.
    """
    half, narrow = _VALUES.get(values.dtype), _COLUMNS.get(columns.dtype)
    plain = half is not None and narrow is not None and _plain(values, columns, row_ptr)
    native = native_in_use() if plain else None
    if native is None:
        return gather_rows_reference(values, columns, row_ptr, ids, dim)
    wide = _IDS.get(ids.dtype)
    if wide is None or not ids.is_cpu:
        check_ids("ids", ids, len(row_ptr) - 1)
        ids, wide = ids.to("cpu", torch.int64), True
    if not ids.is_contiguous():
        ids = ids.contiguous()
    out = torch.empty((*ids.shape, dim), dtype=torch.float32, device="cpu")
    inside = native.gather_rows(
        values.data_ptr(),
        half,
        columns.data_ptr(),
        narrow,
        row_ptr.data_ptr(),
        row_ptr.numel() - 1,
        ids.data_ptr(),
        wide,
        out.data_ptr(),
        ids.numel(),
        dim,
        min(values.numel(), columns.numel()),
        torch.get_num_threads(),
    )
    if not inside:
        check_ids("ids", ids, len(row_ptr) - 1)
    return out


def _plain(values: Tensor, columns: Tensor, row_ptr: Tensor) -> bool:
    """Whether a table's parts lie in memory as the native kernel reads them."""
    if not (values.is_cpu and columns.is_cpu and row_ptr.is_cpu):
        return False
    if not (values.is_contiguous() and columns.is_contiguous() and row_ptr.is_contiguous()):
        return False
    return row_ptr.dtype is torch.int64 and not torch.compiler.is_compiling()


def check_ids(argument: str, ids: Tensor, count: int) -> None:
    """Raise ValueError unless all ids are in [0, count)."""
    if not ids.numel():
        return
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= count:
        raise ValueError(f"{argument} must be in [0, {count}), got {low} .. {high}")


def gather_rows_reference(
    values: Tensor, columns: Tensor, row_ptr: Tensor, ids: Tensor, dim: int
) -> Tensor:
    """`gather_rows` in torch."""
    check_ids("ids", ids, len(row_ptr) - 1)
    shape, ids = ids.shape, ids.reshape(-1).long()
    begin = row_ptr[ids]
    length = row_ptr[ids + 1] - begin
    out = torch.zeros(len(ids), dim, dtype=torch.float32, device=values.device)
    row = torch.repeat_interleave(length)
    first = length.cumsum(0) - length
    source = torch.arange(len(row), device=row.device) + (begin - first)[row]
    out[row, columns[source].long()] = values[source].float()
    return out.reshape(*shape, dim)


def entries_above(matrix: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a matrix above their column's limit.

    Args:
        matrix: (rows, columns) float.
        limits: (columns,).

    Returns:
        Row, column and value of each, (found,), in the order of rows.
    """
    native_takes = matrix.is_cpu and matrix.dtype is torch.float32 and limits.dtype is torch.float32
    native = native_in_use() if native_takes else None
    if native is None:
        return entries_above_reference(matrix, limits)
    matrix, limits = matrix.contiguous(), limits.contiguous()
    room = max(_ROOM, len(limits))
    while True:
        at_row, at_column = torch.empty(2, room, dtype=torch.int64, device="cpu")
        found = matrix.new_empty(room)
        count = native.entries_above(
            matrix.data_ptr(),
            *matrix.shape,
            limits.data_ptr(),
            at_row.data_ptr(),
            at_column.data_ptr(),
            found.data_ptr(),
            room,
        )
        if count <= room:
            return at_row[:count], at_column[:count], found[:count]
        room = count


def entries_above_reference(matrix: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`entries_above` in torch."""
    row, column = (matrix > limits).nonzero(as_tuple=True)
    return row, column, matrix[row, column]
