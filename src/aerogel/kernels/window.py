"""The sliding window of convolutions and pooling: its numbers and the sizes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aerogel.kernels.formats import BlockRowWeight

Pair = tuple[int, int]


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """One number for both axes, or (vertical, horizontal)."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) != 2 or any(not isinstance(n, int) or n < least for n in numbers):
        raise ValueError(f"{name}={value!r}: expected one or two integers of at least {least}")
    return numbers[0], numbers[1]


def window_sizes(
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool = False,
) -> Pair:
    """Output height and width of a sliding window, as torch counts them."""
    sizes = []
    for size, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        out = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= size + p:  # the last window must start inside
            out -= 1
        if room < 0:
            raise ValueError(
                f"kernel={kernel}, dilation={dilation}: too large for a plane of "
                f"{shape[1]}x{shape[2]} with padding={padding}"
            )
        sizes.append(out)
    return sizes[0], sizes[1]


class ConvGeometry(NamedTuple):
    """A window and how it moves, each pair as (vertical, horizontal).

    Attributes:
        kernel: taps.
        stride: steps between outputs.
        padding: zeros on either side.
        dilation: distance of neighbouring taps.
        groups: parts into which inputs and outputs are cut.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @staticmethod
    def of(
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> ConvGeometry:
        """From one number for both axes, or two; ValueError names what does not fit."""
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups={groups!r}: expected a positive integer")
        return ConvGeometry(
            pair("kernel_size", kernel_size, 1),
            pair("stride", stride, 1),
            pair("padding", padding, 0),
            pair("dilation", dilation, 1),
            groups,
        )

    @property
    def numbers(self) -> list[int]:
        """The window as the native library takes it."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    def output_shape(self, weight: BlockRowWeight, image: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result for a packed weight.

        Args:
            weight: (out, in / groups * kh * kw).
            image: (in, height, width).

        Returns:
            (out, out_height, out_width).

        Raises:
            ValueError: the weight does not fit, or the kernel is larger than the padded plane.
        """
        if len(image) != 3:
            raise ValueError(f"x: shape {image}, expected (channels, height, width)")
        rows, cols = weight.shape
        channels = image[0]
        if channels % self.groups or rows % self.groups:
            raise ValueError(
                f"groups={self.groups}: expected a divisor of {channels} inputs and {rows} outputs"
            )
        expected = channels // self.groups * self.kernel[0] * self.kernel[1]
        if cols != expected:
            raise ValueError(
                f"weight: shape {weight.shape}, expected ({rows}, {expected}) for {channels} "
                f"channels, groups={self.groups} and kernel_size={self.kernel}"
            )
        if self.groups > 1 and rows // self.groups % weight.block:
            raise ValueError(
                f"weight: blocks of {weight.block} rows cross the groups of "
                f"{rows // self.groups} outputs; pack it with a block that divides them"
            )
        return (rows, *window_sizes(image, *self[:4]))
