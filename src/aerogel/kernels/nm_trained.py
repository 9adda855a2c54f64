"""Products of an N:M weight under training, whose values and mask change every step.

Every group keeps as many weights as before, so the packed form stays what it is and only values
and places are written anew before a product, straight from the dense weight and its mask: a small
part of what the product costs, and nothing is allocated.

Which variant is fastest is found in passing, as in `trained`; all give the same bits.

Reference: Fang et al., BDWP, arXiv 2309.13015, which reads weights by groups of inputs forward and
by groups of outputs backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._library import native
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.spmm import output_shape
from aerogel.kernels.trained import Direction, ProductShape, native_fits
from aerogel.kernels.variants import SpmmVariant


def nm_template(rows: int, cols: int, n: int, m: int) -> BlockRowWeight:
    """A packed weight of the first n of every m inputs: the structure of all n:m weights."""
    column = torch.arange(cols)
    columns = column[column % m < n].to(torch.int32)
    return BlockRowWeight(
        values=torch.zeros(rows * len(columns)),
        columns=columns.repeat(rows),
        row_ptr=torch.arange(rows + 1) * len(columns),
        shape=(rows, cols),
        block=1,
    )


class NMProduct(Direction):
    """``x (W m)^T`` or, with ``axis=0``, ``x (W m)`` for a dense W and a mask that keep changing.

    Args:
        shape: (out, in) of W.
        n: kept of every group; a shorter last group keeps n too, or all it has.
        m: group length.
        axis: the groups run along the inputs (1) or the outputs (0), which the product sums over.

    Raises:
        ValueError: not 1 <= n <= m, or another axis.
    """

    def __init__(self, shape: tuple[int, int], n: int, m: int, axis: int = 1) -> None:
        if not 1 <= n <= m:
            raise ValueError(f"n={n}, m={m}: expected 1 <= n <= m")
        if axis not in (0, 1):
            raise ValueError(f"axis={axis}: expected 0 or 1")
        rows, cols = shape if axis == 1 else shape[::-1]
        super().__init__(nm_template(rows, cols, n, m), None)
        self.shape, self.n, self.m, self.axis = shape, n, m, axis

    def __reduce__(self) -> tuple[object, ...]:
        """Copies start without native streams."""
        return NMProduct, (self.shape, self.n, self.m, self.axis)

    def fits(self, *tensors: Tensor | None) -> bool:
        """Whether the native product can read these operands."""
        plain = all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        return plain and native_fits(*tensors)

    def masked(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None
    ) -> Tensor | None:
        """The product, without a gradient.

        Args:
            x: (*, in), or (*, out) with ``axis=0``; `fits`, as all operands.
            weight: (out, in), dense.
            mask: bool of its shape, True = kept.
            bias: of the result's features, or None.

        Returns:
            (*, out), or (*, in) with ``axis=0``; None if the mask is not of this pattern.

        Raises:
            ValueError: shapes that do not fit.
        """
        if weight.shape != self.shape or mask.shape != self.shape or mask.dtype is not torch.bool:
            raise ValueError(
                f"weight: {tuple(weight.shape)}, mask: {mask.dtype} {tuple(mask.shape)}, expected "
                f"{self.shape} and bool"
            )
        rows, cols = self.pattern.shape
        y = x.new_empty(output_shape(x, rows, cols, "tokens"))
        if y.numel() == 0 or cols == 0:
            return None
        # Copies are bound to names: they live until the kernel has read them.
        x, weight, mask = x.contiguous(), weight.contiguous(), mask.contiguous()
        bias = None if bias is None else bias.contiguous()
        shape = self._shape(y.numel() // rows)
        return y if self._run(x, y, bias, shape, self._filling(weight, mask)) else None

    def fill(self, tokens: int, weight: Tensor, mask: Tensor) -> bool:
        """What `masked` does before it multiplies so many vectors, alone; for measuring.

        Returns:
            Whether the mask is of this pattern.
        """
        shape = self._shape(tokens)
        with self._lock:
            stream = self._stream(self._choice(shape).next(), shape)
            return self._filling(weight.contiguous(), mask.contiguous())(stream)

    def _shape(self, tokens: int) -> ProductShape:
        return ProductShape(tokens, 1, "tokens", torch.get_num_threads(), native().isa())

    def _filling(self, weight: Tensor, mask: Tensor) -> Callable[[Any], bool]:
        steps = (self.shape[1], 1) if self.axis == 1 else (1, self.shape[1])
        arrays = (weight.data_ptr(), mask.data_ptr())
        threads = torch.get_num_threads()
        return lambda stream: stream.nm_refill(*arrays, *steps, self.n, self.m, threads)

    def _candidates(self, shape: ProductShape) -> list[SpmmVariant]:
        """Variants whose slabs do not cut groups; one slab where no number of them fits.

        Those that walk single rows are seldom the fastest, and their rows lie so far apart that
        filling them takes up to four times as long.
        """
        cols = self.pattern.shape[1]
        fitting = {
            v if cols % (v.k_blocks * self.m) == 0 else v._replace(k_blocks=1): None
            for v in super()._candidates(shape)
            if v.groups > 1
        }
        return list(fitting)
