"""2:4 weights in the bytes that sparse tensor cores read: half the values, and two bits a place.

Two forms. `"2:4"`: of every 4 consecutive inputs 2 are stored. `"pairs"`, for 4-bit integers: of
every 8 consecutive inputs, seen as 4 pairs, 2 pairs are stored. Either way a group has an index of
4 bits, the places (0 to 3, ascending) of what it stores.

| values | bits of a group | against dense values of the type |
| --- | --- | --- |
| float16, bfloat16 | 2 * 16 + 4 of 64 | 0.5625 |
| int8 | 2 * 8 + 4 of 32 | 0.625 |
| 4-bit integers in pairs | 4 * 4 + 4 of 32 | 0.625 |

For products on this machine `block_rows()` gives the weight to `gemv`, `spmm` and `runtime.save`.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.gemv import gemv
from aerogel.kernels.values import check_scales, largest_level

NMForm = Literal["2:4", "pairs"]

_PLACES = 4  # of a group; 2 are stored
_STORED = 2
_NIBBLE = 4
# As many vectors as `gemv` takes without reading the weight again on every machine.
_FEW_VECTORS = 8


@dataclass(frozen=True, eq=False)
class NM24Weight:
    """A weight matrix as half of its values and an index.

    Attributes:
        values: (out, in / 2) floating point or int8; 4-bit integers as (out, in / 4) uint8, the
            first of two in the low bits.
        index: uint8, 4 bits a group, row by row, the first of two groups in the low bits.
        shape: (out, in).
        form: "2:4" or "pairs".
        bits: of an integer value, 8 or 4; None for floating point.
        scales: (out,) float32 for integers, else None.
    """

    values: Tensor
    index: Tensor
    shape: tuple[int, int]
    form: NMForm = "2:4"
    bits: int | None = None
    scales: Tensor | None = None

    @staticmethod
    def pack(
        weight: Tensor,
        mask: Tensor,
        form: NMForm = "2:4",
        *,
        bits: int | None = None,
        scales: Tensor | None = None,
    ) -> NM24Weight:
        """Packs what a mask keeps.

        Args:
            weight: (out, in), floating point, or int8 levels with `bits` and `scales`.
            mask: bool of its shape, True = kept; exactly 2 of every 4 (pairs of every 8).
            form: "2:4" or "pairs".
            bits: 8, or 4 for levels from -7 to 7, of which two share a byte.
            scales: (out,) float32 for levels.

        Raises:
            ValueError: another shape, a mask that is not of this form, levels that do not fit.
        """
        _check_form(form)
        if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype is not torch.bool:
            raise ValueError(
                f"weight {tuple(weight.shape)} and mask {mask.dtype} {tuple(mask.shape)}: expected "
                "(out, in) and bool of the same shape"
            )
        rows, columns = weight.shape
        size = _size(form)
        if columns % (_PLACES * size):
            raise ValueError(f"weight: {columns} inputs, expected a multiple of {_PLACES * size}")
        _check_levels(weight, bits, scales)
        kept = mask.reshape(-1, _PLACES, size)
        exact = (kept.sum(1) == _STORED).all() and bool((kept == kept[..., :1]).all())
        if not bool(exact):
            raise ValueError(f"mask: expected exactly 2 of 4 kept in every group ({form})")
        places = kept[..., 0].nonzero()[:, 1].reshape(-1, _STORED)
        values = weight.detach()[mask].reshape(rows, columns // 2)
        return NM24Weight(
            _nibbles(values) if bits == _NIBBLE else values.clone(),
            _nibbles((places[:, 0] | places[:, 1] << 2).reshape(1, -1))[0],
            (rows, columns),
            form,
            bits,
            None if scales is None else scales.reshape(-1).clone(),
        )

    def levels(self) -> Tensor:
        """The dense (out, in) values as stored: without scales, 4-bit integers as int8."""
        columns = self.shape[1]
        values = self.values
        if self.bits == _NIBBLE:
            values = _from_nibbles(values, columns // 2, signed=True)
        dense = values.new_zeros(self.shape)
        dense[self.mask()] = values.reshape(-1)
        return dense

    def mask(self) -> Tensor:
        """The stored places, bool (out, in)."""
        rows, columns = self.shape
        size = _size(self.form)
        groups = rows * columns // (_PLACES * size)
        code = _from_nibbles(self.index[None], groups, signed=False)[0].long()
        kept = torch.zeros(groups, _PLACES, dtype=torch.bool, device=code.device)
        kept.scatter_(1, torch.stack([code & 3, code >> 2], 1), True)
        return kept.repeat_interleave(size, dim=1).reshape(self.shape)

    def unpack(self) -> Tensor:
        """The dense (out, in) weight: floating point, or levels times scales in float32."""
        dense = self.levels()
        return dense if self.scales is None else dense.float() * self.scales[:, None]

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias.

        A few float32 vectors take the sparse kernel, which reads fewer bytes; many take the dense
        product, which is faster than decoding. Integer vectors are multiplied by the levels and
        summed exactly, without scales.

        Args:
            x: (*, in), floating point, or integers for a weight of levels.
            bias: (out,) or None; not with integers.

        Returns:
            (*, out) of x's type; int32 for integers.
        """
        if not x.is_floating_point():
            if self.bits is None or bias is not None:
                raise ValueError(f"x is {x.dtype}: expected a weight of levels, and no bias")
            return (x.long() @ self.levels().long().t()).int()
        few = x.numel() <= _FEW_VECTORS * self.shape[1]
        if few and x.dtype is torch.float32 and x.device.type == "cpu":
            return gemv(x, self._rows, bias)
        return F.linear(x, self.unpack().to(x.dtype), bias)

    def block_rows(self) -> BlockRowWeight:
        """The same weight as `gemv`, `spmm`, plans and `runtime.save` take it (levels as int8)."""
        return BlockRowWeight.pack(self.levels(), 1, scales=self.scales, mask=self.mask())

    @cached_property
    def _rows(self) -> BlockRowWeight:
        return self.block_rows()

    def to_torch_semi_structured(self) -> Tensor:
        """The weight for torch's 2:4 kernels, in float16 unless it is bfloat16; on CUDA only.

        Raises:
            ValueError: it is not on a CUDA device, or in pairs.
        """
        if self.values.device.type != "cuda" or self.form != "2:4":
            raise ValueError(
                f"torch's 2:4 kernels need a '2:4' weight on cuda, got {self.form!r} on "
                f"{self.values.device}"
            )
        dense = self.unpack()
        low = dense if dense.dtype in (torch.float16, torch.bfloat16) else dense.half()
        return cast(Tensor, torch.sparse.to_sparse_semi_structured(low))

    @property
    def nbytes(self) -> int:
        """Bytes of values, index and scales."""
        parts = (self.values, self.index, self.scales)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors to save: values, index, shape, form (group size 4 or 8), bits, scales."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {
            **scales,
            "values": self.values,
            "index": self.index,
            "shape": torch.tensor(self.shape),
            "group": torch.tensor(_PLACES * _size(self.form)),
            "bits": torch.tensor(self.bits or 0),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> NM24Weight:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: a part is missing, or the parts contradict each other.
        """
        missing = {"values", "index", "shape", "group", "bits"} - tensors.keys()
        if missing:
            raise ValueError(f"2:4 weight: missing {', '.join(sorted(missing))}")
        rows, columns = (int(n) for n in tensors["shape"].tolist())
        group, bits = int(tensors["group"]), int(tensors["bits"]) or None
        if group not in (4, 8) or rows < 0 or columns < 0 or columns % group:
            raise ValueError(f"2:4 weight: groups of {group} in shape {(rows, columns)}")
        form: NMForm = "2:4" if group == _PLACES else "pairs"
        weight = NM24Weight(
            tensors["values"], tensors["index"], (rows, columns), form, bits, tensors.get("scales")
        )
        weight.check()
        return weight

    def check(self) -> None:
        """Raises ValueError unless the parts describe a weight."""
        rows, columns = self.shape
        groups = rows * columns // (_PLACES * _size(self.form))
        width = -(-columns // 4) if self.bits == _NIBBLE else columns // 2
        kind = {_NIBBLE: torch.uint8, 8: torch.int8}.get(self.bits or 0)
        if self.values.shape != (rows, width) or (
            not self.values.is_floating_point() if self.bits is None else self.values.dtype != kind
        ):
            raise ValueError(
                f"values: {self.values.dtype} {tuple(self.values.shape)} do not fit {self.shape} "
                f"with bits={self.bits}"
            )
        check_scales(torch.int8 if self.bits else self.values.dtype, self.scales, rows)
        if self.index.dtype is not torch.uint8 or self.index.shape != (-(-groups // 2),):
            raise ValueError(f"index: expected uint8 ({-(-groups // 2)},)")
        code = _from_nibbles(self.index[None], groups, signed=False)[0]
        if bool(((code & 3) >= (code >> 2)).any()):
            raise ValueError("index: expected two ascending places in every group")


NM24Tensor = NM24Weight
"""The same class by the name that speaks of one tensor rather than of a layer's weight."""


def _size(form: str) -> int:
    return 2 if form == "pairs" else 1


def _check_form(form: str) -> None:
    if form not in get_args(NMForm):
        raise ValueError(f"form={form!r}: expected one of {get_args(NMForm)}")


def _check_levels(weight: Tensor, bits: int | None, scales: Tensor | None) -> None:
    if bits is None:
        if not weight.is_floating_point():
            raise ValueError(f"weight is {weight.dtype}: expected floating point, or bits")
        check_scales(weight.dtype, scales, len(weight))
        return
    if bits not in (_NIBBLE, 8) or weight.dtype is not torch.int8:
        raise ValueError(f"bits={bits}, weight {weight.dtype}: expected 8 or 4, and int8 levels")
    check_scales(torch.int8, None if scales is None else scales.reshape(-1), len(weight))
    top = largest_level(bits)
    if weight.numel() and int(weight.short().abs().max()) > top:
        raise ValueError(f"weight: expected levels from {-top} to {top} for bits={bits}")


def _nibbles(values: Tensor) -> Tensor:
    """(rows, n) integers of 4 bits -> (rows, ceil(n / 2)) uint8."""
    low = (values.to(torch.int16) & 15).to(torch.uint8)
    low = F.pad(low, (0, low.shape[1] % 2))
    return low[:, 0::2] | low[:, 1::2] << 4


def _from_nibbles(packed: Tensor, count: int, *, signed: bool) -> Tensor:
    """(rows, bytes) -> (rows, count): int8 from -8 to 7 if signed, else uint8."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :count]
    if not signed:
        return pairs
    wide = pairs.to(torch.int8)
    return torch.where(wide > 7, wide - 16, wide)
