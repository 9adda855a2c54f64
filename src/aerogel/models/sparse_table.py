"""An embedding table whose rows keep their nonzero entries only, to look up and to score with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aerogel.kernels import BlockRowWeight, entries_above, gather_rows, spmm
from aerogel.kernels.gather_rows import check_ids

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows scored at a time by `topk`: their scores stay in the cache, the whole matrix never exists.
ITEMS_AT_ONCE = 4096


class SparseEmbeddingTable(nn.Module):
    """Rows in compressed form: values, their columns, and where each row begins.

    A row of `dim` at density d takes d * dim * (value + 1) bytes and a pointer; an empty row is a
    row of zeros.

    Args:
        values: (nonzeros,) float32 or float16.
        columns: (nonzeros,) integers in [0, dim).
        row_ptr: (rows + 1,) int64, from 0 to nonzeros.
        dim: length of a row.
    """

    values: Tensor
    columns: Tensor
    row_ptr: Tensor

    def __init__(self, values: Tensor, columns: Tensor, row_ptr: Tensor, dim: int) -> None:
        super().__init__()
        if not (len(values) == len(columns) == int(row_ptr[-1])):
            raise ValueError(
                f"row_ptr must end at the {len(values)} values and {len(columns)} columns, "
                f"got {int(row_ptr[-1])}"
            )
        check_ids("columns", columns, dim)
        self.dim = dim
        self.register_buffer("values", values)
        self.register_buffer("columns", columns)
        self.register_buffer("row_ptr", row_ptr)
        self._blocks: dict[tuple[int, int], BlockRowWeight] = {}
        self._blocks_of: tuple[int, int] | None = None

    @classmethod
    def from_masked(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> Self:
        """Pack the nonzero entries of a (rows, dim) table.

        Args:
            weight: a trained table whose masked entries are zeros.
            dtype: of the values, float32 or float16. Columns take a byte if dim <= 256, else four.

        Raises:
            ValueError: not a matrix, or another dtype.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight must be (rows, dim), got {tuple(weight.shape)}")
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be float32 or float16, got {dtype}")
        weight = weight.detach()
        rows, dim = weight.shape
        row, column = weight.nonzero(as_tuple=True)
        row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        row_ptr[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        narrow = torch.uint8 if dim <= 256 else torch.int32
        return cls(weight[row, column].to(dtype), column.to(narrow), row_ptr, dim)

    def __len__(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of values, columns and pointers."""
        return sum(part.nbytes for part in (self.values, self.columns, self.row_ptr))

    def forward(self, ids: Tensor) -> Tensor:
        """Dense rows: integers of any shape -> (*ids.shape, dim) float32.

        Raises:
            ValueError: ids out of range.
        """
        # Without the search that a module's attributes take: short lookups are mostly calls.
        parts: Any = self._buffers
        return gather_rows(parts["values"], parts["columns"], parts["row_ptr"], ids, self.dim)

    def dense(self) -> Tensor:
        """The table itself: (rows, dim) float32."""
        return self(torch.arange(len(self), device=self.values.device))

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products with every row: (batch, dim) float32 -> (batch, rows)."""
        return self._scores(queries, 0, len(self))

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Best rows for each query, best first.

        Args:
            queries: (batch, dim) float32.
            k: rows wanted, in [1, rows].

        Returns:
            (batch, k) scores and (batch, k) int64 rows. The score matrix is never held whole.

        Raises:
            ValueError: k out of range, queries of another length.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be in [1, {len(self)}], got {k}")
        best: Tensor | None = None
        rows: Tensor | None = None
        self._check(queries)
        planar = queries.t().contiguous()[None]  # [1, dim, batch]
        for first in range(0, len(self), ITEMS_AT_ONCE):
            block = spmm(planar, self._block(first, min(first + ITEMS_AT_ONCE, len(self))))[0]
            if best is None or rows is None:
                best, rows = block.t().contiguous().topk(min(k, len(block)))
                continue
            enough = best.shape[1] == k
            own, index = _above(block, best[:, -1:]) if enough else _all(block)
            joined, where = torch.cat((best, own), 1), torch.cat((rows, index + first), 1)
            best, order = joined.topk(min(k, joined.shape[1]))
            rows = where.gather(1, order)
        assert best is not None
        assert rows is not None
        return best, rows

    def _scores(self, queries: Tensor, first: int, last: int) -> Tensor:
        self._check(queries)
        return spmm(queries, self._block(first, last), layout="tokens")

    def _check(self, queries: Tensor) -> None:
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must be (batch, {self.dim}), got {tuple(queries.shape)}")

    def _block(self, first: int, last: int) -> BlockRowWeight:
        """Rows as the kernels take them, kept until the values change."""
        source = (self.values.data_ptr(), self.values._version)
        if self._blocks_of != source:
            self._blocks, self._blocks_of = {}, source
        if (first, last) not in self._blocks:
            row_ptr = self.row_ptr[first : last + 1]
            begin, end = int(row_ptr[0]), int(row_ptr[-1])
            wide = torch.int16 if self.dim <= 32767 else torch.int32
            self._blocks[first, last] = BlockRowWeight(
                self.values[begin:end].float(),
                self.columns[begin:end].to(wide),
                row_ptr - begin,
                (last - first, self.dim),
                1,
            )
        return self._blocks[first, last]


def _all(block: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, rows) scores of a (rows, batch) block, and their rows."""
    rows = torch.arange(len(block), device=block.device)
    return block.t(), rows.expand(block.shape[1], -1)


def _above(block: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of a (rows, batch) block above those that a list of the best ends with.

    After the first blocks they are few: looking for them costs less than sorting a block.

    Args:
        block: (rows, batch).
        least: (batch, 1).

    Returns:
        (batch, most of any query) scores, filled up with -inf, and their rows.
    """
    row, query, found = entries_above(block, least[:, 0])
    order = query.argsort(stable=True)
    row, query, found = row[order], query[order], found[order]
    counts = query.bincount(minlength=block.shape[1])
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[query]
    shape = (block.shape[1], int(counts.max()))
    scores = block.new_full(shape, -torch.inf)
    scores[query, place] = found
    rows = torch.zeros(shape, dtype=torch.int64, device=block.device)
    rows[query, place] = row
    return scores, rows
