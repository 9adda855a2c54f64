"""Layers that are larger than a dense one and, at their sparsity, cost the same.

| layer | in place of `W x` | cost is equal because |
| --- | --- | --- |
| `SparseParallel*` | ``sum_j norm_j(W_j x)`` | there are 1 / (1 - s) branches |
| `SparseFactorized*` | ``V act(norm(U x))`` | the rank grows by 1 / (1 - s) |
| `SparseDoped*` | ``W x + V U x``, V and U dense | the rank spends what W saves |

They take the arguments of `nn.Conv2d` and `nn.Linear`, and `sparsity`. They hold plain, dense
weights and no masks: a mask controller (`aerogel.pruning.RigL`, say) over their `masked_weights`
makes them sparse. Weights start as He's normal (fan out) of the enlarged dense layer.

Reference: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency", ICML 2024, arXiv 2303.11525.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from aerogel.arguments import check_number

UV = Literal["nonlinear_relu", "batchnorm", "linear"]
Norm = Callable[[int], nn.Module]

MEMORY_LIMIT = 1 << 32
_FLOAT_BYTES = 4


def parallel_branches(sparsity: float) -> int:
    """Branches that cost at `sparsity` what one dense layer does, 1 / (1 - sparsity).

    Raises:
        ValueError: a sparsity outside [0, 1), or one that gives no whole number of branches.
    """
    check_sparsity(sparsity)
    exact = 1.0 / (1.0 - sparsity)
    branches = round(exact)
    if abs(exact - branches) > 1e-6 * exact:
        near = 1.0 - 1.0 / branches
        raise ValueError(
            f"sparsity={sparsity} gives {exact:.4g} branches; expected a whole number: "
            f"{branches} of them need sparsity={near:.6g}"
        )
    return branches


def factorized_rank(inputs: int, outputs: int, sparsity: float, *, sparse_v: bool = True) -> int:
    """Rank at which U (rank x inputs) and V (outputs x rank) cost what outputs x inputs does.

    Rounded up, so the cost is above that of the dense layer by less than one rank.

    Args:
        inputs: of the layer; of a convolution times the pixels of its kernel.
        outputs: of the layer.
        sparsity: of U, and of V if `sparse_v`; in [0, 1).
        sparse_v: whether V is sparse too.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    density = 1.0 - sparsity
    per_rank = density * inputs + (density if sparse_v else 1.0) * outputs
    return math.ceil(inputs * outputs / per_rank - 1e-9)


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Rank at which V U costs what a sparse W saves; rounded down, so 0 at sparsity 0.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    return math.floor(sparsity * inputs * outputs / (inputs + outputs) + 1e-9)


def check_sparsity(sparsity: float) -> None:
    """Raise an error unless it is a number in [0, 1)."""
    check_number("sparsity", sparsity, "[0, 1)")


class IsoFlopLayer(nn.Module):
    """What the layers have in common.

    Attributes:
        sparsity: of the weights named by `masked_weights`, for which the layer was sized.
        width: branches of a parallel layer, rank of the others.
    """

    sparsity: float
    width: int

    def masked_weights(self) -> tuple[str, ...]:
        """Names of the weights that are to be sparse, within the layer."""
        raise NotImplementedError

    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Weights of U and V if nothing stands between them, else None."""
        return None

    def extra_repr(self) -> str:
        """The sparsity."""
        return f"sparsity={self.sparsity:g}"


def folded(u: Tensor, v: Tensor) -> Tensor:
    """V U as the weight of one layer, ``(out, in, *kernel)``, from those of U and V."""
    return (v.flatten(1) @ u.flatten(1)).view(v.shape[0], *u.shape[1:])


class _Parallel(IsoFlopLayer):
    def __init__(self, make: Callable[[], nn.Module], width: int, sparsity: float, norm: Any):
        super().__init__()
        self.sparsity = sparsity
        branches = []
        for _ in range(parallel_branches(sparsity)):
            layer = _initialised(make())
            branches.append(nn.Sequential(layer, nn.Identity() if norm is None else norm(width)))
        self.branches = nn.ModuleList(branches)
        self.width = len(branches)

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer, the sum over branches; no activation comes before the sum."""
        first, *others = self.branches
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total

    def masked_weights(self) -> tuple[str, ...]:
        """The weight of every branch."""
        return tuple(f"branches.{index}.0.weight" for index in range(len(self.branches)))


class SparseParallelConv2d(_Parallel):
    """Full-size convolutions side by side, each with a norm of its own, summed.

    Without norms the sum is one convolution over again, and sparser branches gain nothing.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: of `nn.Conv2d`; groups must be 1.
        sparsity: of every branch; 1 / (1 - sparsity) must be whole.
        norm: makes each branch's norm from its channels; None leaves it out.

    Raises:
        ValueError: sparsity outside [0, 1), no whole number of branches, groups other than 1.

    Reference:
        arXiv 2303.11525, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        sparsity: float,
        norm: Norm | None = nn.BatchNorm2d,
    ) -> None:
        _check_groups(groups)

        def make() -> nn.Module:
            return nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                bias=bias,
                padding_mode=padding_mode,
            )

        super().__init__(make, out_channels, sparsity, norm)


class SparseParallelLinear(_Parallel):
    """Full-size linear layers side by side, summed.

    Args:
        in_features, out_features, bias: of `nn.Linear`.
        sparsity: of every branch; 1 / (1 - sparsity) must be whole.
        norm: makes each branch's norm from its features (`nn.LayerNorm`, `nn.BatchNorm1d`); with
            None the sum is one linear layer over again.

    Raises:
        ValueError: sparsity outside [0, 1), or no whole number of branches.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        norm: Norm | None = None,
    ) -> None:
        super().__init__(
            lambda: nn.Linear(in_features, out_features, bias), out_features, sparsity, norm
        )


class _Factorized(IsoFlopLayer):
    def __init__(self, sparsity: float, uv: UV, sparse_v: bool) -> None:
        super().__init__()
        if uv not in get_args(UV):
            raise ValueError(f"uv must be one of {get_args(UV)}, got {uv!r}")
        self.sparsity, self.uv, self.sparse_v = sparsity, uv, sparse_v

    def _set(self, u: nn.Module, v: nn.Module, norm: nn.Module) -> None:
        self.u = _initialised(u)
        self.norm = nn.Identity() if self.uv == "linear" else norm
        self.activation = nn.ReLU() if self.uv == "nonlinear_relu" else nn.Identity()
        self.v = _initialised(v)

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer."""
        out: Tensor = self.v(self.activation(self._normalised(self.u(x))))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def masked_weights(self) -> tuple[str, ...]:
        """U's weight, and V's unless it is dense."""
        return ("u.weight", "v.weight") if self.sparse_v else ("u.weight",)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Weights of U and V with ``uv="linear"``."""
        return _leaves(self.u, self.v) if self.uv == "linear" else None


class SparseFactorizedConv2d(_Factorized):
    """A convolution U to many more channels than a low-rank factor has, then a 1x1 one, V.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: of `nn.Conv2d`; U has the geometry, V the bias; groups must be 1.
        sparsity: of both factors.
        uv: between them ``"nonlinear_relu"`` (batch norm and ReLU), ``"batchnorm"``, ``"linear"``.
        sparse_v: False leaves V dense, with a smaller rank.
        memory_limit: bytes that both factors may take in single precision.

    Raises:
        ValueError: sparsity outside [0, 1), unknown uv, groups other than 1, factors too large.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        sparsity: float,
        uv: UV = "nonlinear_relu",
        sparse_v: bool = True,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        _check_groups(groups)
        super().__init__(sparsity, uv, sparse_v)
        inputs = in_channels * _pixels(kernel_size)
        self.width = factorized_rank(inputs, out_channels, sparsity, sparse_v=sparse_v)
        _check_memory(self.width, inputs + out_channels, memory_limit)
        u = nn.Conv2d(
            in_channels,
            self.width,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=False,
            padding_mode=padding_mode,
        )
        v = nn.Conv2d(self.width, out_channels, 1, bias=bias)
        self._set(u, v, nn.BatchNorm2d(self.width))


class SparseFactorizedLinear(_Factorized):
    """A linear layer U to many more features than a low-rank factor has, then V.

    Args:
        in_features, out_features, bias: of `nn.Linear`; V has the bias.
        sparsity: of both factors.
        uv: as `SparseFactorizedConv2d`; batch norm runs over all leading dimensions.
        sparse_v: False leaves V dense, with a smaller rank.
        memory_limit: bytes that both factors may take in single precision.

    Raises:
        ValueError: sparsity outside [0, 1), unknown uv, factors too large.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        uv: UV = "nonlinear_relu",
        sparse_v: bool = True,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        super().__init__(sparsity, uv, sparse_v)
        self.width = factorized_rank(in_features, out_features, sparsity, sparse_v=sparse_v)
        _check_memory(self.width, in_features + out_features, memory_limit)
        u = nn.Linear(in_features, self.width, bias=False)
        v = nn.Linear(self.width, out_features, bias)
        self._set(u, v, nn.BatchNorm1d(self.width))

    def _normalised(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.reshape(-1, self.width))
        return out.view(x.shape)


class _Doped(IsoFlopLayer):
    def __init__(self, sparsity: float, mask_low_rank: bool) -> None:
        super().__init__()
        self.sparsity, self.mask_low_rank = sparsity, mask_low_rank

    def _set(self, base: nn.Module, u: nn.Module | None, v: nn.Module | None) -> None:
        self.base = _initialised(base)
        self.u = None if u is None else _initialised(u)
        self.v = None if v is None else _initialised(v)

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer."""
        out: Tensor = self.base(x)
        return out if self.u is None or self.v is None else out + self.v(self.u(x))

    def masked_weights(self) -> tuple[str, ...]:
        """W's, and with `mask_low_rank` those of U and V."""
        low_rank = ("u.weight", "v.weight") if self.mask_low_rank and self.u is not None else ()
        return ("base.weight", *low_rank)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Weights of U and V; None at rank 0."""
        return None if self.u is None or self.v is None else _leaves(self.u, self.v)


class SparseDopedConv2d(_Doped):
    """A sparse convolution W of the usual size, and a dense low-rank one beside it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: of `nn.Conv2d`; groups must be 1.
        sparsity: of W; at 0 there is no low-rank part.
        mask_low_rank: mask U and V as well, as the released code's rule would; costs less than the
            dense layer.

    Raises:
        ValueError: sparsity outside [0, 1), groups other than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        sparsity: float,
        mask_low_rank: bool = False,
    ) -> None:
        _check_groups(groups)
        super().__init__(sparsity, mask_low_rank)

        def make(outputs: int, with_bias: bool) -> nn.Module:
            return nn.Conv2d(
                in_channels,
                outputs,
                kernel_size,
                stride,
                padding,
                dilation,
                bias=with_bias,
                padding_mode=padding_mode,
            )

        self.width = doped_rank(in_channels * _pixels(kernel_size), out_channels, sparsity)
        v = nn.Conv2d(self.width, out_channels, 1, bias=False) if self.width else None
        self._set(make(out_channels, bias), make(self.width, False) if self.width else None, v)


class SparseDopedLinear(_Doped):
    """A sparse matrix W of the usual size, and a dense low-rank one beside it.

    Args:
        in_features, out_features, bias: of `nn.Linear`.
        sparsity: of W; at 0 there is no low-rank part.
        mask_low_rank: as `SparseDopedConv2d`.

    Raises:
        ValueError: sparsity outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        mask_low_rank: bool = False,
    ) -> None:
        super().__init__(sparsity, mask_low_rank)
        self.width = rank = doped_rank(in_features, out_features, sparsity)
        u = nn.Linear(in_features, rank, bias=False) if rank else None
        v = nn.Linear(rank, out_features, bias=False) if rank else None
        self._set(nn.Linear(in_features, out_features, bias), u, v)


def _initialised(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _leaves(u: nn.Module, v: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    assert isinstance(u.weight, nn.Parameter)
    assert isinstance(v.weight, nn.Parameter)
    return u.weight, v.weight


def _pixels(kernel_size: _size_2_t) -> int:
    return kernel_size**2 if isinstance(kernel_size, int) else math.prod(kernel_size)


def _check_groups(groups: int) -> None:
    if groups != 1:
        raise ValueError(
            f"groups must be 1, got {groups}: grouped and depthwise convolutions have no iso-FLOP "
            "form"
        )


def _check_memory(rank: int, per_rank: int, limit: int) -> None:
    size = rank * per_rank * _FLOAT_BYTES
    if size > limit:
        raise ValueError(
            f"factors of rank {rank} take {size} bytes; expected at most memory_limit={limit}: "
            "lower the sparsity"
        )
