"""Going back to earlier weights, and the controls that show what going back is worth (P11).

`rewind` restores a `Snapshot` and applies masks; `reinitialize` and `shuffle_masks` make the
control networks of the lottery ticket literature.

Reference: Frankle & Carbin, ICLR 2019, arXiv 1803.03635; Frankle et al., "Linear Mode Connectivity
and the Lottery Ticket Hypothesis", arXiv 1912.05671 (rewinding to k > 0); Zhou et al., arXiv
1905.01067 (signs).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from aerogel.sparsity.mask_set import MaskSet
from aerogel.sparsity.select import ParamSelection, select_parameters, unknown_name
from aerogel.sparsity.snapshot import Snapshot, copied, plain_buffers, plain_params

Part = Literal["params", "buffers", "optimizer"]
PARTS: tuple[Part, ...] = ("params", "buffers", "optimizer")
ReinitMode = Literal["fresh", "shuffle", "constant_sign"]


@torch.no_grad()
def rewind(
    model: nn.Module,
    snapshot: Snapshot,
    what: Collection[Part] = ("params", "buffers"),
    masks: Mapping[str, Tensor] | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> None:
    """Put a model back to a snapshot, in place, then apply masks.

    Every parameter (biases and norms too) and every buffer is restored. Optimizer state is not
    unless asked for: a lottery-ticket round starts with a fresh optimizer.

    Args:
        model: the model the snapshot was taken of, with or without mask parametrizations.
        snapshot: the state to return to.
        what: any of "params", "buffers", "optimizer".
        masks: name -> bool mask (True = kept), applied after restoring.
        optimizer: required for "optimizer".

    Raises:
        ValueError: unknown part, another architecture (names the tensor), "optimizer" without an
            optimizer or without captured state.

    Reference: arXiv 1803.03635, section 1.
    """
    for part in what:
        if part not in PARTS:
            raise ValueError(f"what={tuple(what)!r}: {unknown_name('part', part, PARTS)}")
    wanted = []
    if "params" in what:
        wanted.append((plain_params(model), snapshot.params, "parameter"))
    if "buffers" in what:
        wanted.append((plain_buffers(model), snapshot.buffers, "buffer"))
    for current, saved, kind in wanted:
        _check_same_tensors(current, saved, kind)
    if "optimizer" in what and (optimizer is None or snapshot.optimizer is None):
        lacking = "the optimizer argument" if optimizer is None else "optimizer state captured"
        raise ValueError(f"what includes 'optimizer', but there is no {lacking}")
    zeros = MaskSet(masks)
    zeros.check_fits(model)
    for current, saved, _ in wanted:
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    if "optimizer" in what and optimizer is not None and snapshot.optimizer is not None:
        optimizer.load_state_dict(copied(snapshot.optimizer))
    zeros.apply_(model)


@torch.no_grad()
def reinitialize(
    model: nn.Module,
    mode: ReinitMode = "fresh",
    *,
    masks: Mapping[str, Tensor] | None = None,
    snapshot: Snapshot | None = None,
    initializer: Callable[[nn.Module], object] | None = None,
    replace: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Give a (masked) network other initial values: the controls of the lottery ticket.

    Args:
        model: any module without parametrizations.
        mode: "fresh" draws all parameters anew with the same initialiser (each module's
            `reset_parameters`, or `initializer`); "shuffle" permutes the initial values of the
            kept weights inside each tensor; "constant_sign" keeps every weight's sign and permutes
            the magnitudes.
        masks: name -> bool mask; applied afterwards. Without masks "shuffle" and "constant_sign"
            treat every selected linear and convolution weight as kept.
        snapshot: the initial values for "shuffle" and "constant_sign" (the model is rewound to it
            first); None takes the model's present values as the initial ones.
        initializer: for "fresh", called as `initializer(model)` with the global random state
            seeded from `generator`; needed where a module has parameters of its own but no
            `reset_parameters`.
        replace: draw with replacement instead of permuting.
        generator: source of randomness; the global generators are left as they were.

    Raises:
        ValueError: unknown mode, a parametrized model, `snapshot` with "fresh", a module that
            cannot be re-initialised, or masks that do not fit.

    Reference: arXiv 1803.03635, appendix F ("random reinitialization", "resampling"); arXiv
    1905.01067.
    """
    modes = ("fresh", "shuffle", "constant_sign")
    if mode not in modes:
        raise ValueError(unknown_name("mode", mode, modes))
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name or 'model'} is parametrized; finalize it before")
    zeros = MaskSet(masks)
    zeros.check_fits(model)
    if mode == "fresh":
        if snapshot is not None:
            raise ValueError("snapshot only applies to 'shuffle' and 'constant_sign'")
        _draw_anew(model, initializer, generator)
    else:
        kept = _kept(model, masks)
        if snapshot is not None:
            rewind(model, snapshot)
        weights = dict(model.named_parameters())
        for name, mask in kept.items():
            _resample_(weights[name], mask, mode, replace, generator)
    zeros.apply_(model)


def shuffle_masks(
    masks: Mapping[str, Tensor],
    mode: Literal["layerwise", "global"] = "layerwise",
    generator: torch.Generator | None = None,
) -> MaskSet:
    """Masks of the same density at random places (random tickets).

    Structured patterns are not preserved.

    Args:
        masks: name -> bool mask.
        mode: "layerwise" permutes inside each tensor (layer densities stay), "global" over all
            tensors together (only the total stays).
        generator: source of randomness, on the CPU.

    Raises:
        ValueError: unknown mode or no masks.
    """
    if mode not in ("layerwise", "global"):
        raise ValueError(unknown_name("mode", mode, ("layerwise", "global")))
    if not masks:
        raise ValueError("masks is empty; there is nothing to shuffle")
    if mode == "layerwise":
        return MaskSet({name: _permuted(mask, generator) for name, mask in masks.items()})
    flat = torch.cat([mask.flatten().cpu() for mask in masks.values()])
    parts = _permuted(flat, generator).split([mask.numel() for mask in masks.values()])
    return MaskSet(
        {
            name: part.clone().view(mask.shape).to(mask.device)
            for (name, mask), part in zip(masks.items(), parts, strict=True)
        }
    )


def _permuted(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)


def _kept(model: nn.Module, masks: Mapping[str, Tensor] | None) -> MaskSet:
    if masks is None:
        return MaskSet.ones(select_parameters(model))
    selection: ParamSelection = select_parameters(model, include=tuple(masks), biases=False)
    for name, mask in masks.items():
        if name not in selection:
            raise ValueError(unknown_name("parameter", name, selection))
        if mask.shape != selection[name].shape:
            raise ValueError(
                f"mask of {name!r} has shape {tuple(mask.shape)}, the weight "
                f"{tuple(selection[name].shape)}"
            )
    return MaskSet(masks)


def _resample_(
    weight: Tensor,
    mask: Tensor,
    mode: ReinitMode,
    replace: bool,
    generator: torch.Generator | None,
) -> None:
    mask = mask.to(weight.device)
    values = weight[mask]
    count = values.numel()
    if replace and count:
        picks = torch.randint(count, (count,), generator=generator)
    else:
        picks = torch.randperm(count, generator=generator)
    drawn = values[picks.to(weight.device)]
    if mode == "constant_sign":
        drawn = torch.where(torch.signbit(values), -drawn.abs(), drawn.abs())
    weight[mask] = drawn


def _draw_anew(
    model: nn.Module,
    initializer: Callable[[nn.Module], object] | None,
    generator: torch.Generator | None,
) -> None:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(int(seed))
        else:
            torch.seed()
        if initializer is not None:
            initializer(model)
            return
        resets = []
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if callable(reset):
                resets.append(reset)
            elif any(True for _ in module.parameters(recurse=False)):
                raise ValueError(
                    f"{name or 'model'} ({type(module).__name__}) has parameters but no "
                    "reset_parameters; pass initializer="
                )
        for reset in reversed(resets):  # children first, as they were constructed
            reset()


def _check_same_tensors(
    current: Mapping[str, Tensor], saved: Mapping[str, Tensor], kind: str
) -> None:
    odd = sorted(set(current) ^ set(saved))
    if odd:
        where = "model" if odd[0] in saved else "snapshot"
        raise ValueError(f"the {where} has no {kind} {odd[0]!r}; was it another architecture?")
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{kind} {name!r} has shape {tuple(tensor.shape)}, in the snapshot "
                f"{tuple(saved[name].shape)}"
            )
