"""The set of masks that a model carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.sparsity.select import (
    ParamSelection,
    leaf_parameter,
    select_parameters,
    unknown_name,
)

_BITS = ".bits"
_SHAPE = ".shape"


class MaskSet(MutableMapping[str, Tensor]):
    """Ordered mapping from parameter name to bool mask, ``True`` = kept.

    Args:
        masks: name to bool tensor of the parameter's shape. The tensors are held, not copied.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f"masks must map names to bool tensors, got {type(masks).__name__}")
        self._masks: dict[str, Tensor] = {}
        for name, mask in (masks or {}).items():
            self[name] = mask

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._masks[name]
        except KeyError:
            raise KeyError(unknown_name("mask", name, self._masks)) from None

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"masks: {name!r} must be a bool tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask of {name!r} must be bool, got {mask.dtype}")
        old = self._masks.get(name)
        if old is not None and old.shape != mask.shape:
            raise ValueError(
                f"mask of {name!r} has shape {tuple(mask.shape)}, expected {tuple(old.shape)}"
            )
        self._masks[name] = mask

    def __delitem__(self, name: str) -> None:
        del self._masks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return list(self) == list(other) and all(
            self[name].shape == other[name].shape and torch.equal(self[name], other[name])
            for name in self
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {density:.4f}" for name, density in self.layer_density().items())
        return f"MaskSet(density={self.density():.4f}, {{{rows}}})"

    @classmethod
    def ones(cls, selection: ParamSelection) -> MaskSet:
        """Masks that keep everything, each on its weight's device."""
        return cls(
            {
                name: torch.ones_like(ref.parameter, dtype=torch.bool)
                for name, ref in selection.items()
            }
        )

    @classmethod
    def from_weights(
        cls, model: nn.Module | ParamSelection, names: Mapping[str, object] | None = None
    ) -> MaskSet:
        """Masks of the weights that are not zero now.

        Args:
            model: a selection, or a model whose linear and convolution weights are taken.
            names: restrict to these names (any mapping, e.g. another `MaskSet`).
        """
        selection = model if isinstance(model, ParamSelection) else select_parameters(model)
        weights = selection.weights()
        if names is not None:
            weights = {name: weights[name] for name in names}
        return cls({name: weight != 0 for name, weight in weights.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MaskSet:
        """Masks as others publish them: a 0 or 1 for every weight, of any type.

        Args:
            tensors: parameter name to mask, 1 = kept; names as `torch.nn.utils.prune` makes them
                ("fc.weight_mask") or ending in ".mask" are those of "fc.weight".

        Raises:
            ValueError: a tensor with other values, or two masks of one parameter.
        """
        masks = cls()
        for key, tensor in tensors.items():
            name = key.removesuffix("_mask").removesuffix(".mask")
            if not bool(((tensor == 0) | (tensor == 1)).all()):
                raise ValueError(f"{key!r} is no mask: expected 0 and 1 only")
            if name in masks:
                raise ValueError(f"{key!r} is a second mask of {name!r}")
            masks[name] = tensor.bool()
        return masks

    @property
    def nnz(self) -> int:
        """Weights kept, over all masks."""
        return sum(int(torch.count_nonzero(mask)) for mask in self._masks.values())

    @property
    def numel(self) -> int:
        """Weights covered, over all masks."""
        return sum(mask.numel() for mask in self._masks.values())

    def density(self) -> float:
        """Fraction kept, over all masks."""
        return self.nnz / max(1, self.numel)

    def sparsity(self) -> float:
        """Fraction of zeros, over all masks."""
        return 1.0 - self.density()

    def layer_density(self) -> dict[str, float]:
        """Fraction kept, per mask."""
        return {n: int(torch.count_nonzero(m)) / m.numel() for n, m in self._masks.items()}

    def clone(self) -> MaskSet:
        """An independent copy."""
        return MaskSet({name: mask.clone() for name, mask in self._masks.items()})

    def to(self, device: torch.device | str) -> MaskSet:
        """The masks on another device."""
        return MaskSet({name: mask.to(device) for name, mask in self._masks.items()})

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to exactly 0, in place.

        Raises:
            ValueError: a name the model does not have, or a mask of another shape.
        """
        for name, weight in self._targets(model).items():
            weight.masked_fill_(~self._masks[name].to(weight.device), 0.0)

    def check_fits(self, model: nn.Module) -> None:
        """Raise what `apply_` would, and change nothing."""
        self._targets(model)

    def _targets(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self._target(model, name) for name in self._masks}

    def hamming(self, other: MaskSet) -> int:
        """Number of weights on which two mask sets differ."""
        self._check_same(other)
        return sum(
            int(torch.count_nonzero(self[name] ^ other[name].to(self[name].device)))
            for name in self
        )

    def __and__(self, other: MaskSet) -> MaskSet:
        self._check_same(other)
        return MaskSet({name: self[name] & other[name].to(self[name].device) for name in self})

    def __or__(self, other: MaskSet) -> MaskSet:
        self._check_same(other)
        return MaskSet({name: self[name] | other[name].to(self[name].device) for name in self})

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, a bit per weight: ``<name>.bits`` (uint8), ``<name>.shape`` (int64)."""
        state: dict[str, Tensor] = {}
        for name, mask in self._masks.items():
            bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
            state[name + _BITS] = torch.from_numpy(bits)
            state[name + _SHAPE] = torch.tensor(mask.shape, dtype=torch.int64)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MaskSet:
        """The masks that `state_dict` packed.

        Raises:
            ValueError: bits that do not fit their shape, or a part that is missing.
        """
        names = [key.removesuffix(_BITS) for key in state if key.endswith(_BITS)]
        unexpected = set(state) - {n + end for n in names for end in (_BITS, _SHAPE)}
        if unexpected:
            raise ValueError(f"mask state has unexpected entries: {sorted(unexpected)}")
        return cls({name: _unpack(name, state) for name in names})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy packed masks into these, in place.

        Raises:
            ValueError: other names or other shapes.
        """
        loaded = MaskSet.from_state_dict(state)
        self._check_same(loaded)
        for name, mask in self._masks.items():
            mask.copy_(loaded[name])

    def _check_same(self, other: MaskSet) -> None:
        if set(self) != set(other):
            difference = sorted(set(self) ^ set(other))
            raise ValueError(f"mask sets name different weights: {difference}")
        for name in self:
            if self[name].shape != other[name].shape:
                raise ValueError(
                    f"masks of {name!r} have shapes {tuple(self[name].shape)} and "
                    f"{tuple(other[name].shape)}"
                )

    def _target(self, model: nn.Module, name: str) -> Tensor:
        weight = find_parameter(model, name)
        if weight.shape != self._masks[name].shape:
            raise ValueError(
                f"mask of {name!r} has shape {tuple(self._masks[name].shape)}, the weight "
                f"{tuple(weight.shape)}"
            )
        return weight.data


def find_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The stored parameter of a model by its plain name, seen through parametrizations.

    Raises:
        ValueError: the model has no such parameter; the message lists the nearest names.
    """
    owner, _, attribute = name.rpartition(".")
    try:
        return leaf_parameter(model.get_submodule(owner), attribute)
    except (AttributeError, ValueError):
        known = [n.replace("parametrizations.", "") for n, _ in model.named_parameters()]
        known = [n.removesuffix(".original") for n in known]
        raise ValueError(unknown_name("parameter", name, known)) from None


def _unpack(name: str, state: Mapping[str, Tensor]) -> Tensor:
    if name + _SHAPE not in state:
        raise ValueError(f"mask state has no shape for {name!r}")
    shape = tuple(int(side) for side in state[name + _SHAPE])
    numel = int(np.prod(shape, dtype=np.int64))
    bits = state[name + _BITS].cpu().numpy()
    if (
        bits.dtype != np.uint8
        or bits.ndim != 1
        or bits.size != -(-numel // 8)
        or min(shape, default=0) < 0
    ):
        raise ValueError(f"mask bits of {name!r} do not fit its shape {shape}")
    flat = np.unpackbits(bits, count=numel, bitorder="little").astype(bool)
    return torch.from_numpy(flat).view(shape)
