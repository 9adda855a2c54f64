"""Lookups in a table whose rows keep their nonzeros only, and the search among its scores.

Reference: csrc/gather_rows.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels._library import native, native_available, reference_mode

_ROOM = 4096  # for entries that are found; more are looked for twice


def gather_rows(values: Tensor, columns: Tensor, row_ptr: Tensor, ids: Tensor, dim: int) -> Tensor:
    """Dense rows of a compressed table.

    Args:
        values: (nonzeros,) float32 or float16.
        columns: (nonzeros,) uint8 or int32, each in [0, dim).
        row_ptr: (rows + 1,) int64, from 0 to nonzeros.
        ids: (count,) int64, each in [0, rows): the caller has checked it.
        dim: length of a row.

    Returns:
        (count, dim) float32.
    """
    known = values.dtype in (torch.float32, torch.float16)
    known = known and columns.dtype in (torch.uint8, torch.int32)
    if not (known and values.is_cpu and native_available()) or reference_mode():
        return gather_rows_reference(values, columns, row_ptr, ids, dim)
    values, columns, row_ptr, ids = (t.contiguous() for t in (values, columns, row_ptr, ids))
    out = torch.empty(len(ids), dim)
    half, narrow = values.dtype is torch.float16, columns.dtype is torch.uint8
    native().gather_rows(
        values.data_ptr(),
        half,
        columns.data_ptr(),
        narrow,
        row_ptr.data_ptr(),
        ids.data_ptr(),
        out.data_ptr(),
        len(ids),
        dim,
        min(len(values), len(columns)),
        torch.get_num_threads(),
    )
    return out


def gather_rows_reference(
    values: Tensor, columns: Tensor, row_ptr: Tensor, ids: Tensor, dim: int
) -> Tensor:
    """`gather_rows` in torch."""
    begin = row_ptr[ids]
    length = row_ptr[ids + 1] - begin
    out = torch.zeros(len(ids), dim, device=values.device)
    row = torch.repeat_interleave(length)
    first = length.cumsum(0) - length
    source = torch.arange(len(row), device=row.device) + (begin - first)[row]
    out[row, columns[source].long()] = values[source].float()
    return out


def entries_above(matrix: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a matrix above their column's limit.

    Args:
        matrix: (rows, columns) float.
        limits: (columns,).

    Returns:
        Row, column and value of each, (found,), in the order of rows.
    """
    native_takes = matrix.is_cpu and matrix.dtype is torch.float32 and limits.dtype is torch.float32
    if not native_takes or not native_available() or reference_mode():
        return entries_above_reference(matrix, limits)
    matrix, limits = matrix.contiguous(), limits.contiguous()
    room = max(_ROOM, len(limits))
    while True:
        places, found = torch.empty(2, room, dtype=torch.int64), torch.empty(room)
        at_row, at_column = places
        count = native().entries_above(
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
