"""The student of GPUSQ-ViT: a network in 2:4, then in integers, and its packed form.

masks = mask_student(model, selection, pattern)     # attaches the masks
quantise_student(student, bits=8)                   # attaches quantisers behind them
plain = bake_student(student)                       # a plain network again
state = export_nm(student)                          # packed weights and scales
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from aerogel.kernels import NM24Weight, NMForm, quantize_rows
from aerogel.runtime.module_state import bake_parametrizations
from aerogel.sparsity.attention_implementation import switchable_attention
from aerogel.sparsity.blocks import ForwardFn, calibrating, find_blocks, run_batch
from aerogel.sparsity.cost import FLOPS_PER_MAC, inference_flops
from aerogel.sparsity.fake_attention import quantise_attention, restore_attention
from aerogel.sparsity.fake_quantize import (
    INPUT_QUANTISER,
    ActivationQuantiser,
    AttentionQuantisers,
    FakeQuantize,
    QuantisedAttention,
    attach_weight_quantiser,
    quantise_input,
    quantisers,
    remove_activation_quantisers,
)
from aerogel.sparsity.masks import MaskSet, build_masks
from aerogel.sparsity.parametrizations import (
    MaskedWeight,
    attach_parametrization,
    find_parametrization,
    restore_parameter_order,
)
from aerogel.sparsity.patterns import NM, NMPairs, Pattern, parse_pattern
from aerogel.sparsity.select import ParamRef, ParamSelection, select_parameters

FLOAT_BITS = 32
PAIR = "pair"


def parse_nm(pattern: str | Pattern) -> NM | NMPairs:
    """The pattern along inputs that "2:4", "pair" or "2:4:pairs" names: what the hardware has.

    Raises:
        ValueError: another pattern.
    """
    parsed = NMPairs(2, 4) if pattern == PAIR else parse_pattern(pattern)
    if not (isinstance(parsed, (NM, NMPairs)) and parsed in (NM(2, 4), NMPairs(2, 4))):
        raise ValueError(f"pattern={str(pattern)!r}: expected '2:4' along inputs, or 'pair'")
    return parsed


def linear_weights(
    model: nn.Module,
    pattern: Pattern,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_incompatible: bool = False,
) -> ParamSelection:
    """The linear weights of attention and MLP that become sparse.

    Those included; else what the model names in `prune_targets()`; else all inside its blocks, so
    that patch embedding and head stay dense.

    Args:
        model: any network.
        pattern: what has to fit them.
        include: globs of weights.
        exclude: globs of weights to leave dense.
        skip_incompatible: leave weights dense that the pattern does not fit.

    Raises:
        ValueError: a weight that the pattern does not fit (named) or that is not of a linear layer,
            or none at all.
    """
    chosen = select_parameters(
        model, include=tuple(include) or proposed_weights(model), exclude=tuple(exclude)
    )
    refs = []
    for name, ref in chosen.items():
        callable_linear = isinstance(ref.module, nn.Linear) and not isinstance(
            ref.module, NonDynamicallyQuantizableLinear
        )
        if not callable_linear:
            raise ValueError(
                f"{name!r} belongs to a {type(ref.module).__name__}: expected a linear layer whose "
                "input can be quantised; exclude it"
            )
        try:
            pattern.validate(ref.shape, name)
        except ValueError as error:
            if not skip_incompatible:
                raise ValueError(f"{error}; skip_incompatible=True leaves it dense") from None
        else:
            refs.append(ref)
    return ParamSelection(refs)


def mask_student(model: nn.Module, selection: ParamSelection, pattern: Pattern) -> MaskSet:
    """Keep the largest of every group, once and for all; in place.

    The masks are parametrizations: W * M forward, masked gradients. What is pruned becomes 0 in the
    stored weights too, where weight decay and momentum leave it.

    Returns:
        The masks in force, True = kept.

    Raises:
        ValueError: a weight that is parametrized already, or not finite.
    """
    magnitudes = {name: ref.parameter.detach().abs() for name, ref in selection.items()}
    masks = build_masks(magnitudes, pattern=pattern)
    for name, ref in selection.items():
        attach_parametrization(ref, MaskedWeight(masks[name]))
    masks.apply_(model)
    return masks


def student_masks(student: nn.Module) -> tuple[ParamSelection, MaskSet]:
    """The weights that carry masks, and those.

    Raises:
        ValueError: there are none.
    """
    found: list[tuple[ParamRef, Tensor]] = []
    for ref in select_parameters(student).values():
        own = find_parametrization(ref.module, ref.attribute)
        if isinstance(own, MaskedWeight):
            found.append((ref, own.mask))
    if not found:
        raise ValueError(
            f"{type(student).__name__} has no 2:4 masks: prune it with gpusq_prune first"
        )
    return ParamSelection([r for r, _ in found]), MaskSet({r.name: m for r, m in found})


def quantise_student(
    student: nn.Module,
    bits: int,
    *,
    attention: bool = True,
    percentile: float | None = None,
) -> None:
    """Put quantisers behind the masks, before the masked layers and into attention; in place.

    Args:
        student: with masks.
        bits: of the masked layers' weights and inputs.
        attention: round both operands of both products of every attention too, to 8 bits.
        percentile: of the magnitudes of activations that their range covers; None is all.

    Raises:
        ValueError: no masks, or quantisers already; no attention product to be found.
    """
    selection, _ = student_masks(student)
    if any(True for _ in quantisers(student)):
        raise ValueError(f"this {type(student).__name__} is quantised already")
    if attention:
        require_attention(student)
    for ref in selection.values():
        attach_weight_quantiser(ref, bits)
        for module, _ in ref.places:
            quantise_input(module, bits, percentile)
    if not attention:
        return
    quantise_attention(student, percentile)
    for parent, name in list(_attention_products(student)):
        core = parent._modules[name]
        assert core is not None
        quantised = QuantisedAttention(core, percentile=percentile)
        parent._modules[name] = quantised.train(core.training).to(next(student.parameters()).device)


def bake_student_(student: nn.Module) -> nn.Module:
    """Leave a plain network, in place: weights as they act now, activations in float.

    The weights are whole multiples of a scale for every output, so that packing them in int8 loses
    nothing.
    """
    masked, _ = student_masks(student)
    remove_activation_quantisers(student)
    restore_attention(student)
    bake_parametrizations(student)
    for ref in masked.values():
        for module, attribute in ref.places:
            module.get_parameter(attribute).requires_grad_(True)
            restore_parameter_order(module)
    return student


def bake_student(student: nn.Module) -> nn.Module:
    """`bake_student_` of a copy."""
    return bake_student_(copy.deepcopy(student))


@torch.no_grad()
def export_nm(student: nn.Module) -> dict[str, NM24Weight | Tensor]:
    """The network as it is deployed: packed 2:4 weights, scales, and everything else as it is.

    `{name: w.block_rows() if isinstance(w, NM24Weight) else w}` is what `aerogel.save` takes.

    Args:
        student: with 2:4 masks; with quantisers, weights are integers, of 8 bits or (if they have
            4 or fewer) 4, else floating point.

    Returns:
        By the names of the plain network: `NM24Weight`s for the masked weights and tensors for the
        rest; also `<layer>.input_scale` (0-dim) for the input of every quantised layer.

    Raises:
        ValueError: no masks, or masks that are not 2:4 or pairs.
    """
    selection, masks = student_masks(student)
    state: dict[str, NM24Weight | Tensor] = dict(bake_student(student).state_dict())
    for name, ref in selection.items():
        form = _form(masks[name], name)
        chain: Any = ref.module.parametrizations[ref.attribute]  # type: ignore[index]
        weight = chain.original * masks[name]
        quantiser = next((part for part in chain if isinstance(part, FakeQuantize)), None)
        if quantiser is None:
            state[name] = NM24Weight.pack(weight, masks[name], form)
            continue
        levels, scales = quantize_rows(weight, quantiser.bits)
        bits = 8 if quantiser.bits > 4 else 4
        state[name] = NM24Weight.pack(levels, masks[name], form, bits=bits, scales=scales)
        own = getattr(ref.module, INPUT_QUANTISER)
        assert isinstance(own, ActivationQuantiser)
        state[name.removesuffix(ref.attribute) + "input_scale"] = own.scale
    return state


@dataclass(frozen=True)
class GPUSQCost:
    """What a student costs, on paper: three counts that must not be multiplied with each other.

    Attributes:
        dense_macs, macs: multiply-adds of one forward pass, of the dense network and without those
            of pruned weights.
        dense_bit_operations, bit_operations: each multiply-add times the bits of both operands (32
            where they stay in float).
        dense_bytes, bytes: of the covered weights, in float32 and packed with index and scales.
    """

    dense_macs: int
    macs: int
    dense_bit_operations: int
    bit_operations: int
    dense_bytes: int
    bytes: int


def gpusq_cost(student: nn.Module, batch: Any, *, forward: ForwardFn = run_batch) -> GPUSQCost:
    """Count what a student costs on one batch.

    Args:
        student: with masks, and with quantisers or without.
        batch: as `run_batch` takes it.
        forward: how to run it.

    Raises:
        ValueError: no masks.
    """
    _, masks = student_masks(student)
    flops = inference_flops(bake_student(student), masks, batch, forward=forward)
    weights = [m for m in quantisers(student) if isinstance(m, FakeQuantize)]
    bits = weights[0].bits if weights else FLOAT_BITS
    covered = sum(kept for _, kept in flops.layers.values()) // FLOPS_PER_MAC
    attention, attention_bits = _attention_macs(student, batch, forward)
    macs = flops.sparse // FLOPS_PER_MAC
    dense = flops.dense // FLOPS_PER_MAC
    rest = macs - covered - attention
    packed = [w for w in export_nm(student).values() if isinstance(w, NM24Weight)]
    return GPUSQCost(
        dense,
        macs,
        dense * FLOAT_BITS**2,
        covered * bits**2 + attention * attention_bits**2 + rest * FLOAT_BITS**2,
        masks.numel * FLOAT_BITS // 8,
        sum(weight.nbytes for weight in packed),
    )


def block_stages(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of a network's blocks, stage by stage; without stages (as a Swin's), one in each.

    Raises:
        ValueError: it has no list of equal blocks.
    """
    path, blocks = find_blocks(model)
    stages = []
    for number, block in enumerate(blocks):
        name = f"{path}.{number}" if path else f"{number}"
        inner = block._modules.get("blocks")
        staged = isinstance(inner, (nn.ModuleList, nn.Sequential))
        stages.append(tuple(f"{name}.blocks.{i}" for i in range(len(inner))) if staged else (name,))  # type: ignore[arg-type]
    return stages


def proposed_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights that a model offers, or of all linear layers inside its blocks.

    Raises:
        ValueError: it has no list of blocks, or none with linear layers.
    """
    targets = getattr(model, "prune_targets", None)
    if callable(targets):
        return tuple(f"{name}.weight" for name, _ in targets())
    inside = tuple(f"{block}." for stage in block_stages(model) for block in stage)
    names = tuple(
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith(inside)
        and isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer inside its blocks")
    return names


def require_attention(model: nn.Module) -> None:
    """Raise `ValueError` if there is no attention whose products can be quantised."""
    if not has_attention(model):
        raise ValueError(
            f"{type(model).__name__} has no attention module that is called with queries, keys "
            "and values; quantise_attention=False leaves attention in float"
        )


def has_attention(model: nn.Module) -> bool:
    """Whether there is attention whose products can be quantised: ours, or of transformers."""
    return any(True for found in (_attention_products, switchable_attention) for _ in found(model))


def _attention_products(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every module that is called with queries, keys and values alone."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None or "Attention" not in type(child).__name__:
                continue
            product = isinstance(getattr(child, "scale", None), float)
            if product and not any(True for _ in child.parameters()):
                yield parent, name


@torch.no_grad()
def _attention_macs(student: nn.Module, batch: Any, forward: ForwardFn) -> tuple[int, int]:
    """Multiply-adds of quantised attention products, and their bits."""
    found = [m for m in student.modules() if isinstance(m, AttentionQuantisers)]
    if not found:
        return 0, FLOAT_BITS
    counted = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal counted
        q, k, v = args[:3]
        counted += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])

    handles = [module.register_forward_pre_hook(count) for module in found]
    try:
        with calibrating(student):
            forward(student, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counted, found[0].query.bits


def _form(mask: Tensor, name: str) -> NMForm:
    """How a mask is packed; a mask in pairs is 2:4 only by accident, so that is asked first."""
    if mask.shape[1] % 8 == 0 and NMPairs(2, 4).is_satisfied(mask, exact=True):
        return "pairs"
    if mask.shape[1] % 4 == 0 and NM(2, 4).is_satisfied(mask, exact=True):
        return "2:4"
    raise ValueError(f"{name}: its mask is neither 2:4 nor pairs, which is what can be packed")
