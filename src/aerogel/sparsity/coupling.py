"""Couplings: how a mask acts on the weight, on its gradient and on the optimizer's state.

The one place where the systems really differ. Let g be the gradient of the loss with respect to the
weight that the forward pass uses, m the mask, W the stored weight.

| mode            | forward        | gradient of W            | after the optimizer step           |
|-----------------|----------------|--------------------------|------------------------------------|
| Hard            | W (0 outside m)| g m                      | W <- W m, state <- state m         |
| HardDenseGrad   | W (0 outside m)| g                        | W <- W m, momentum <- momentum m   |
| Frozen          | W m            | g m                      | masked W and state as before it    |
| STE             | W m            | g                        | -                                  |
| SRSTE           | W m            | g + lambda (1 - m) W     | -                                  |
| Soft            | W (m+beta(1-m))| g, or g (m + beta (1-m)) | -                                  |
| Shrink          | W              | g                        | W <- W (m + alpha (1 - m))         |
| Bidirectional   | W m_F          | g; dL/dx uses W m_B      | -                                  |

What happens in the forward pass is a `torch.nn.utils.parametrize` parametrization or, for
`Bidirectional`, the layer's own product; the rest is done by `MaskController`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.arguments import check_number
from aerogel.sparsity.bidirectional import attach_bidirectional, detach_bidirectional
from aerogel.sparsity.keep import Keep, StateMask
from aerogel.sparsity.parametrizations import (
    MaskedWeight,
    SoftMaskedWeight,
    attach_parametrization,
    detach_parametrization,
    find_parametrization,
)
from aerogel.sparsity.patterns import NM, GroupPattern
from aerogel.sparsity.schedules import Schedule
from aerogel.sparsity.select import ParamRef, unknown_name

# SR-STE's regularisation strength, at the scale of ImageNet with SGD.
SR_STE_LAMBDA = 2e-4

# Smaller than this a shrunken weight is on its way to a denormal, which CPUs multiply very slowly.
_FLUSH = 1e-20


@dataclass(frozen=True)
class Coupling:
    """How masks act; the base of the modes."""

    name: ClassVar[str]
    # Whether the leaf's gradient holds what masked weights would want (needed to grow by gradient).
    dense_gradient: ClassVar[bool] = True
    state_mask: ClassVar[StateMask] = "none"
    # Whether masked values and their state are put back after the optimizer step.
    freezes: ClassVar[bool] = False
    # Whether gradients are masked as they arrive, so that whoever clips them sees what is trained.
    masks_gradient: ClassVar[bool] = False
    # Whether anything is done around the optimizer step; if not, masks are never spread to bits.
    acts_on_steps: ClassVar[bool] = True
    # Whether `after_step` looks at the learning rate, which is looked up for it in every step.
    reads_lr: ClassVar[bool] = True

    def parametrization(self, mask: Tensor) -> nn.Module | None:
        """The forward part, or ``None`` if the mode works on the stored weight alone."""
        return None

    def attach(self, ref: ParamRef, mask: Tensor) -> None:
        """Install the forward part around this very mask tensor."""
        parametrization = self.parametrization(mask)
        if parametrization is not None:
            attach_parametrization(ref, parametrization)

    def detach(self, ref: ParamRef, mask: Tensor) -> None:
        """Bake W * m into the stored weight and remove the forward part."""
        detach_parametrization(ref, mask)

    def works_in_place(self, ref: ParamRef) -> bool:
        """Whether the controller shall hold masked values aside, with zeros in the parameter.

        Raises:
            ValueError: the mode needs a parametrization and the parameter does not allow one.
        """
        parametrized = self.parametrization(torch.ones(1, dtype=torch.bool)) is not None
        if ref.flat_buffered and parametrized:
            raise ValueError(
                f"coupling {self.name!r} cannot act on {ref.name!r}: recurrent layers hand flat "
                f"weights to one fused kernel, so they must stay in place"
            )
        return False

    def mask_holder(self, ref: ParamRef) -> tuple[nn.Module, str] | None:
        """The module and buffer that hold the mask, or ``None`` if the controller does."""
        own = find_parametrization(ref.module, ref.attribute)
        return None if own is None else (own, "mask")

    def select_largest(self, ref: ParamRef, weight: Tensor, pattern: GroupPattern) -> Tensor:
        """The mask that keeps the largest magnitudes of a pattern; may be the one in force.

        A coupling that needs more of the same weights may see to it at once.
        """
        return pattern.select_largest(weight)

    def masks_changed(self, ref: ParamRef, weight: Tensor) -> None:
        """Called after the mask of a parameter was decided anew."""

    def before_step(self, leaf: nn.Parameter, keep: Keep) -> None:
        """Change the gradient before the optimizer sees it."""

    def after_step(self, leaf: nn.Parameter, keep: Keep, lr: float) -> None:
        """Change the stored weight after the optimizer step and the mask update."""

    def set_step(self, ref: ParamRef, t: int) -> None:
        """Called before the forward pass of step ``t``."""


@dataclass(frozen=True)
class Hard(Coupling):
    """Pruned weights are zero and stay zero; their gradient and state are masked."""

    name: ClassVar[str] = "hard"
    state_mask: ClassVar[StateMask] = "all"
    masks_gradient: ClassVar[bool] = True
    reads_lr: ClassVar[bool] = False

    def before_step(self, leaf: nn.Parameter, keep: Keep) -> None:
        if leaf.grad is not None:
            keep.zero_(leaf.grad)

    def after_step(self, leaf: nn.Parameter, keep: Keep, lr: float) -> None:
        keep.zero_(leaf)


@dataclass(frozen=True)
class HardDenseGrad(Coupling):
    """Pruned weights are zeroed after each step, but the optimizer sees the dense gradient.

    Args:
        reset_state: mask every state tensor. By default only SGD's momentum is masked, so that
            Adam's moments of pruned weights stay warm.
    """

    reset_state: bool = False
    name: ClassVar[str] = "hard_dense_grad"
    reads_lr: ClassVar[bool] = False

    @property
    def state_mask(self) -> StateMask:  # type: ignore[override]
        return "all" if self.reset_state else "momentum"

    def after_step(self, leaf: nn.Parameter, keep: Keep, lr: float) -> None:
        keep.zero_(leaf)


@dataclass(frozen=True)
class Frozen(Coupling):
    """Pruned weights leave the forward pass but keep their last value, and may come back.

    Args:
        in_place: keep zeros in the parameter itself and the pruned values beside it, instead of a
            parametrization. The model's ``state_dict`` is then that of the sparse network at any
            moment; recurrent weights are always treated so.
    """

    in_place: bool = False
    name: ClassVar[str] = "frozen"
    dense_gradient: ClassVar[bool] = False
    state_mask: ClassVar[StateMask] = "all"
    freezes: ClassVar[bool] = True
    reads_lr: ClassVar[bool] = False

    def parametrization(self, mask: Tensor) -> nn.Module:
        return MaskedWeight(mask)

    def works_in_place(self, ref: ParamRef) -> bool:
        return self.in_place or ref.flat_buffered


@dataclass(frozen=True)
class STE(Coupling):
    """Straight-through: pruned weights leave the forward pass but are trained all the same."""

    name: ClassVar[str] = "ste"
    acts_on_steps: ClassVar[bool] = False

    def parametrization(self, mask: Tensor) -> nn.Module:
        return MaskedWeight(mask, straight=True)


@dataclass(frozen=True)
class SRSTE(Coupling):
    """Straight-through with pruned weights pulled to zero: g + lambda * (1 - m) * W.

    The pull is added once per optimizer step (not per micro-batch, and after gradients were
    unscaled), or with ``decoupled`` applied to the weight itself as AdamW does with weight decay.

    Reference:
        Zhou et al., arXiv 2102.04010.
    """

    lam: float = SR_STE_LAMBDA
    decoupled: bool = False
    name: ClassVar[str] = "sr_ste"

    def __post_init__(self) -> None:
        check_number("lam", self.lam, "[0, inf)")

    def parametrization(self, mask: Tensor) -> nn.Module:
        return MaskedWeight(mask, straight=True)

    def before_step(self, leaf: nn.Parameter, keep: Keep) -> None:
        if leaf.grad is not None and not self.decoupled:
            leaf.grad.add_(keep.pruned_part(leaf), alpha=self.lam)

    def after_step(self, leaf: nn.Parameter, keep: Keep, lr: float) -> None:
        if self.decoupled:
            leaf.sub_(keep.pruned_part(leaf), alpha=lr * self.lam)


@dataclass(frozen=True)
class Soft(Coupling):
    """Pruned weights play the part beta(t) in the forward pass.

    Args:
        beta: schedule of the part, or a constant.
        grad: ``"ste"`` or ``"chain"``, see `soft`.

    Reference:
        Bambhaniya et al., arXiv 2402.04744.
    """

    beta: Schedule | float = 1.0
    grad: Literal["ste", "chain"] = "ste"
    name: ClassVar[str] = "soft"
    acts_on_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.grad not in ("ste", "chain"):
            raise ValueError(f"grad must be 'ste' or 'chain', got {self.grad!r}")
        if not isinstance(self.beta, Schedule):
            check_number("beta", self.beta, "[0, 1]")

    def parametrization(self, mask: Tensor) -> nn.Module:
        return SoftMaskedWeight(mask, self._value(0), self.grad)

    def set_step(self, ref: ParamRef, t: int) -> None:
        own = find_parametrization(ref.module, ref.attribute)
        if isinstance(own, SoftMaskedWeight):
            own.beta.fill_(self._value(t))

    def _value(self, t: int) -> float:
        return self.beta.value(t) if isinstance(self.beta, Schedule) else float(self.beta)


@dataclass(frozen=True)
class Shrink(Coupling):
    """After each step the pruned weights are multiplied by ``alpha`` (0 = hard thresholding).

    Reference:
        Wang et al., ISS-P, arXiv 2303.09650.
    """

    alpha: float = 0.95
    name: ClassVar[str] = "shrink"
    reads_lr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, "[0, 1]")

    def after_step(self, leaf: nn.Parameter, keep: Keep, lr: float) -> None:
        shrunk = keep.pruned_part(leaf).mul_(self.alpha)
        keep.join_(leaf, F.hardshrink(shrunk, _FLUSH))


@dataclass(frozen=True)
class Bidirectional(Coupling):
    """One mask for the forward product and another for the input gradient; dense weight gradient.

    The controller's masks are the forward ones; the backward ones follow from ``backward``.

    Args:
        backward: pattern of the backward mask, scored by magnitude; ``None`` = dense.
        gradient: pattern that thins out the output's gradient in the same product, along the
            outputs; ``None`` does not.

    Reference:
        Fang et al., BDWP, arXiv 2309.13015.
    """

    backward: GroupPattern | None = field(default_factory=lambda: NM(2, 8, axis=0))
    gradient: GroupPattern | None = None
    name: ClassVar[str] = "bidirectional"
    acts_on_steps: ClassVar[bool] = False

    def attach(self, ref: ParamRef, mask: Tensor) -> None:
        if self.backward is not None:
            self.backward.validate(ref.shape, ref.name)
        attach_bidirectional(ref, mask, self.gradient, self.backward)

    def mask_holder(self, ref: ParamRef) -> tuple[nn.Module, str]:
        return ref.module, "mask_forward"

    def detach(self, ref: ParamRef, mask: Tensor) -> None:
        with torch.no_grad():
            ref.parameter.masked_fill_(~mask, 0.0)
        detach_bidirectional(ref)

    def select_largest(self, ref: ParamRef, weight: Tensor, pattern: GroupPattern) -> Tensor:
        """With the backward mask and what both products read, from one reading of the weight."""
        products = getattr(ref.module, "products", None)
        if products is not None and products.is_forward(pattern):
            forward = ref.module.get_buffer("mask_forward")
            if products.choose(weight, forward, ref.module.get_buffer("mask_backward")):
                return forward
        return super().select_largest(ref, weight, pattern)

    def masks_changed(self, ref: ParamRef, weight: Tensor) -> None:
        if self.backward is None:
            return
        products = getattr(ref.module, "products", None)
        mask = ref.module.get_buffer("mask_backward")
        if products is None or not (
            products.has_chosen(weight, mask) or products.choose(weight, None, mask)
        ):
            mask.copy_(self.backward.select_largest(weight))


COUPLINGS: dict[str, type[Coupling]] = {
    kind.name: kind
    for kind in (Hard, HardDenseGrad, Frozen, STE, SRSTE, Soft, Shrink, Bidirectional)
}


def make_coupling(kind: str | Coupling) -> Coupling:
    """The coupling of that name with its defaults; a `Coupling` is returned as it is."""
    if isinstance(kind, Coupling):
        return kind
    if kind not in COUPLINGS:
        raise ValueError(unknown_name("coupling", kind, COUPLINGS))
    return COUPLINGS[kind]()
