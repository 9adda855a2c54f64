"""What sparsity saves on paper: floating-point operations and bytes (P15).

These are counts, not times; time is measured by the runtime. One multiply-add counts as two FLOPs.

Reference: Evci et al., RigL, arXiv 1911.11134, appendix (training FLOPs); Fang et al., BDWP, arXiv
2309.13015 (N:M training).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.mask_set import find_parameter
from aerogel.sparsity.patterns import NM
from aerogel.sparsity.select import unknown_name

FLOPS_PER_MAC = 2
ROW_POINTER_BYTES = 4
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one forward pass.

    Attributes:
        dense: of the network without masks, every matrix product and convolution in it.
        sparse: with the masked weights skipped.
        layers: masked weight's name -> (dense, sparse) FLOPs spent on it.
    """

    dense: int
    sparse: int
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """sparse / dense."""
        return self.sparse / self.dense if self.dense else 1.0


def inference_flops(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    input: Any,
    *,
    forward: ForwardFn = run_batch,
) -> FlopReport:
    """Count the FLOPs of one forward pass, dense and with masked weights skipped.

    Matrix products, convolutions and attention are counted as they are executed (elementwise work
    is not). A kept weight costs two FLOPs at every position it is applied to, so a convolution's
    weight counts once per output pixel.

    Args:
        model: any module; runs once in eval mode without gradients.
        masks: parameter name -> bool mask (True = kept), or None.
        input: one batch as `run_batch` takes it; divide by its size for FLOPs per sample.
        forward: how to run it.

    Returns:
        `FlopReport` for the whole batch.

    Raises:
        ValueError: a mask for an unknown name, of another shape, or on a weight that is not a
            linear, convolution, attention or embedding weight.
    """
    counted = {name: _Positions(model, name, mask) for name, mask in (masks or {}).items()}
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(_countable(model))
        for entry in counted.values():
            stack.enter_context(entry)
        stack.enter_context(counter)
        forward(model, input)
    layers = {name: entry.flops() for name, entry in counted.items()}
    dense = int(counter.get_total_flops())
    saved = sum(whole - kept for whole, kept in layers.values())
    return FlopReport(dense, dense - saved, layers)


class _Positions:
    """Counts at how many positions one weight is applied during a forward pass."""

    def __init__(self, model: nn.Module, name: str, mask: Tensor) -> None:
        weight = find_parameter(model, name)
        if weight.shape != mask.shape:
            raise ValueError(
                f"mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}"
            )
        owner, _, attribute = name.rpartition(".")
        self.module, self.attribute = model.get_submodule(owner), attribute
        # torch's attention reads its output projection without calling it.
        parent = model.get_submodule(owner.rpartition(".")[0]) if owner else None
        self.attention = parent if isinstance(parent, nn.MultiheadAttention) else None
        self.numel, self.nnz = mask.numel(), int(mask.sum())
        self.positions = 0
        if weight.ndim < 2 or isinstance(self.module, nn.Embedding):
            self.hook: Callable[..., None] | None = None  # biases and look-ups cost no products
        elif isinstance(self.module, nn.MultiheadAttention) or self.attention is not None:
            self.hook = self._count_attention
        elif isinstance(self.module, _CONVS + _TRANSPOSED):
            self.hook = self._count_conv
        elif isinstance(self.module, nn.Linear) or type(self.module).__name__ == "Conv1D":
            self.hook = self._count_linear
        else:
            kind = type(self.module).__name__
            raise ValueError(f"{name}: FLOPs of a masked {kind} weight are not defined")

    def __enter__(self) -> _Positions:
        target = self.attention or self.module
        self.handle = (
            None if self.hook is None else target.register_forward_hook(self.hook, with_kwargs=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.remove()

    def flops(self) -> tuple[int, int]:
        applied = FLOPS_PER_MAC * self.positions
        return applied * self.numel, applied * self.nnz

    def _count_linear(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        self.positions += out.numel() // out.shape[-1]

    def _count_conv(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        # A transposed convolution applies its weight at every input position.
        transposed = isinstance(module, _TRANSPOSED)
        where = (args[0] if args else kwargs["input"]) if transposed else out
        channels = module.in_channels if transposed else module.out_channels
        assert isinstance(channels, int)
        self.positions += where.numel() // channels

    def _count_attention(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs.get("key", query)
        source = key if self.attribute in ("k_proj_weight", "v_proj_weight") else query
        self.positions += source.numel() // source.shape[-1]


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Eval mode, and fused attention paths taken apart, which the counter would not see."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode


# --- training ----------------------------------------------------------------------------------

TRAINING_METHODS = ("dense", "static", "set", "rigl", "dsl")


def training_flops(
    dense: float, sparse: float, method: str = "static", *, update_every: int | None = None
) -> float:
    """FLOPs of one training step per sample, forward and both backward products.

    | method | FLOPs |
    | --- | --- |
    | dense | 3 f_D |
    | static, set | 3 f_S |
    | rigl, dsl | (3 f_S dT + 2 f_S + f_D) / (dT + 1): a dense weight gradient every dT steps |

    Args:
        dense: f_D, forward FLOPs of the dense network, > 0.
        sparse: f_S, forward FLOPs of the sparse network, in [0, dense].
        method: see the table.
        update_every: dT >= 1, for rigl and dsl.

    Raises:
        ValueError: unknown method, FLOPs out of range, or update_every missing.

    Reference: arXiv 1911.11134, section 3 and appendix H.
    """
    _check_flops(dense, sparse)
    if method == "dense":
        return 3.0 * dense
    if method in ("static", "set"):
        return 3.0 * sparse
    if method not in TRAINING_METHODS:
        raise ValueError(unknown_name("method", method, TRAINING_METHODS))
    if update_every is None:
        raise ValueError(f"update_every=None: method {method!r} needs a number of steps")
    check_count("update_every", update_every)
    return (3.0 * sparse * update_every + 2.0 * sparse + dense) / (update_every + 1)


def gradual_training_flops(
    flops_at: Callable[[float], float],
    sparsities: Iterable[float],
    *,
    dense_gradients: bool = False,
) -> float:
    """Mean FLOPs per step and sample while sparsity rises (gradual magnitude pruning).

    Args:
        flops_at: sparsity -> forward FLOPs f(s) of the network at that sparsity.
        sparsities: the sparsity at every training step.
        dense_gradients: whether the coupling keeps the weight gradient dense, which then costs f(0)
            instead of f(s) at every step.

    Raises:
        ValueError: no steps, or a sparsity outside [0, 1].
    """
    total, steps = 0.0, 0
    for s in sparsities:
        check_number("each of sparsities", s, "[0, 1]")
        total += 2.0 * flops_at(s) + flops_at(0.0 if dense_gradients else s)
        steps += 1
    if steps == 0:
        raise ValueError("sparsities is empty; a mean over no step is undefined")
    return total / steps


NM_TRAINING_MODES = ("dense", "sr_ste", "sdwp", "sdgp", "bdwp")


def nm_training_flops(
    forward: float,
    n: int,
    m: int,
    mode: str = "bdwp",
    *,
    backward: float | None = None,
    update: float | None = None,
) -> float:
    """FLOPs of one N:M training step per sample: f_F, f_B and f_W, the sparse ones times n/m.

    Args:
        forward: f_F, FLOPs of the dense forward product.
        n: kept per group.
        m: group length.
        mode: which products are sparse: "sr_ste" forward, "sdwp" and "sdgp" the input gradient,
            "bdwp" both, "dense" none.
        backward: f_B of the input gradient, None is `forward`.
        update: f_W of the weight gradient, None is `forward`.

    Raises:
        ValueError: unknown mode, or not 1 <= n <= m.

    Reference: arXiv 2309.13015, section III.
    """
    if mode not in NM_TRAINING_MODES:
        raise ValueError(unknown_name("mode", mode, NM_TRAINING_MODES))
    check_count("m", m)
    check_count("n", n, 1, m)
    for name, flops in (("forward", forward), ("backward", backward), ("update", update)):
        if flops is not None:
            check_number(name, flops, "[0, inf)")
    f_b = forward if backward is None else backward
    f_w = forward if update is None else update
    share = n / m
    in_forward = share if mode in ("sr_ste", "bdwp") else 1.0
    in_backward = share if mode in ("sdwp", "sdgp", "bdwp") else 1.0
    return forward * in_forward + f_b * in_backward + f_w


def _check_flops(dense: float, sparse: float) -> None:
    check_number("dense", dense, "(0, inf)")
    check_number("sparse", sparse, "[0, inf)")
    if sparse > dense:
        raise ValueError(f"sparse must be at most dense={dense}, got {sparse}")


# --- storage -----------------------------------------------------------------------------------

StorageFormat = Literal["dense", "csr32", "csr16", "bitmap"] | str


def storage_bytes(
    masks: Tensor | Mapping[str, Tensor], format: StorageFormat, value_bytes: float = 4
) -> int:
    """Bytes that masked weights take in a storage format.

    | format | bytes |
    | --- | --- |
    | dense | numel * value |
    | csr32, csr16 | nnz * (value + 4 or 2) + 4 * (rows + 1), a weight seen as (out, rest) |
    | bitmap | nnz * value + numel / 8 |
    | n:m ("2:4") | n values and n * ceil(log2 m) bits for every group of m |

    Args:
        masks: one bool mask (True = kept), or a mapping of them; bytes add up.
        format: see the table.
        value_bytes: width of a value, e.g. 4, 2, 1 or 0.5.

    Raises:
        ValueError: unknown format, csr16 with more than 65536 columns, or a mask that does not
            follow the N:M pattern along its inputs (names the tensor).
    """
    named = {"mask": masks} if isinstance(masks, Tensor) else masks
    check_number("value_bytes", value_bytes, "(0, inf)")
    return sum(_stored_bytes(name, mask, format, value_bytes) for name, mask in named.items())


def _stored_bytes(name: str, mask: Tensor, format: str, value_bytes: float) -> int:
    numel, nnz = mask.numel(), int(mask.sum())
    if format == "dense":
        return math.ceil(numel * value_bytes)
    if format == "bitmap":
        return math.ceil(nnz * value_bytes) + math.ceil(numel / 8)
    if format in ("csr32", "csr16"):
        rows = mask.shape[0] if mask.ndim else 1
        columns = numel // max(rows, 1)
        index = 4 if format == "csr32" else 2
        if index == 2 and columns > 1 << 16:
            raise ValueError(f"{name}: {columns} columns do not fit csr16; use csr32")
        return math.ceil(nnz * value_bytes) + nnz * index + ROW_POINTER_BYTES * (rows + 1)
    if match := re.fullmatch(r"(\d+):(\d+)", format):
        return _nm_bytes(name, mask, int(match[1]), int(match[2]), value_bytes)
    formats = ("dense", "csr32", "csr16", "bitmap", "2:4")
    raise ValueError(f"{unknown_name('format', format, formats)} (one of {', '.join(formats)})")


def _nm_bytes(name: str, mask: Tensor, n: int, m: int, value_bytes: float) -> int:
    pattern = NM(n, m)
    pattern.validate(mask.shape, name)
    if not pattern.is_satisfied(mask):
        raise ValueError(f"{name}: the mask is not {n}:{m} along its inputs")
    groups = mask.numel() // m
    index_bits = math.ceil(math.log2(m)) * n
    return math.ceil(groups * n * value_bytes) + math.ceil(groups * index_bits / 8)
