"""The values between imported operators: tensors, and the small numbers that shapes are made of.

ONNX computes shapes with tensors. Here what `Shape` gives stays Python numbers and flat lists, and
the operators that shapes pass through work on either kind. So a graph of any input size is traced
by `torch.export` without a single data-dependent value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# No tensor that an operator makes out of a few numbers is larger; a file that asks is damaged.
MAX_ELEMENTS = 1 << 31

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_host(value: Any) -> bool:
    """Whether a value is numbers rather than a tensor."""
    return isinstance(value, (*_NUMBERS, list, tuple))


def as_tensor(value: Any, like: Any = None) -> Tensor:
    """A value as a tensor; numbers take the dtype of `like` where it is a tensor."""
    if isinstance(value, Tensor):
        return value
    dtype = like.dtype if isinstance(like, Tensor) else None
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, torch.SymInt) for number in numbers):
        parts = [torch.scalar_tensor(number, dtype=dtype or torch.int64) for number in numbers]
        return torch.stack(parts) if isinstance(value, list | tuple) else parts[0]
    if value == []:
        dtype = dtype or torch.int64
    return torch.tensor(value, dtype=dtype)


def to_list(value: Any) -> list[Any]:
    """Numbers in a list; a tensor's are read, which no export can follow."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def to_ints(value: Any) -> list[Any]:
    """Like `to_list`, for sizes, axes and positions."""
    return [n if isinstance(n, torch.SymInt) else int(n) for n in to_list(value)]


def to_int(value: Any) -> Any:
    """One whole number."""
    (number,) = to_ints(value)
    return number


def broadcast(function: Callable[..., Any], *values: Any) -> Any:
    """Apply a function of numbers to numbers and lists, lengths of one repeated."""
    sizes = {len(value) for value in values if isinstance(value, list | tuple)}
    if not sizes:
        return function(*values)
    size = max(sizes) if sizes <= {1, max(sizes)} else 0
    if 0 in sizes:
        size = 0
    elif size == 0:
        raise ValueError(f"lists of lengths {sorted(sizes)} cannot be combined")
    rows = [
        (list(value) * size if len(value) == 1 else list(value))[:size]
        if isinstance(value, list | tuple)
        else [value] * size
        for value in values
    ]
    return [function(*each) for each in zip(*rows, strict=True)]


def check_size(sizes: Sequence[Any], what: str) -> None:
    """Refuse tensors that only a damaged or hostile file can mean.

    Raises:
        ValueError: A size is negative, or there are more elements than `MAX_ELEMENTS`.
    """
    known = [size for size in sizes if isinstance(size, int)]
    if any(size < 0 for size in known) or math.prod(known) > MAX_ELEMENTS:
        raise ValueError(f"{what} would have the shape {list(sizes)}")
