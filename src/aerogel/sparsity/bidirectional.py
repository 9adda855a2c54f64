"""Linear and convolution layers whose forward and input-gradient products use different masks.

The input-gradient product may instead thin out the output's gradient (SDGP), with dense weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.kernels.nm_trained import LONGEST_GROUP, NMProduct, choose_masks
from aerogel.sparsity.group_patterns import NM, GroupPattern
from aerogel.sparsity.keep import keep_factor
from aerogel.sparsity.select import ParamRef

MOST_KEPT = 0.25  # share of a group; native products that keep more were never measured
LEAST_ROWS = 16  # of activations; masking the dense weight took longer even for fewer


class SparseProducts:
    """The two sparse products of a linear layer, native where that pays.

    A mask of another pattern and operands that the kernels do not read are multiplied densely.

    Args:
        shape: (out, in) of the weight.
        n: kept of every group.
        m: group length.
    """

    def __init__(self, shape: tuple[int, int], n: int, m: int) -> None:
        self.forward = NMProduct(shape, n, m, axis=1)
        self.backward = NMProduct(shape, n, m, axis=0)
        self._chosen: tuple[int, ...] = ()

    def product(
        self, product: NMProduct, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """`NMProduct.masked`, or None where it does not pay or a gradient is asked of it."""
        rows = x.numel() // max(x.shape[-1], 1)
        if rows < LEAST_ROWS or torch.is_grad_enabled():
            return None
        return product.masked(x, weight, mask, bias) if product.fits(x, weight, bias) else None

    def is_forward(self, pattern: GroupPattern) -> bool:
        """Whether a pattern is the forward product's."""
        own = (self.forward.n, self.forward.m, 1)
        return isinstance(pattern, NM) and (pattern.n, pattern.m, pattern.axis) == own

    def choose(self, weight: Tensor, forward: Tensor | None, backward: Tensor) -> bool:
        """Masks by magnitude, with the products packed on the way; see `choose_masks`.

        Args:
            weight: (out, in).
            forward: mask to write, (out, in) bool; None leaves the forward product alone.
            backward: mask to write.

        Returns:
            Whether the kernels could; nothing was done if not.
        """
        masks = [mask for mask in (forward, backward) if mask is not None]
        tensors = [weight, *masks]
        if not all(t.is_contiguous() and t.is_cpu for t in tensors) or not self.forward.fits(
            weight
        ):
            return False
        choose_masks(weight, self.forward, self.backward, forward, backward)
        self._chosen = _versions(weight, backward)
        return True

    def has_chosen(self, weight: Tensor, backward: Tensor) -> bool:
        """Whether `choose` has just written this backward mask from this weight; true but once."""
        chosen, self._chosen = self._chosen, ()
        return chosen == _versions(weight, backward)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(number for t in tensors for number in (t.data_ptr(), t._version))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        forward: Tensor,
        backward: Tensor,
        bias: Tensor | None,
        gradient: GroupPattern | None,
        products: SparseProducts | None,
    ) -> Tensor:
        if products is not None:
            y = products.product(products.forward, x, weight, forward, bias)
            if y is not None:
                return y
        return F.linear(x, weight * keep_factor(forward, weight.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, _, backward, bias, pattern, products = inputs
        ctx.save_for_backward(x, weight, backward)
        ctx.has_bias, ctx.pattern, ctx.products = bias is not None, pattern, products

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight, backward = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], ctx.has_bias]
        to_x, to_weight, to_bias = _linear_gradients(
            gradient, x, weight, backward, ctx.pattern, wanted, ctx.products
        )
        return to_x, to_weight, None, None, to_bias, None, None


def _linear_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    backward: Tensor,
    pattern: GroupPattern | None,
    wanted: Sequence[bool],
    products: SparseProducts | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the input (through the masked weight), the weight (dense) and the bias, as wanted."""
    rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]
    inputs = x.flatten(0, -2) if x.dim() > 1 else x[None]
    # Under autocast the product ran in a lower precision than what was saved.
    inputs = inputs.to(rows.dtype)
    to_x = None
    if wanted[0]:
        read = _thinned(rows, pattern)
        if products is not None:
            to_x = products.product(products.backward, read, weight, backward, None)
        if to_x is None:
            to_x = read @ (weight * keep_factor(backward, weight.dtype)).to(rows.dtype)
        to_x = to_x.view(x.shape).to(x.dtype)
    to_weight = (rows.t() @ inputs).to(weight.dtype) if wanted[1] else None
    to_bias = rows.sum(0).to(weight.dtype) if wanted[2] else None
    return to_x, to_weight, to_bias


@torch.library.custom_op("aerogel::nm_linear_bidirectional", mutates_args=())
def _nm_linear(x: Tensor, w: Tensor, m_f: Tensor, m_b: Tensor) -> Tensor:
    return F.linear(x, w * keep_factor(m_f, w.dtype))


@_nm_linear.register_fake
def _nm_linear_fake(x: Tensor, w: Tensor, m_f: Tensor, m_b: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _nm_linear_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, w, _, m_b = inputs
    ctx.save_for_backward(x, w, m_b)


def _nm_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, w, m_b = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], False]
    to_x, to_w, _ = _linear_gradients(gradient, x, w, m_b, None, wanted)
    return to_x, to_w, None, None


_nm_linear.register_autograd(_nm_linear_backward, setup_context=_nm_linear_context)


def nm_linear_bidirectional(x: Tensor, w: Tensor, m_f: Tensor, m_b: Tensor) -> Tensor:
    """x (w m_F)^T as one operator, ``aerogel::nm_linear_bidirectional``, opaque to compilers.

    dL/dx = dL/dy (w m_B) and dL/dw = dL/dy^T x, dense. `bidirectional_linear` is the same with a
    bias, for autocast, and for gradients that are thinned out.

    Args:
        x: (*, in).
        w: (out, in), dense, of x's type.
        m_f: (out, in) bool, n of every m inputs; see `NM.select`.
        m_b: (out, in) bool, n of every m outputs.

    Returns:
        (*, out).

    Raises:
        ValueError: shapes or types that do not fit.

    Reference:
        Fang et al., BDWP, arXiv 2309.13015.
    """
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"x must be (*, in) and w (out, in) of one type, got {x.dtype} {tuple(x.shape)} and "
            f"{w.dtype} {tuple(w.shape)}"
        )
    for name, mask in (("m_f", m_f), ("m_b", m_b)):
        if mask.dtype is not torch.bool or mask.shape != w.shape:
            raise ValueError(
                f"{name} must be bool {tuple(w.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    out: Tensor = _nm_linear(x, w, m_f, m_b)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        forward: Tensor,
        backward: Tensor,
        bias: Tensor | None,
        gradient: GroupPattern | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        kept = weight * keep_factor(forward, weight.dtype)
        zeros = [0] * len(stride)
        return torch.convolution(x, kept, bias, stride, padding, dilation, False, zeros, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, _, backward, bias, pattern, *geometry = inputs
        ctx.save_for_backward(x, weight, backward)
        ctx.has_bias, ctx.pattern = bias is not None, pattern
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight, backward = ctx.saved_tensors
        inputs = x.to(gradient.dtype)
        kept = (weight * keep_factor(backward, weight.dtype)).to(gradient.dtype)
        stride, padding, dilation = ctx.geometry
        zeros = [0] * len(stride)
        bias_sizes = [weight.shape[0]] if ctx.has_bias else None

        def products(g: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
            return torch.ops.aten.convolution_backward(
                g, inputs, kept, bias_sizes, stride, padding, dilation, False, zeros, 1, wanted
            )

        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = products(_thinned(gradient, ctx.pattern), [True, False, False])[0]
        _, to_weight, to_bias = products(gradient, [False, True, ctx.has_bias])
        assert to_weight is not None
        to_x = None if to_x is None else to_x.to(x.dtype)
        to_bias = None if to_bias is None else to_bias.to(weight.dtype)
        return to_x, to_weight.to(weight.dtype), None, None, to_bias, None, None, None, None


def _thinned(gradient: Tensor, pattern: GroupPattern | None) -> Tensor:
    """The output's gradient, (rows, out) or (batch, out, *), with the largest of every group."""
    if pattern is None:
        return gradient
    return gradient * keep_factor(pattern.select(gradient.abs()), gradient.dtype)


def bidirectional_linear(
    x: Tensor,
    weight: Tensor,
    forward: Tensor,
    backward: Tensor,
    bias: Tensor | None = None,
    gradient: GroupPattern | None = None,
    products: SparseProducts | None = None,
) -> Tensor:
    """x (W m_F)^T + b; dL/dx = dL/dy (W m_B), dL/dW = dL/dy^T x dense.

    Args:
        x: (*, in).
        weight: (out, in), dense.
        forward: bool mask m_F.
        backward: bool mask m_B.
        bias: (out,).
        gradient: thins out dL/dy in the product for dL/dx, along the outputs; None does not.
        products: of the weight's shape, for masks of their pattern; None multiplies densely.

    Reference:
        Fang et al., BDWP, arXiv 2309.13015.
    """
    return _Linear.apply(x, weight, forward, backward, bias, gradient, products)


def bidirectional_conv(
    x: Tensor,
    weight: Tensor,
    forward: Tensor,
    backward: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    gradient: GroupPattern | None = None,
) -> Tensor:
    """The same for a convolution of one group, in 1, 2 or 3 dimensions."""
    return _Conv.apply(x, weight, forward, backward, bias, gradient, stride, padding, dilation)


class _BidirectionalLayer(nn.Module):
    mask_forward: Tensor
    mask_backward: Tensor
    gradient_pattern: GroupPattern | None
    products: SparseProducts | None  # of a linear layer


class BidirectionalLinear(nn.Linear, _BidirectionalLayer):
    """A linear layer in the course of `Bidirectional` training."""

    def forward(self, input: Tensor) -> Tensor:
        return bidirectional_linear(
            input,
            self.weight,
            self.mask_forward,
            self.mask_backward,
            self.bias,
            self.gradient_pattern,
            self.products,
        )


class _BidirectionalConv(nn.modules.conv._ConvNd, _BidirectionalLayer):
    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.stride)
        masks = self.mask_forward, self.mask_backward
        geometry = self.stride, padding, self.dilation
        pattern = self.gradient_pattern
        return bidirectional_conv(input, self.weight, *masks, self.bias, *geometry, pattern)


class BidirectionalConv1d(_BidirectionalConv, nn.Conv1d):
    """A 1-D convolution in the course of `Bidirectional` training."""


class BidirectionalConv2d(_BidirectionalConv, nn.Conv2d):
    """A 2-D convolution in the course of `Bidirectional` training."""


class BidirectionalConv3d(_BidirectionalConv, nn.Conv3d):
    """A 3-D convolution in the course of `Bidirectional` training."""


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: BidirectionalLinear,
    nn.Conv1d: BidirectionalConv1d,
    nn.Conv2d: BidirectionalConv2d,
    nn.Conv3d: BidirectionalConv3d,
}


def attach_bidirectional(
    ref: ParamRef,
    mask: Tensor,
    gradient: GroupPattern | None = None,
    pattern: GroupPattern | None = None,
) -> None:
    """Turn a plain layer into its bidirectional form, in place.

    Args:
        ref: its weight.
        mask: the forward mask.
        gradient: thins out the output's gradient in the product for the input's.
        pattern: of the backward mask; a linear layer's products are sparse where it is N:M
            and keeps a quarter at most.

    Raises:
        ValueError: not a plain linear or convolution layer of one group, or a shared weight.
    """
    module = ref.module
    kind = _LAYERS.get(type(module))
    if kind is None or ref.attribute != "weight" or ref.aliases:
        raise ValueError(
            f"bidirectional masks need a plain Linear or Conv weight that nothing shares, "
            f"{ref.name!r} is in {type(module).__name__}"
        )
    if getattr(module, "groups", 1) != 1:
        raise ValueError(f"bidirectional masks need groups=1, {ref.name!r} has {module.groups}")
    module.register_buffer("mask_forward", mask)
    module.register_buffer("mask_backward", torch.ones_like(mask))
    module.gradient_pattern = gradient  # type: ignore[assignment]
    if kind is BidirectionalLinear:
        products = None
        if (
            isinstance(pattern, NM)
            and pattern.axis == 0
            and pattern.n <= MOST_KEPT * pattern.m
            and pattern.m <= LONGEST_GROUP
        ):
            products = SparseProducts((ref.shape[0], ref.shape[1]), pattern.n, pattern.m)
        module.products = products  # type: ignore[assignment]
    module.__class__ = kind


def is_bidirectional(module: nn.Module) -> bool:
    """Whether a layer is in the course of `Bidirectional` training."""
    return isinstance(module, _BidirectionalLayer)


def detach_bidirectional(ref: ParamRef) -> None:
    """Turn the layer back into a plain one."""
    plain = {bidirectional: kind for kind, bidirectional in _LAYERS.items()}
    kind = plain.get(type(ref.module))
    if kind is None:
        return
    ref.module.__class__ = kind
    del ref.module.mask_forward
    del ref.module.mask_backward
    del ref.module.gradient_pattern
    ref.module.__dict__.pop("products", None)
