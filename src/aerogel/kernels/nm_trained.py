"""Products of an N:M weight under training, whose values and masks change every step.

Every group keeps as many weights as before, so the packed form stays what it is and only values and
places are written anew. `choose_masks` does that for both products of a step while it chooses the
masks, from one reading of the dense weight; a product that finds nothing packed of the weight and
mask it is given packs them itself. Nothing is allocated either way.

Which variant is fastest is found in passing, as in `trained`; all give the same bits.

Reference: Fang et al., BDWP, arXiv 2309.13015, which reads weights by groups of inputs forward and
by groups of outputs backward, and generates both after the update ("pre-generation").
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels._library import native
from aerogel.kernels.spmm import output_shape
from aerogel.kernels.trained import Direction, ProductShape, native_fits
from aerogel.kernels.variants import SpmmVariant, StoredSize, spmm_variants

LONGEST_GROUP = 32
"""Entries of a group that the native kernel takes (`kNmPackLongest`)."""
_PROBED = 3  # outputs whose packed weights are compared before a product


class _Packed(NamedTuple):
    """What a stream holds: this weight through this mask, as they were in these versions.

    The tensors are held, so that no others can come to lie at their addresses.
    """

    stream: Any
    weight: Tensor
    mask: Tensor
    versions: tuple[int, int]

    def is_of(self, stream: Any, weight: Tensor, mask: Tensor) -> bool:
        return (
            self.stream is stream
            and self.weight.data_ptr() == weight.data_ptr()
            and self.mask.data_ptr() == mask.data_ptr()
            and self.versions == (weight._version, mask._version)
        )


class NMProduct(Direction):
    """``x (W m)^T`` or, with ``axis=0``, ``x (W m)`` for a dense W and a mask that keep changing.

    What `choose_masks` or an earlier product has packed is used again while the version counters
    of weight and mask stay. Changes of ``weight.data`` do not count there, nor for autograd; those
    that reach every output, such as another network's weights or a factor, are noticed all the
    same, because some outputs are compared before each product.

    Args:
        shape: (out, in) of W.
        n: kept of every group; a shorter last group keeps n too, or all it has.
        m: group length, at most `LONGEST_GROUP`.
        axis: the groups run along the inputs (1) or the outputs (0), which the product sums over.

    Raises:
        ValueError: not 1 <= n <= m <= `LONGEST_GROUP`, or another axis.
    """

    def __init__(self, shape: tuple[int, int], n: int, m: int, axis: int = 1) -> None:
        if not 1 <= n <= m <= LONGEST_GROUP:
            raise ValueError(f"n={n}, m={m}: expected 1 <= n <= m <= {LONGEST_GROUP}")
        if axis not in (0, 1):
            raise ValueError(f"axis={axis}: expected 0 or 1")
        super().__init__(shape if axis == 1 else shape[::-1])
        self.shape, self.n, self.m, self.axis = shape, n, m, axis
        self._packed: _Packed | None = None
        self._last: ProductShape | None = None  # the shape of the latest product
        self._probe = 0

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
        rows, cols = self.size
        y = x.new_empty(output_shape(x, rows, cols, "tokens"))
        if y.numel() == 0 or cols == 0:
            return None
        # Copies are bound to names: they live until the kernel has read them.
        x, weight, mask = x.contiguous(), weight.contiguous(), mask.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._last = shape = self._shape(y.numel() // rows)
        return y if self._run(x, y, bias, shape, lambda s: self._fill(s, weight, mask)) else None

    def _fill(self, stream: Any, weight: Tensor, mask: Tensor) -> bool:
        """Packs a weight through a mask, unless the stream holds just that."""
        packed, self._packed = self._packed, None
        if packed and packed.is_of(stream, weight, mask) and self._still_holds(stream, weight):
            self._packed = packed
            return True
        fits = _pack_ways(self, weight, {self.axis: stream}, {self.axis: mask}, given=True)
        if fits:
            self._note_packed(stream, weight, mask)
        return fits

    def _still_holds(self, stream: Any, weight: Tensor) -> bool:
        self._probe += 1
        steps = (self.shape[1], 1) if self.axis == 1 else (1, self.shape[1])
        outputs = self.size[0]
        return all(
            native().nm_holds(stream, weight.data_ptr(), *steps, (self._probe + i) % outputs)
            for i in range(0, outputs, -(-outputs // _PROBED))
        )

    def _note_packed(self, stream: Any, weight: Tensor, mask: Tensor) -> None:
        weight = weight.detach()
        if not (weight.is_inference() or mask.is_inference()):
            self._packed = _Packed(stream, weight, mask, (weight._version, mask._version))

    def _next_stream(self) -> Any:
        """The stream that the next product will read, if it is like the latest one."""
        if self._last is None:
            return None
        shape = self._last._replace(threads=torch.get_num_threads(), isa=native().isa())
        return self._stream(self._choice(shape).next(), shape)

    def _shape(self, tokens: int) -> ProductShape:
        return ProductShape(tokens, 1, "tokens", torch.get_num_threads(), native().isa())

    def _candidates(self, shape: ProductShape) -> list[SpmmVariant]:
        """Variants whose slabs do not cut groups; one slab where no number of them fits.

        Those that walk single rows are seldom the fastest, and their rows lie so far apart that
        packing them takes up to four times as long.
        """
        rows, cols = self.size
        stored = rows * (cols // self.m * self.n + min(self.n, cols % self.m))
        size = StoredSize(self.size, 1, stored, stored)
        fitting = {
            v if cols % (v.k_blocks * self.m) == 0 else v._replace(k_blocks=1): None
            for v in spmm_variants(size, shape.columns, shape.layout, shape.threads)
            if v.groups > 1
        }
        return list(fitting)

    def _pack(self, variant: SpmmVariant, columns: int) -> Any:
        return native().nm_packed(*self.size, self.n, self.m, native().SpmmVariant(*variant))


def choose_masks(
    weight: Tensor,
    forward: NMProduct,
    backward: NMProduct,
    forward_mask: Tensor | None,
    backward_mask: Tensor | None,
) -> None:
    """Write into masks which weights have the largest magnitudes, and pack these for the products.

    Of equals the first are kept, as by `nm_mask`; the weight is read once for both. The products
    that come next, if they are like the latest ones, find their weights packed.

    Args:
        weight: (out, in), contiguous; `NMProduct.fits`.
        forward: the product along the inputs (axis 1).
        backward: along the outputs (axis 0), of the same weight and pattern.
        forward_mask: (out, in) contiguous bool, overwritten; None leaves the forward product alone.
        backward_mask: the same for the backward product.

    Raises:
        ValueError: other shapes or types.
    """
    masks = {p: mask for p, mask in ((forward, forward_mask), (backward, backward_mask))
             if mask is not None}  # fmt: skip
    for tensor, dtype in ((weight, torch.float32), *((m, torch.bool) for m in masks.values())):
        if tensor.shape != forward.shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{tensor.dtype} {tuple(tensor.shape)}: expected contiguous {dtype} {forward.shape}"
            )
    with ExitStack() as held:
        for product in masks:
            held.enter_context(product._lock)
            product._packed = None
        streams = {product.axis: product._next_stream() for product in masks}
        by_axis = {product.axis: mask for product, mask in masks.items()}
        _pack_ways(forward, weight, streams, by_axis, given=False)
        for product, mask in masks.items():
            torch.autograd.graph.increment_version(mask)
            if streams[product.axis] is not None:
                product._note_packed(streams[product.axis], weight, mask)


def _pack_ways(
    like: NMProduct, weight: Tensor, streams: dict[int, Any], masks: dict[int, Tensor], given: bool
) -> bool:
    """`nm_pack` of csrc/nm_pack.h; streams and masks by axis."""
    ways: list[Any] = []
    for axis in (1, 0):
        ways += [streams.get(axis), masks[axis].data_ptr() if axis in masks else 0]
    threads = torch.get_num_threads()
    fits: bool = native().nm_pack_ways(
        weight.data_ptr(), *like.shape, like.n, like.m, *ways, given, threads
    )
    return fits
