"""ONNX operators over neighbourhoods of pixels: padding, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.runtime.exchange.operators import OnnxNode, Value, register
from aerogel.runtime.exchange.values import as_tensor, check_size, to_ints, to_list

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def is_even(pads: Sequence[int]) -> bool:
    """Whether every axis is padded alike on both sides."""
    half = len(pads) // 2
    return list(pads[:half]) == list(pads[half:])


def explicit_pads(node: OnnxNode, spatial: int) -> list[int] | None:
    """(before each axis ..., after each axis ...); None where they follow from the input's size."""
    kind = node.text("auto_pad", "NOTSET")
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        return None
    if kind not in ("NOTSET", "VALID"):
        node.fail(f"attribute auto_pad = {kind!r}")
    given = node.ints("pads", None) if kind == "NOTSET" else None
    pads: list[int] = [0] * 2 * spatial if given is None else given
    if len(pads) != 2 * spatial or min(pads) < 0:
        node.fail(f"attribute pads = {pads}, expected {2 * spatial} numbers from 0")
    return pads


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """With margins around the last axes: (before each ..., after each ...)."""
    half = len(pads) // 2
    pairs = [(pads[i], pads[half + i]) for i in range(half)]
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


def pad_same(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    upper: bool,
    value: float = 0.0,
) -> Tensor:
    """Padded so that there is one window for every `stride` pixels, as TensorFlow does."""
    before, after = [], []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        lacking = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = lacking // 2, lacking - lacking // 2
        before.append(small if upper else large)
        after.append(large if upper else small)
    return padded(x, [*before, *after], value)


def pad(x: Any, pads: Any, mode: str, value: Any, axes: Any) -> Tensor:
    """Margins around any axes; negative ones cut."""
    x, pads, value = as_tensor(x), to_ints(pads), to_list(value)[0]
    axes = range(x.dim()) if axes is None else [axis % x.dim() for axis in to_ints(axes)]
    half = len(pads) // 2
    pairs = {axis: (pads[i], pads[half + i]) for i, axis in enumerate(axes)}
    check_size(
        [n + max(sum(pairs.get(i, (0, 0))), 0) for i, n in enumerate(x.shape)], "Pad's result"
    )
    if mode == "constant":
        flat = [n for axis in reversed(range(x.dim())) for n in pairs.get(axis, (0, 0))]
        return F.pad(x, flat, value=value)
    used = [axis for axis, pair in pairs.items() if pair != (0, 0)]
    # torch reflects and repeats at the last axes only, of a tensor with a batch and channels.
    first = min(used, default=x.dim())
    flat = [n for axis in reversed(range(first, x.dim())) for n in pairs.get(axis, (0, 0))]
    if not used:
        return x
    lead = x.shape[:first]
    y = F.pad(x.reshape(1, -1, *x.shape[first:]), flat, mode=mode)
    return y.reshape(*lead, *y.shape[2:])


@register("Pad")
def _pad(node: OnnxNode) -> Value:
    mode = node.text("mode", "constant")
    if mode not in _PAD_MODES:
        node.fail(f"attribute mode = {mode!r}")
    value = node.real("value", 0.0) if node.opset < 11 else node.number(2)
    pads = node.numbers(1, "pads")
    args = _PAD_MODES[mode], 0.0 if value is None else value, node.numbers(3)
    return node.call(pad, node.tensor(0), pads, *args)


def _window(node: OnnxNode) -> tuple[list[int], list[int], list[int], int]:
    kernel = node.ints("kernel_shape", [])
    spatial = len(kernel)
    if spatial not in _MAX_POOLS or min(kernel) < 1:
        node.fail(f"attribute kernel_shape = {kernel}, expected 1 to 3 positive numbers")
    strides, dilations = node.ints("strides", [1] * spatial), node.ints("dilations", [1] * spatial)
    if len(strides) != spatial or min(strides) < 1 or len(dilations) != spatial:
        node.fail(f"attributes strides = {strides}, dilations = {dilations}")
    return kernel, strides, dilations, spatial


@register("MaxPool")
def _max_pool(node: OnnxNode) -> Value:
    node.only_first_output()
    kernel, strides, dilations, spatial = _window(node)
    x, pads = node.tensor(0), explicit_pads(node, spatial)
    if pads is None:
        upper = node.text("auto_pad", "NOTSET") == "SAME_UPPER"
        x = node.call(pad_same, x, kernel, strides, dilations, upper, -math.inf)
        pads = [0] * 2 * spatial
    elif not is_even(pads) or any(2 * p > k for p, k in zip(pads, kernel * 2, strict=True)):
        x, pads = node.call(padded, x, pads, -math.inf), [0] * 2 * spatial
    ceil = bool(node.integer("ceil_mode", 0))
    return node.call(
        _MAX_POOLS[spatial], x, kernel, strides, pads[:spatial], dilations, ceil_mode=ceil
    )


def average_inside(x: Tensor, kernel: Any, strides: Any, pads: Sequence[int], ceil: bool) -> Tensor:
    """Averages over what of each window lies inside, for paddings that differ from side to side."""
    pool = _AVG_POOLS[len(kernel)]
    inside = torch.ones_like(x[:1, :1])
    sums, shares = (pool(padded(y, pads), kernel, strides, 0, ceil) for y in (x, inside))
    return sums / shares


@register("AveragePool")
def _average_pool(node: OnnxNode) -> Value:
    kernel, strides, dilations, spatial = _window(node)
    if max(dilations) > 1:
        node.fail(f"attribute dilations = {dilations}")
    x, pads = node.tensor(0), explicit_pads(node, spatial)
    ceil, outside = (bool(node.integer(key, 0)) for key in ("ceil_mode", "count_include_pad"))
    if pads is None:
        upper = node.text("auto_pad", "NOTSET") == "SAME_UPPER"
        return node.call(average_same, x, kernel, strides, upper, outside)
    small = all(2 * p <= k for p, k in zip(pads, kernel * 2, strict=True))
    if is_even(pads) and small:
        return node.call(_AVG_POOLS[spatial], x, kernel, strides, pads[:spatial], ceil, outside)
    if not outside:
        return node.call(average_inside, x, kernel, strides, pads, ceil)
    x = node.call(padded, x, pads)
    return node.call(_AVG_POOLS[spatial], x, kernel, strides, 0, ceil)


def average_same(x: Tensor, kernel: Any, strides: Any, upper: bool, outside: bool) -> Tensor:
    """Averages over windows that are padded to one for every `stride` pixels."""
    pool, ones = _AVG_POOLS[len(kernel)], [1] * len(kernel)
    sums = pool(pad_same(x, kernel, strides, ones, upper), kernel, strides)
    if outside:
        return sums
    inside = pad_same(torch.ones_like(x[:1, :1]), kernel, strides, ones, upper)
    return sums / pool(inside, kernel, strides)


def global_average(x: Tensor) -> Tensor:
    """The mean over all pixels."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_maximum(x: Tensor) -> Tensor:
    """The maximum over all pixels."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@register("GlobalAveragePool")
def _global_average(node: OnnxNode) -> Value:
    return node.call(global_average, node.tensor(0))


@register("GlobalMaxPool")
def _global_maximum(node: OnnxNode) -> Value:
    return node.call(global_maximum, node.tensor(0))


# How a pixel of the result finds its place in the source: (place, scale, source, result) -> place.
_PLACES: dict[str, Any] = {
    "half_pixel": lambda i, scale, n, m: (i + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda i, scale, n, m: (i + 0.5) / scale - 0.5 if m > 1 else i * 0.0,
    "asymmetric": lambda i, scale, n, m: i / scale,
    "align_corners": lambda i, scale, n, m: i * ((n - 1) / (n * scale - 1)) if m > 1 else i * 0.0,
}
_ROUNDINGS: dict[str, Any] = {
    "round_prefer_floor": lambda place: torch.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: torch.floor(place + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def resize(
    x: Tensor,
    scales: Any,
    sizes: Any,
    axes: Any,
    mode: str,
    places: str,
    rounding: str,
    cubic: float = -0.75,
) -> Tensor:
    """Enlarged or reduced, axis by axis, by scales or to sizes."""
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    if sizes is not None:
        sizes = to_ints(sizes)
        scales = [m / x.shape[axis] for axis, m in zip(axes, sizes, strict=True)]
    else:
        scales = [float(scale) for scale in to_list(scales)]
        sizes = [int(x.shape[axis] * scale) for axis, scale in zip(axes, scales, strict=True)]
    check_size(sizes, "Resize's result")
    whole = all(scale == int(scale) >= 1 for scale in scales)
    if axes == [0, 1, 2, 3] and scales[:2] == [1.0, 1.0]:  # images, in torch's own ways
        if mode == "nearest" and places == "asymmetric" and rounding == "floor" and whole:
            return F.interpolate(x, sizes[2:], mode="nearest")
        bilinear = mode == "linear" and places.endswith("half_pixel") and min(sizes) > 1
        if bilinear and [x.shape[a] * s for a, s in zip(axes, scales, strict=True)] == sizes:
            return F.interpolate(x, sizes[2:], mode="bilinear", align_corners=False)
    for axis, scale, m in zip(axes, scales, sizes, strict=True):
        if scale != 1.0 or x.shape[axis] != m:
            place = _PLACES[places](torch.arange(m, dtype=torch.float64), scale, x.shape[axis], m)
            x = _resized(x, axis, place, mode, rounding, cubic)
    return x


def _resized(x: Tensor, axis: int, place: Tensor, mode: str, rounding: str, cubic: float) -> Tensor:
    """One axis, read at given places between its pixels."""
    last = x.shape[axis] - 1
    if mode == "nearest":
        return x.index_select(axis, _ROUNDINGS[rounding](place).long().clamp(0, last))
    base = torch.floor(place)
    share = place - base
    if mode == "linear":
        place = place.clamp(0, last)
        base = torch.floor(place)
        taps = [(0, 1 - (place - base)), (1, place - base)]
    else:
        taps = _cubic_taps(share, cubic)
    shape = [-1] + [1] * (x.dim() - 1 - axis % x.dim())
    total = torch.zeros((), dtype=x.dtype)
    for offset, weight in taps:
        pixels = x.index_select(axis, (base.long() + offset).clamp(0, last))
        total = total + pixels * weight.to(x.dtype).reshape(shape)
    return total


def _cubic_taps(share: Tensor, a: float) -> list[tuple[int, Tensor]]:
    """Keys' convolution over four pixels."""
    near = [1 - share, share]
    far = [2 - share, 1 + share]
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (near[1], near[0])]
    outer = [a * (((d - 5) * d + 8) * d - 4) for d in (far[1], far[0])]
    return [(-1, outer[0]), (0, inner[0]), (1, inner[1]), (2, outer[1])]


@register("Resize", "Upsample")
def _resize(node: OnnxNode) -> Value:
    old = node.op == "Upsample" or node.opset < 11
    for key, expected in (("antialias", 0), ("exclude_outside", 0)):
        if node.integer(key, 0) != expected:
            node.fail(f"attribute {key} = 1")
    if (policy := node.text("keep_aspect_ratio_policy", "stretch")) != "stretch":
        node.fail(f"attribute keep_aspect_ratio_policy = {policy!r}")
    mode = node.text("mode", "nearest")
    mode = "linear" if mode == "bilinear" else mode
    places = node.text("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = node.text("nearest_mode", "floor" if old else "round_prefer_floor")
    if mode not in ("nearest", "linear", "cubic") or places not in _PLACES:
        node.fail(f"mode = {mode!r} with coordinates {places!r}")
    if rounding not in _ROUNDINGS:
        node.fail(f"attribute nearest_mode = {rounding!r}")
    scales = node.floats("scales", None)
    if scales is None:
        scales = _numbers(node, 1 if old else 2)
    sizes = None if old else _numbers(node, 3)
    if scales is None and sizes is None:
        node.fail("neither scales nor sizes are given")
    cubic = node.real("cubic_coeff_a", -0.75)
    settings = (node.ints("axes", None), mode, places, rounding, cubic)
    return node.call(resize, node.tensor(0), scales, sizes, *settings)


def _numbers(node: OnnxNode, index: int) -> Any:
    """An input of several numbers, where an empty one counts as left out."""
    known = node.constant(index)
    if known is None:
        return node.optional(index)
    return known.tolist() if known.numel() else None
