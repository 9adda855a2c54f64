"""Packed sparse weights: plain tensors that a kernel can walk, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.values import check_scales, quantize_rows

BLOCKS = (4, 2, 1)
_INT16_COLUMNS = 1 << 15


def _stored_columns(nonzero: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Masks of stored entries: (full block rows, K) and (remaining rows, K)."""
    rows, cols = nonzero.shape
    full = rows // block
    return nonzero[: full * block].reshape(full, block, cols).any(1), nonzero[full * block :]


def _fill(nonzero: Tensor, block: int) -> float:
    """Share of non-zeros among the stored values of whole blocks (1.0 if there are none)."""
    mask, _ = _stored_columns(nonzero, block)
    stored = int(mask.sum()) * block
    return int(nonzero[: mask.shape[0] * block].sum()) / stored if stored else 1.0


def _choose_block(nonzero: Tensor, block: int | str, min_fill: float) -> int:
    """The block asked for, or the largest whose stored values are at least `min_fill` non-zero.

    The rule is XNNPACK's.
    """
    if block in BLOCKS:
        return int(block)
    if block != "auto":
        raise ValueError(f"block={block!r}: expected 1, 2, 4 or 'auto'")
    if not 0.0 <= min_fill <= 1.0:
        raise ValueError(f"min_fill={min_fill}: expected a share between 0 and 1")
    for candidate in BLOCKS[:-1]:
        if nonzero.shape[0] >= candidate and _fill(nonzero, candidate) >= min_fill:
            return candidate
    return 1


@dataclass(frozen=True, eq=False)
class BlockRowWeight:
    """A weight matrix without its zeros; `block` consecutive output rows share their columns.

    Block row r covers the output rows r * block ... and stores the columns
    `columns[row_ptr[r]:row_ptr[r + 1]]`, ascending, with `block` values each (zeros inside a
    stored block are stored). The last `rows % block` rows follow as block rows of one.

    Attributes:
        values: (stored values,) in order of `columns`, `block` neighbours each; floating point, or
            int8 multiples of their output's scale.
        columns: (stored columns,) int16 where the input features fit, else int32.
        row_ptr: (rows // block + rows % block + 1,) int64.
        shape: (out_features, in_features).
        block: 1, 2 or 4.
        scales: (out_features,) float32 for int8 values, else None.

    Reference: Elsen, Dukhan, Gale, Simonyan, Fast Sparse ConvNets, arXiv 1911.09723.
    """

    values: Tensor
    columns: Tensor
    row_ptr: Tensor
    shape: tuple[int, int]
    block: int
    scales: Tensor | None = None
    # What spmm and gemv keep: native streams, prepared calls, the default variant by columns and
    # the n:m pattern; sddmm keeps its native pattern.
    _streams: dict[object, Any] = field(default_factory=dict, repr=False)
    _calls: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False)
    _defaults: dict[object, Any] = field(default_factory=dict, repr=False)
    _pattern: list[Any] = field(default_factory=list, repr=False)

    @staticmethod
    def pack(
        weight: Tensor,
        block: int | str = "auto",
        min_fill: float = 0.9,
        *,
        dtype: torch.dtype | None = None,
        scales: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> BlockRowWeight:
        """Packs the non-zeros of a dense weight.

        Args:
            weight: (out, in) or (out, in, 1, ...) tensor that needs no gradient; floating point,
                or int8 with `scales`.
            block: output rows that share columns: 1, 2, 4, or "auto" for the largest whose blocks
                are at least `min_fill` full.
            min_fill: share of non-zeros that "auto" asks of a block, 0 to 1.
            dtype: of the stored values, default the weight's. `torch.int8` rounds every row to
                multiples of its largest magnitude / 127; what rounds to zero stays stored.
            scales: (out,) or (out, 1) float32 for a weight that is int8 already.
            mask: bool of the weight's shape, True = stored even where it is zero; default none.

        Returns:
            The packed weight, on the weight's device, sharing no memory with it.

        Raises:
            TypeError: `weight` is neither floating point nor int8, or `dtype` likewise.
            ValueError: another shape, block, min_fill, scales or mask, a weight that requires a
                gradient, or infinite values or NaN for int8.
        """
        given = _as_matrix(weight, scales)
        nonzero = given != 0  # NaN != 0 is true: NaN weights are stored and propagate
        matrix, scales = _stored_as(given, dtype, scales)
        if mask is not None:
            nonzero = nonzero | _as_mask(mask, weight).reshape(nonzero.shape)
        return _packed(matrix, nonzero, block, min_fill, scales)

    def unpack(self) -> Tensor:
        """The dense (out, in) weight: bit for bit what was stored, or float32 for int8 values."""
        values = self.float_values() if self.scales is not None else self.values
        return self._dense(values)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight for activations of this type; only bfloat16 and int8 are converted."""
        weight = self.unpack()
        return weight.to(dtype) if self.low_bit else weight

    def stored(self) -> tuple[Tensor, Tensor]:
        """The dense (out, in) values as stored, without scales, and the mask of stored places."""
        return self._dense(self.values), self._dense(torch.ones_like(self.values, dtype=torch.bool))

    def _dense(self, values: Tensor) -> Tensor:
        return dense_weight(values, self.columns, self.row_ptr, self.shape, self.block)

    @property
    def low_bit(self) -> bool:
        """Whether the values are stored in bfloat16 or int8, to be multiplied as float32."""
        return self.values.dtype in (torch.bfloat16, torch.int8)

    def float_values(self) -> Tensor:
        """The values in float32, times their scales."""
        values = self.values.float()
        if self.scales is None:
            return values
        rows, _ = entry_indices(
            self.columns, self.row_ptr, self.shape, self.block, self.values.shape[0]
        )
        return values * self.scales[rows]

    @property
    def density(self) -> float:
        """Share of stored values (zeros inside stored blocks count as stored)."""
        size = self.shape[0] * self.shape[1]
        return self.values.numel() / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the portable tensors."""
        parts = (self.values, self.columns, self.row_ptr, self.scales)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors to save: values, columns, row_ptr, shape, block, and scales if any."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {
            **scales,
            "values": self.values,
            "columns": self.columns,
            "row_ptr": self.row_ptr,
            "shape": torch.tensor(self.shape),
            "block": torch.tensor(self.block),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> BlockRowWeight:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: a part is missing, or the parts contradict each other.
        """
        missing = {"values", "columns", "row_ptr", "shape", "block"} - tensors.keys()
        if missing:
            raise ValueError(f"packed weight: missing {', '.join(sorted(missing))}")
        rows, cols = (int(n) for n in tensors["shape"].tolist())
        weight = BlockRowWeight(
            tensors["values"],
            tensors["columns"],
            tensors["row_ptr"],
            (rows, cols),
            int(tensors["block"]),
            tensors.get("scales"),
        )
        weight.check()
        return weight

    def without_cache(self) -> BlockRowWeight:
        """The same tensors with native streams of their own, for comparing many variants."""
        return BlockRowWeight(
            self.values, self.columns, self.row_ptr, self.shape, self.block, self.scales
        )

    def check(self) -> None:
        """Raises ValueError unless the parts describe a weight matrix."""
        rows, cols = self.shape
        if self.block not in BLOCKS or rows < 0 or cols < 0:
            raise ValueError(f"block={self.block}, shape={self.shape}: not a packed weight")
        full = rows // self.block
        if self.row_ptr.dtype != torch.int64 or self.row_ptr.shape != (
            full + rows % self.block + 1,
        ):
            raise ValueError(f"row_ptr: shape {tuple(self.row_ptr.shape)} does not fit {self}")
        ptr = self.row_ptr
        if int(ptr[0]) != 0 or bool((ptr.diff() < 0).any()) or int(ptr[-1]) != len(self.columns):
            raise ValueError("row_ptr: expected ascending offsets from 0 to the number of columns")
        stored = int(ptr[full]) * self.block + int(ptr[-1] - ptr[full])
        if self.values.shape != (stored,):
            raise ValueError(f"values: {tuple(self.values.shape)}, expected ({stored},)")
        check_scales(self.values.dtype, self.scales, rows)
        if len(self.columns) and not (
            int(self.columns.min()) >= 0 and int(self.columns.max()) < cols
        ):
            raise ValueError(f"columns: expected indices from 0 to {cols - 1}")
        starts = ptr[(ptr > 0) & (ptr < len(self.columns))]
        within_row = torch.ones(max(len(self.columns) - 1, 0), dtype=torch.bool)
        within_row[(starts - 1).cpu()] = False
        if bool((self.columns.long().diff().cpu() <= 0)[within_row].any()):
            raise ValueError("columns: expected ascending indices in every row")


def _packed(
    matrix: Tensor, nonzero: Tensor, block: int | str, min_fill: float, scales: Tensor | None
) -> BlockRowWeight:
    chosen = _choose_block(nonzero, block, min_fill)
    mask, rest = _stored_columns(nonzero, chosen)
    full = mask.shape[0]
    at_row, at_col = mask.nonzero(as_tuple=True)
    blocks = matrix[: full * chosen].reshape(full, chosen, matrix.shape[1])[at_row, :, at_col]
    counts = torch.cat([mask.sum(1), rest.sum(1)])
    columns = torch.cat([at_col, rest.nonzero(as_tuple=True)[1]])
    tail = matrix[full * chosen :]
    return BlockRowWeight(
        values=torch.cat([blocks.reshape(-1), tail[rest]]),
        columns=columns.to(torch.int16 if matrix.shape[1] <= _INT16_COLUMNS else torch.int32),
        row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        shape=(matrix.shape[0], matrix.shape[1]),
        block=chosen,
        scales=None if scales is None else scales.clone(),
    )


def _as_matrix(weight: Tensor, scales: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Tensor) or not (
        weight.is_floating_point() or (weight.dtype is torch.int8 and scales is not None)
    ):
        raise TypeError(
            "weight: expected a floating point tensor, or int8 with scales, got "
            f"{_describe(weight)}"
        )
    if weight.requires_grad:
        raise ValueError("weight requires a gradient: pack weight.detach()")
    if weight.dim() < 2 or any(n != 1 for n in weight.shape[2:]):
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}, expected (out, in) or a 1x1 kernel "
            "(out, in, 1, 1)"
        )
    return weight.reshape(weight.shape[0], weight.shape[1])


def _as_mask(mask: Tensor, weight: Tensor) -> Tensor:
    if mask.dtype is not torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask: {_describe(mask)}, expected bool of shape {tuple(weight.shape)}")
    return mask


def _stored_as(
    matrix: Tensor, dtype: torch.dtype | None, scales: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The matrix in the type to store it in, and its scales."""
    if dtype is not None and not (dtype.is_floating_point or dtype is torch.int8):
        raise TypeError(f"dtype={dtype}: expected a floating point type or torch.int8")
    if matrix.dtype is torch.int8:
        if dtype not in (None, torch.int8):
            raise ValueError(f"dtype={dtype}: expected None for a weight that is int8")
        scales = None if scales is None else scales.reshape(-1)
        check_scales(torch.int8, scales, matrix.shape[0])
        return matrix, scales
    check_scales(matrix.dtype, scales, matrix.shape[0])
    if dtype is torch.int8:
        return quantize_rows(matrix)
    return (matrix if dtype is None else matrix.to(dtype)), None


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def entry_indices(
    columns: Tensor, row_ptr: Tensor, shape: tuple[int, int], block: int, num_values: int
) -> tuple[Tensor, Tensor]:
    """(row, column) of every stored value; sizes depend on shapes only, so tracing is possible."""
    full = shape[0] // block
    entries = columns.shape[0]
    full_entries = (num_values - entries) // (block - 1) if block > 1 else entries
    ids = torch.repeat_interleave(
        torch.arange(row_ptr.shape[0] - 1, device=row_ptr.device),
        row_ptr.diff(),
        output_size=entries,
    )
    within = torch.arange(block, device=columns.device)
    rows = (ids[:full_entries, None] * block + within).reshape(-1)
    cols = columns.long()
    return (
        torch.cat([rows, ids[full_entries:] + full * (block - 1)]),
        torch.cat([cols[:full_entries, None].expand(-1, block).reshape(-1), cols[full_entries:]]),
    )


def dense_weight(
    values: Tensor, columns: Tensor, row_ptr: Tensor, shape: tuple[int, int], block: int
) -> Tensor:
    """The (out, in) matrix of packed parts; differentiable in `values`."""
    index = entry_indices(columns, row_ptr, shape, block, values.shape[0])
    return values.new_zeros(shape).index_put(index, values)
