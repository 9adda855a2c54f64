"""Gates that SeerAttention's authors have published, for a model of transformers.

Their file ``attn_gate_weights.pth`` holds ``model.layers.N.self_attn.attn_gate.*``; read it with
``torch.load(path, weights_only=True)`` and take the other arguments from the ``config.json`` beside
it.

Paper: Gao et al., "SeerAttention", arXiv 2410.13276, and "SeerAttention-R", arXiv 2506.08889.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aerogel.attention import SeerAttentionSelector
from aerogel.attention.seer_gate import POOLINGS
from aerogel.finetune.attention_gate import make_gates

_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.attn_gate\.(\w+)\.weight")
_TYPE = re.compile(r"(?:Q((?:max|min|avg)+)_)?K((?:max|min|avg)+)")
_PREFILL = {"mask_linear_q": "q_weight", "mask_linear_k": "k_weight"}
_DECODE = {
    "attngate_linear_q": "q_weight",
    "attngate_linear_k": "k_weight",
    "attngate_qnorm": "q_norm.weight",
    "attngate_knorm": "k_norm.weight",
}


def gates_from_published(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    gate_type: str = "Qavg_Kmaxminavg",
    block_size: int = 64,
    **options: Any,
) -> SeerAttentionSelector:
    """The authors' gates in a selector for the model that they were distilled from.

    For the authors' choice of blocks to the letter, pass ``force_diagonal=False``.

    Args:
        model: a transformers model; nothing is changed in it.
        state_dict: the authors' weights; entries that are of no gate are left out.
        gate_type: their ``seerattn_gate_type``; for decoding gates their
            ``seerattn_k_seq_pooling_type``, such as "Kmaxminavg".
        block_size: their ``seerattn_gate_block_size``.
        options: of `SeerAttentionSelector` (``threshold``, ``budget``, ...); ``rope_theta=None``
            where their ``seerattn_use_rope`` is false.

    Raises:
        ValueError: the gate type is none of theirs, or the weights are of other gates.

    Reference:
        Gao et al., arXiv 2410.13276 and arXiv 2506.08889.
    """
    q_pool, k_pool = _pools(gate_type)
    names = _DECODE if q_pool is None else _PREFILL
    layers = _by_layer(state_dict, names)
    first = next(iter(layers.values()))
    if "k_weight" not in first:
        raise ValueError(f"state_dict: no key weights of a gate of type {gate_type!r}")
    shape: dict[str, Any] = {"gate_dim": first["k_weight"].shape[-1], "k_pool": k_pool}
    if q_pool is None:
        q = first.get("q_weight")
        grouping = "mean" if q is None else "project" if q.dim() == 4 else "mean_project"
        shape |= {"mode": "decode", "grouping": grouping, "norm": "q_norm.weight" in first}
    else:
        shape |= {"q_pool": q_pool, "force_double": "q_weight" in first}
    selector = make_gates(model, layers=sorted(layers), block_size=block_size, **shape, **options)
    for number, weights in layers.items():
        _fill(selector.gates[str(number)], weights, number)
    return selector


def _pools(gate_type: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Poolings of queries (None: a decoding gate) and of keys, by the authors' name."""
    match = _TYPE.fullmatch(gate_type)
    if match is None:
        raise ValueError(
            f"gate_type={gate_type!r}: expected a name such as 'Qavg_Kmaxminavg' (prompts) or "
            "'Kmaxminavg' (decoding)"
        )
    split = [
        None if name is None else tuple(re.findall("max|min|avg", name)) for name in match.groups()
    ]
    keys = split[1]
    assert keys is not None
    if any(s is not None and tuple(p for p in POOLINGS if p in s) != s for s in split):
        raise ValueError(f"gate_type={gate_type!r}: expected poolings in the order {POOLINGS}")
    return split[0], keys


def _by_layer(
    state_dict: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, weight in state_dict.items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        if match[2] not in names:
            raise ValueError(f"state_dict: {key!r}, expected one of {sorted(names)} in a gate")
        layers.setdefault(int(match[1]), {})[names[match[2]]] = weight
    if not layers:
        raise ValueError("state_dict: expected keys such as model.layers.0.self_attn.attn_gate.*")
    return layers


def _fill(gate: nn.Module, weights: Mapping[str, Tensor], layer: int) -> None:
    own = gate.state_dict()
    wanted = {name for name, _ in gate.named_parameters()}
    if set(weights) != wanted:
        raise ValueError(
            f"state_dict: layer {layer} has {sorted(weights)}, expected {sorted(wanted)}"
        )
    for name, weight in weights.items():
        if weight.dim() == 4:  # one map for each query head of a group
            weight = weight.flatten(1, 2)
        if weight.shape != own[name].shape:
            raise ValueError(
                f"state_dict: layer {layer}, {name} has shape {tuple(weight.shape)}, expected "
                f"{tuple(own[name].shape)} for this model"
            )
        own[name].copy_(weight)
