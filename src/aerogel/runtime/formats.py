"""How one tensor lies in a safetensors file: as it is, or with its zeros as bits.

A sparse tensor becomes a few parts, named as in the `compressed-tensors` project:

| layout              | parts (key suffix)                           | key prefix of `fc.weight` |
| ------------------- | -------------------------------------------- | ------------------------- |
| `dense`             | the tensor itself                            | `fc.weight` (the key)     |
| `sparse-bitmask`    | compressed, bitmask, shape, row_offsets      | `fc`                      |
| `sparse-24-bitmask` | compressed, bitmask, shape                   | `fc`                      |
| `flat-bitmask`      | compressed, bitmask, shape                   | `fc.weight`               |

- `compressed`: the kept values in row-major order; 1-D, for 2:4 `(rows, columns / 2)`.
- `bitmask`: uint8, one bit an element, 1 = kept, the lowest bit first. `(*shape[:-1],
  ceil(shape[-1] / 8))`: every row begins on a new byte. Flat: `ceil(numel / 8)` bytes in one run.
- `shape`: int64, the dense shape; 1-D, for 2:4 a column.
- `row_offsets`: int64, where each row begins in `compressed`.

`flat-bitmask` is aerogel's own. Padded rows and eight bytes of offset a row cost more than the
zeros give back when rows are narrow: a 1x1 convolution's last dimension is a single element.

A zero is what compares equal to zero. That includes -0.0, which multiplying weights by a mask
leaves in half of the pruned places; a sparse layout gives it back as +0.0. Everything else, NaN
and infinities too, comes back bit for bit. A kept element may be zero: then the bitmask is a mask.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DENSE = "dense"
BITMASK = "sparse-bitmask"
BITMASK_24 = "sparse-24-bitmask"
FLAT = "flat-bitmask"
LAYOUTS = (DENSE, BITMASK, BITMASK_24, FLAT)

PARTS = {
    DENSE: ("",),
    BITMASK: ("compressed", "bitmask", "shape", "row_offsets"),
    BITMASK_24: ("compressed", "bitmask", "shape"),
    FLAT: ("compressed", "bitmask", "shape"),
}

# A layout other tools can read is preferred to a smaller one that costs at most this much less.
INTEROPERABLE_SLACK = 1.02
# What three or four more entries add to the file's JSON header.
HEADER_BYTES = 320
# numpy, torch and the file format all count bytes in signed 64-bit integers.
MAX_ELEMENTS = 2**55

# Whether a byte of a bitmask, two groups of four, keeps more than two in one of them.
_BREAKS_24 = np.array([max((b & 15).bit_count(), (b >> 4).bit_count()) > 2 for b in range(256)])
# Types in which a lone sign bit means -0.0.
_SIGNED_ZERO = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2)
)  # fmt: skip
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckpointError(ValueError):
    """A file is not a checkpoint aerogel can read; the message says where it breaks the format."""


@dataclass(frozen=True)
class Encoded:
    """One tensor in one layout: its parts by key suffix, and how many elements are kept."""

    layout: str
    parts: dict[str, Tensor]
    kept: int


def part_keys(name: str, layout: str) -> dict[str, str]:
    """The file's keys of tensor `name` in `layout`, by part."""
    if layout == DENSE:
        return {"": name}
    prefix = name if layout == FLAT else name.removesuffix(".weight")
    return {part: f"{prefix}.{part}" for part in PARTS[layout]}


def raw(tensor: Tensor) -> np.ndarray:
    """A contiguous CPU tensor's memory as a numpy array of integers, without a copy."""
    array: np.ndarray = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
    return array


def nonzero(tensor: Tensor) -> np.ndarray:
    """A bool array, True where a contiguous CPU tensor is not zero; NaN is not zero."""
    bits = raw(tensor)
    # Compared as integers, since not every narrow float type can be compared as what it is.
    return np.asarray(bits << 1 != 0 if tensor.dtype in _SIGNED_ZERO else bits != 0)


def is_24(kept: np.ndarray, count: int) -> bool:
    """Whether at most two of every four consecutive elements of each row are kept."""
    if kept.ndim != 2 or kept.shape[1] % 4 or 2 * count > kept.size:
        return False
    return not _BREAKS_24[np.packbits(kept, axis=-1, bitorder="little")].any()


def candidates(name: str, tensor: Tensor, kept: np.ndarray, count: int) -> dict[str, int]:
    """The layouts `tensor` can be stored in, and the bytes each takes, header included.

    Args:
        name: its name in the state dict.
        tensor: a CPU tensor.
        kept: bool array of its shape, True where a value is stored.
        count: the number of ones in `kept`.
    """
    item, size = tensor.element_size(), tensor.numel()
    sizes = {DENSE: size * item}
    if tensor.ndim == 0 or size == 0:
        return sizes
    rows, width = size // tensor.shape[-1], tensor.shape[-1]
    fixed = HEADER_BYTES + 8 * tensor.ndim
    # compressed-tensors names every sparse tensor "<prefix>.weight" when it reads one.
    if name.endswith(".weight"):
        if is_24(kept, count):
            # Groups with fewer than two are filled up, which `choose` only allows on request.
            sizes[BITMASK_24] = size // 2 * item + rows * -(-width // 8) + fixed
        if tensor.ndim >= 2:
            sizes[BITMASK] = count * item + rows * (-(-width // 8) + 8) + fixed
    sizes[FLAT] = count * item + -(-size // 8) + fixed
    return sizes


def choose(sizes: Mapping[str, int], format: str, *, full_24: bool, masked: bool) -> list[str]:
    """Layouts from most to least wanted.

    "auto" takes the smallest, unless a portable one is about as small. A tensor that carries a
    mask is stored as bits whatever that costs (1/32 of float32), because a dense layout has no
    place for a kept zero; and 2:4 must then not invent kept elements to fill up its groups.
    """
    if format != "auto":
        return [layout for layout in (format, DENSE) if layout in sizes]
    least = min(sizes.values())

    def cost(layout: str) -> tuple[bool, float]:
        portable = layout != FLAT and sizes[layout] <= least * INTEROPERABLE_SLACK
        return masked and layout == DENSE, least - 1 if portable else sizes[layout]

    return sorted((layout for layout in sizes if layout != BITMASK_24 or full_24), key=cost)


def encode(tensor: Tensor, kept: np.ndarray, count: int, layout: str) -> Encoded:
    """Lay a contiguous CPU tensor out; `kept` is its bool mask and has `count` ones."""
    if layout == DENSE:
        return Encoded(DENSE, {"": tensor}, count)
    if layout == BITMASK_24:
        kept = fill_24(kept)
    packed = np.packbits(kept.reshape(-1) if layout == FLAT else kept, axis=-1, bitorder="little")
    values = torch.from_numpy(raw(tensor)[kept]).view(tensor.dtype)
    parts = {
        "compressed": values,
        "bitmask": torch.from_numpy(packed),
        "shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if layout == BITMASK_24:
        parts["compressed"] = values.reshape(tensor.shape[0], -1)
        parts["shape"] = parts["shape"].reshape(-1, 1)
    if layout == BITMASK:
        parts["row_offsets"] = torch.from_numpy(_row_offsets(kept))
    return Encoded(layout, parts, count)


def _row_offsets(kept: np.ndarray) -> np.ndarray:
    counts = np.count_nonzero(kept, axis=-1).astype(np.int64)
    # Along the first axis only, as compressed-tensors does for tensors of any rank.
    return np.asarray(np.cumsum(counts, axis=0) - counts) if counts.ndim else counts * 0


def fill_24(kept: np.ndarray) -> np.ndarray:
    """Complete every group of four to exactly two kept elements, the earliest zeros first."""
    groups = kept.reshape(-1, 4)
    room = 2 - np.add.reduce(groups, axis=1, dtype=np.int8)
    if not room.any():
        return kept
    zero_rank = np.cumsum(~groups, axis=1, dtype=np.int8)
    return np.asarray((groups | (zero_rank <= room[:, None])).reshape(kept.shape))


def checked_shape(values: list[int], where: str) -> tuple[int, ...]:
    """A shape read from a file, refused where it is negative or beyond any memory."""
    if len(values) > 64 or any(v < 0 for v in values):
        raise CheckpointError(f"{where}: shape {values[:8]} is not a tensor's shape")
    if math.prod(max(v, 1) for v in values) > MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape {values[:8]} has more elements than any memory")
    return tuple(values)


def sparse_shape(part: Tensor, where: str) -> tuple[int, ...]:
    """The dense shape held by the part `shape`."""
    if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
        raise CheckpointError(f"{where}: its part 'shape' has dtype {part.dtype}, not integers")
    if not 1 <= part.numel() <= 64:
        raise CheckpointError(f"{where}: its part 'shape' has {part.numel()} entries")
    return checked_shape([int(v) for v in part.reshape(-1).tolist()], where)


def layout_of(parts: Collection[str], shape: Tensor) -> str:
    """The layout of a sparse tensor another program wrote, by which parts there are."""
    if "row_offsets" in parts:
        return BITMASK
    return BITMASK_24 if shape.ndim == 2 else FLAT


def decode(parts: Mapping[str, Tensor], layout: str, where: str) -> tuple[Tensor, np.ndarray]:
    """Rebuild a dense tensor and its mask from sparse parts.

    The dense size is checked against the bitmask's before anything is allocated, so the result is
    never larger than 8 elements for each byte that is really there.

    Args:
        parts: tensors by part name, as `part_keys` names them.
        layout: one of `LAYOUTS` except dense.
        where: how to name the tensor in errors.

    Returns:
        The tensor, and a bool array of its shape, True = kept.

    Raises:
        CheckpointError: the parts contradict each other.
    """
    shape = sparse_shape(parts["shape"], where)
    values, packed = parts["compressed"], parts["bitmask"]
    numel, width = math.prod(shape), shape[-1]
    expected = (-(-numel // 8),) if layout == FLAT else (*shape[:-1], -(-width // 8))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise CheckpointError(
            f"{where}: its bitmask is {packed.dtype} {tuple(packed.shape)}, "
            f"but shape {shape} needs torch.uint8 {expected}"
        )
    bits = np.unpackbits(
        packed.numpy(), axis=-1, count=width if layout != FLAT else numel, bitorder="little"
    )
    kept = bits.view(np.bool_).reshape(shape)
    count = int(np.count_nonzero(kept))
    if count != values.numel():
        raise CheckpointError(
            f"{where}: its bitmask has {count} ones but there are {values.numel()} values"
        )
    if layout == BITMASK:
        _check_row_offsets(parts["row_offsets"], kept, where)
    dense = torch.zeros(shape, dtype=values.dtype)
    raw(dense)[kept] = raw(values.contiguous()).reshape(-1)
    return dense, kept


def _check_row_offsets(offsets: Tensor, kept: np.ndarray, where: str) -> None:
    expected = _row_offsets(kept)
    if offsets.is_floating_point() or not np.array_equal(offsets.numpy(), expected):
        raise CheckpointError(f"{where}: its row_offsets do not match its bitmask")
