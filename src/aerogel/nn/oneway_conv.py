"""Convolutions whose kernels are products of one-dimensional ("one-way") filters from the start.

Reference: Boukraichi, Akkari, Casenave, Ryckelynck, "A priori compression of convolutional neural
networks for wave simulators", arXiv 2304.04964. How channels take part is not fixed there; of the
three forms here `chain` is the default and `per_kernel` the literal reading.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from aerogel.nn import oneway_fitting as fitting
from aerogel.nn.thin_conv import conv_along

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("chain", "per_kernel", "cp")
_PADDING_MODES = ("zeros", "circular")
_AXES = "xyz"

Sizes = int | Sequence[int]


class _Stage(NamedTuple):
    """One convolution of the factored form: (out, in / groups, k..) weight; axes it works on."""

    weight: Tensor
    axes: tuple[int, ...]
    groups: int


class OneWayConv(nn.Module):
    """What the four one-way layers share; use `OneWayConv2d`, `OneWayConv3d` or the transposed.

    Every kernel is a sum of outer products of one filter for each axis. The filters are the
    parameters, there is no non-linearity between them, and the bias is added once, at the end.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: one number, or one for each axis.
        stride: as `nn.Conv2d`; each axis is strided in its own one-way convolution.
        padding: "same" (dilation * (kernel - 1) / 2 on both ends, with any stride; odd kernels
            only), "valid", or numbers.
        dilation: as `nn.Conv2d`.
        rank: "chain": channels between the stages, default `out_channels`; "per_kernel": terms in
            each kernel, default 1; "cp": terms of the whole tensor, default `out_channels`. More
            than an exact representation can need is cut, with a warning if it was asked for.
        mode: "chain" convolves in_channels -> rank -> .. -> out_channels, one axis a stage.
            "per_kernel" has own filters for each (out, in) pair and multiplies them out in each
            forward pass: it saves parameters, not multiplications. "cp" is a 1x1 convolution, one
            depthwise convolution for each axis, and a 1x1 convolution.
        bias: add a bias.
        groups: 1, or `in_channels` = `out_channels` (depthwise; not with "cp"; in "chain" with no
            rank, since its kernels are one product each).
        padding_mode: "zeros" or "circular"; others do not commute at the corners.
        gain: of the activation that follows, for the initial weights; default ReLU's.
        checkpoint: recompute the maps between the stages in the backward pass instead of keeping
            them.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Boukraichi et al., arXiv 2304.04964.
    """

    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    output_padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = "same",
        dilation: Sizes = 1,
        rank: int | None = None,
        mode: str = "chain",
        bias: bool = True,
        *,
        groups: int = 1,
        padding_mode: str = "zeros",
        gain: float = math.sqrt(2.0),
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self._check(in_channels, out_channels, groups, mode, padding_mode)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.mode, self.padding_mode, self.checkpoint = mode, padding_mode, checkpoint
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.padding = self._padding(padding)
        self.output_padding = (0,) * self.dims
        self.rank = self._rank(rank)
        self.factors = nn.ParameterList(nn.Parameter(torch.empty(s)) for s in self._shapes())
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters(gain)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Module,
        rank: int | None = None,
        mode: str = "chain",
    ) -> Self:
        """The one-way layer nearest to a plain one.

        "chain" by singular value decomposition (in 2-D the best for its rank; in 3-D one after
        another), "per_kernel" by one for each kernel, "cp" by alternating least squares.

        Args:
            conv: the plain layer of the same kind (`nn.Conv2d` for `OneWayConv2d`, ...).
            rank: as above; None is exact ("cp": `out_channels`, not exact).
            mode: as above.

        Raises:
            ValueError: another kind of layer, a value that is not finite, or an argument out of
                range.
        """
        made = cls.shaped_like(conv, rank=cls._exact(conv, rank, mode), mode=mode)
        assert isinstance(conv.weight, Tensor)
        weight = conv.weight.detach()
        if not bool(weight.isfinite().all()):
            raise ValueError("conv.weight: NaN or infinite values cannot be factored")
        kernel = weight.transpose(0, 1) if cls.transposed and conv.groups == 1 else weight
        with torch.no_grad():
            for factor, value in zip(made.factors, made._fitted(kernel), strict=True):
                factor.copy_(value)
            if made.bias is not None:
                assert isinstance(conv.bias, Tensor)
                made.bias.copy_(conv.bias)
        return made.train(conv.training)

    @classmethod
    def shaped_like(
        cls, conv: nn.Module, *, rank: int | None = None, mode: str = "chain", **options: Any
    ) -> Self:
        """A freshly initialised one-way layer with a plain layer's sizes, dtype and device.

        Raises:
            ValueError: another kind of layer, or one that has no one-way form.
        """
        plain = cls._plain()
        if not isinstance(conv, plain):
            raise ValueError(f"conv: expected an nn.{plain.__name__}, got {type(conv).__name__}")
        if cls.transposed:
            options["output_padding"] = conv.output_padding
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            rank,
            mode,
            conv.bias is not None,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            **options,
        ).to(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, ..) -> (B, out_channels, ..).

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 2 + self.dims or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x: shape {tuple(x.shape)}, expected (batch, {self.in_channels}, "
                f"{self.dims} spatial axes)"
            )
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(self._run, x, use_reentrant=False)
        return self._run(x)

    def materialize(self) -> Tensor:
        """The dense kernel, exactly: (O, I / groups, k..), for transposed layers (I, O, k..)."""
        kernel = self._kernel()
        return kernel.transpose(0, 1) if self.transposed and self.groups == 1 else kernel

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The plain layer that computes the same."""
        options: dict[str, Any] = {"groups": self.groups, "padding_mode": self.padding_mode}
        if self.transposed:
            options["output_padding"] = self.output_padding
        conv = self._plain()(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            dilation=self.dilation,
            bias=self.bias is not None,
            **options,
        ).to(self.factors[0])
        conv.weight.copy_(self.materialize())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    @property
    def num_parameters(self) -> int:
        """Parameters of this layer, bias included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_parameters_dense(self) -> int:
        """Parameters of the plain layer of these sizes, bias included."""
        weights = self.out_channels * self._group_inputs * math.prod(self.kernel_size)
        return weights + (0 if self.bias is None else self.out_channels)

    @torch.no_grad()
    def reset_parameters(self, gain: float = math.sqrt(2.0)) -> None:
        """Draw weights whose kernel has the variance gain^2 / fan-in of a plain Kaiming layer."""
        inputs = self._group_inputs
        if self.mode == "per_kernel":
            variance = gain**2 / (inputs * math.prod(self.kernel_size) * self.rank)
            for factor in self.factors:
                factor.normal_(std=variance ** (0.5 / self.dims))
        elif self.mode == "cp":
            fans = (self.rank / gain**2, inputs, *self.kernel_size)
            for factor, fan in zip(self.factors, fans, strict=True):
                _uniform_(factor, 1.0 / fan)
        else:
            for factor in self.factors:
                scale = gain**2 if factor is self.factors[-1] else 1.0
                _uniform_(factor, scale / (factor.shape[1] * factor.shape[2]))
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        """Sizes, mode, rank, and parameters against the plain layer's."""
        share = self.num_parameters / self.num_parameters_dense
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, mode={self.mode!r}, "
            f"rank={self.rank}, parameters={share:.3g} of dense"
        )

    @classmethod
    def _plain(cls) -> Any:
        return getattr(nn, f"Conv{'Transpose' if cls.transposed else ''}{cls.dims}d")

    @classmethod
    def _exact(cls, conv: Any, rank: int | None, mode: str) -> int | None:
        if rank is not None or mode == "cp" or not isinstance(conv, cls._plain()):
            return rank
        if mode == "chain":
            if conv.groups != 1:
                return None
            sizes = (conv.out_channels, conv.in_channels, conv.kernel_size)
            return max(fitting.chain_bounds(*sizes))
        return math.prod(sorted(conv.kernel_size)[:-1])

    @property
    def _group_inputs(self) -> int:
        return self.in_channels // self.groups

    def _check(self, inputs: int, outputs: int, groups: int, mode: str, pad: str) -> None:
        if min(inputs, outputs) < 1:
            raise ValueError(f"in_channels={inputs}, out_channels={outputs}: expected at least 1")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if groups != 1 and not groups == inputs == outputs:
            raise ValueError(f"groups={groups}: expected 1, or in_channels = out_channels = groups")
        if groups != 1 and mode == "cp":
            raise ValueError(f"groups={groups}: mode='cp' mixes channels; expected 1")
        if pad not in _PADDING_MODES or (self.transposed and pad != "zeros"):
            known = ("zeros",) if self.transposed else _PADDING_MODES
            raise ValueError(f"padding_mode={pad!r}: expected one of {', '.join(known)}")

    def _sizes(self, name: str, value: Sizes, least: int) -> tuple[int, ...]:
        sizes = (value,) * self.dims if isinstance(value, int) else tuple(value)
        if len(sizes) != self.dims or min(sizes) < least:
            raise ValueError(f"{name}={value}: expected {self.dims} numbers of at least {least}")
        return sizes

    def _padding(self, padding: Sizes | str) -> tuple[int, ...]:
        if not isinstance(padding, str):
            return self._sizes("padding", padding, 0)
        if padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r}: expected 'same', 'valid' or numbers")
        if padding == "valid":
            return (0,) * self.dims
        if any(side % 2 == 0 for side in self.kernel_size):
            raise ValueError(
                f"padding='same' with kernel_size={self.kernel_size}: an even kernel has no "
                "middle; give numbers"
            )
        return tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    def _rank(self, rank: int | None) -> int:
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank}: expected at least 1")
        sides, inputs, outputs = self.kernel_size, self.in_channels, self.out_channels
        if self.mode == "chain" and self.groups != 1:
            if rank not in (None, 1):
                raise ValueError(f"rank={rank}: a depthwise chain has one product; expected None")
            return 1
        if self.mode == "chain":
            bound = max(fitting.chain_bounds(outputs, inputs, sides))
        elif self.mode == "per_kernel":
            bound = math.prod(sorted(sides)[:-1])
        else:
            bound = math.prod(sorted((outputs, inputs, *sides))[:-1])
        if rank is not None and rank > bound:
            warnings.warn(f"rank={rank}: {bound} is exact, so {bound} is taken", stacklevel=4)
        wanted = (1 if self.mode == "per_kernel" else outputs) if rank is None else rank
        return min(wanted, bound)

    def _widths(self) -> list[int]:
        """Channels between the stages of a chain."""
        sizes = (self.out_channels, self.in_channels, self.kernel_size)
        return [min(self.rank, bound) for bound in fitting.chain_bounds(*sizes)]

    def _shapes(self) -> list[tuple[int, ...]]:
        sides, inputs = self.kernel_size, self._group_inputs
        if self.mode == "per_kernel":
            return [(self.rank, self.out_channels, inputs, side) for side in sides]
        if self.mode == "cp":
            return [(n, self.rank) for n in (self.out_channels, self.in_channels, *sides)]
        if self.groups != 1:
            return [(self.out_channels, 1, side) for side in sides]
        widths = [self.in_channels, *self._widths(), self.out_channels]
        return [(widths[j + 1], widths[j], side) for j, side in enumerate(sides)]

    def _fitted(self, kernel: Tensor) -> list[Tensor]:
        if self.mode == "cp":
            return fitting.fit_cp(kernel, self.rank)
        if self.mode == "per_kernel":
            return fitting.fit_per_kernel(kernel, self.rank)
        if self.groups != 1:
            terms = fitting.fit_per_kernel(kernel, 1)
            return [term[0] for term in terms]
        return fitting.fit_chain(kernel, self._widths())

    def _kernel(self) -> Tensor:
        """(O, I / groups, k..), whatever torch's layout for the layer is."""
        letters = _AXES[: self.dims]
        factors = list(self.factors)
        if self.mode == "per_kernel":
            terms = ",".join(f"roi{axis}" for axis in letters)
            return torch.einsum(f"{terms}->oi{letters}", *factors)
        if self.mode == "cp":
            terms = ",".join(f"{axis}r" for axis in "oi" + letters)
            return torch.einsum(f"{terms}->oi{letters}", *factors)
        if self.groups != 1:
            terms = ",".join(f"oi{axis}" for axis in letters)
            return torch.einsum(f"{terms}->oi{letters}", *factors)
        inner = "iabo" if self.dims == 3 else "iao"
        terms = ",".join(f"{inner[j + 1]}{inner[j]}{axis}" for j, axis in enumerate(letters))
        return torch.einsum(f"{terms}->oi{letters}", *factors)

    def _stages(self) -> list[_Stage]:
        every = tuple(range(self.dims))
        if self.mode == "per_kernel":
            return [_Stage(self._kernel(), every, self.groups)]
        if self.mode == "chain":
            return [
                _Stage(self._along(factor, axis), (axis,), self.groups)
                for axis, factor in enumerate(self.factors)
            ]
        expand, reduce, *sides = self.factors
        points = (1,) * self.dims
        return [
            _Stage(reduce.T.reshape(self.rank, -1, *points), (), 1),
            *(
                _Stage(self._along(side.T[:, None], axis), (axis,), self.rank)
                for axis, side in enumerate(sides)
            ),
            _Stage(expand.reshape(-1, self.rank, *points), (), 1),
        ]

    def _along(self, factor: Tensor, axis: int) -> Tensor:
        shape = [1] * self.dims
        shape[axis] = factor.shape[-1]
        return factor.reshape(*factor.shape[:2], *shape)

    def _run(self, x: Tensor) -> Tensor:
        stages = self._stages()
        for stage in stages:
            x = self._convolve(x, stage, self.bias if stage is stages[-1] else None)
        return x

    def _convolve(self, x: Tensor, stage: _Stage, bias: Tensor | None) -> Tensor:
        """Stride, padding and dilation act on the stage's own axes: zero padding commutes."""

        def own(sizes: tuple[int, ...], other: int) -> list[int]:
            return [n if j in stage.axes else other for j, n in enumerate(sizes)]

        stride, dilation = own(self.stride, 1), own(self.dilation, 1)
        padding = own(self.padding, 0)
        if self.transposed:
            weight = stage.weight if stage.groups != 1 else stage.weight.transpose(0, 1)
            transposed: Any = F.conv_transpose2d if self.dims == 2 else F.conv_transpose3d
            extra = own(self.output_padding, 0)
            return transposed(x, weight, bias, stride, padding, extra, stage.groups, dilation)
        if self.padding_mode == "circular" and any(padding):
            around = [n for n in reversed(padding) for _ in range(2)]
            x, padding = F.pad(x, around, mode="circular"), [0] * self.dims
        options = (stride, padding, dilation, stage.groups)
        if self.dims == 2:
            return F.conv2d(x, stage.weight, bias, *options)
        if len(stage.axes) == 1 and x.device.type == "cpu":
            return conv_along(x, stage.weight, bias, stage.axes[0], options)
        return F.conv3d(x, stage.weight, bias, *options)


class OneWayConv2d(OneWayConv):
    __doc__ = (OneWayConv.__doc__ or "").replace(
        "What the four one-way layers share; use `OneWayConv2d`, `OneWayConv3d` or the transposed.",
        "A 2-D convolution of a column filter and a row filter.",
    )
    dims = 2


class OneWayConv3d(OneWayConv):
    __doc__ = (OneWayConv.__doc__ or "").replace(
        "What the four one-way layers share; use `OneWayConv2d`, `OneWayConv3d` or the transposed.",
        "A 3-D convolution of three one-way filters.",
    )
    dims = 3


class _OneWayConvTranspose(OneWayConv):
    transposed = True

    def __init__(self, *args: Any, output_padding: Sizes = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.output_padding = self._sizes("output_padding", output_padding, 0)
        limits = [max(pair) for pair in zip(self.stride, self.dilation, strict=True)]
        if any(n >= most for n, most in zip(self.output_padding, limits, strict=True)):
            raise ValueError(
                f"output_padding={output_padding}: expected less than stride={self.stride} "
                f"or dilation={self.dilation}"
            )


class OneWayConvTranspose2d(_OneWayConvTranspose):
    """A transposed 2-D convolution of one-way filters; see `OneWayConv2d`.

    Args as there, and `output_padding` (keyword, default 0) as `nn.ConvTranspose2d`; zero padding
    only.

    Raises:
        ValueError: an argument out of range.
    """

    dims = 2


class OneWayConvTranspose3d(_OneWayConvTranspose):
    """A transposed 3-D convolution of one-way filters; see `OneWayConv3d`.

    Args as there, and `output_padding` (keyword, default 0) as `nn.ConvTranspose3d`; zero padding
    only.

    Raises:
        ValueError: an argument out of range.
    """

    dims = 3


def _uniform_(factor: Tensor, variance: float) -> None:
    bound = math.sqrt(3.0 * variance)
    factor.uniform_(-bound, bound)
