"""Weights in the authors' own layout give what the authors' formulas give."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

from aerogel.finetune import gates_from_published
from aerogel.models.routing_transformer import RoutingTransformerLM


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def turned(x: Tensor, place: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of channel i with channel i + d / 2."""
    half = x.shape[-1] // 2
    angle = place[:, None] * base ** (-torch.arange(half) / half)
    pairs = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1).contiguous())
    out = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    return torch.cat([out[..., 0], out[..., 1]], -1)


def gate_weights(layers, **shapes) -> dict[str, Tensor]:
    return {
        f"model.layers.{layer}.self_attn.attn_gate.{name}.weight": torch.randn(shape) * 0.3
        for layer in layers
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("double", [False, True])
def test_seerattention_gates_for_prompts_score_as_the_authors_do(double):
    """Llama of 4 query and 2 key heads of 8: gates of width 8, blocks of 16."""
    shapes = {"mask_linear_k": (2 if double else 4, 24, 8)}
    if double:
        shapes["mask_linear_q"] = (4, 8, 8)
    state = gate_weights([0, 1], **shapes) | {"lm_head.weight": torch.zeros(1)}
    selector = gates_from_published(tiny("Llama"), state, block_size=16)
    q, k = torch.randn(1, 4, 48, 8), torch.randn(1, 2, 48, 8)
    prefix = "model.layers.1.self_attn.attn_gate."
    keys = k.unflatten(2, (3, 16))
    pooled = torch.cat([keys.amax(3), keys.amin(3), keys.mean(3)], -1)
    starts = torch.arange(3) * 16.0
    got = selector.gates["1"](q, k)
    for head in range(4):
        query = q[0, head].unflatten(0, (3, 16)).mean(1)
        if double:
            query = query @ state[prefix + "mask_linear_q.weight"][head]
        matrix = state[prefix + "mask_linear_k.weight"][head // 2 if double else head]
        key = turned(pooled[0, head // 2] @ matrix, starts)
        want = turned(query, starts) @ key.T / 8**0.5
        below = torch.ones(3, 3).tril() > 0
        torch.testing.assert_close(got[0, head][below], want[below], rtol=1e-4, atol=1e-5)


def test_seerattention_gates_for_decoding_score_as_the_authors_do():
    shapes = {"attngate_linear_q": (2, 2, 8, 8), "attngate_linear_k": (2, 16, 8)}
    norms = {"attngate_qnorm": (8,), "attngate_knorm": (8,)}
    state = gate_weights([0], **shapes, **norms)
    selector = gates_from_published(
        tiny("Llama"), state, gate_type="Kmaxmin", block_size=16, method="token_budget", budget=32
    )
    assert selector.mode == "decode"
    q, k = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8)
    gate = selector.gates["0"]
    got = gate.score(gate.queries(q, 0), gate.compress(k))
    weight = {name: state[f"model.layers.0.self_attn.attn_gate.{name}.weight"] for name in
              (*shapes, *norms)}  # fmt: skip

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight[name]

    for head in range(2):
        maps = weight["attngate_linear_q"][head]
        query = q[0, 2 * head] @ maps[0] + q[0, 2 * head + 1] @ maps[1]
        blocks = k[0, head].unflatten(0, (2, 16))
        pooled = torch.cat([blocks.amax(1), blocks.amin(1)], -1)
        key = normed(pooled @ weight["attngate_linear_k"][head], "attngate_knorm")
        key = turned(key, torch.tensor([0.0, 16.0]))
        query = turned(normed(query, "attngate_qnorm"), torch.arange(32.0))
        torch.testing.assert_close(got[0, head], query @ key.T / 8**0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"mask_linear_k": (4, 24, 8)}, {"gate_type": "Kavgmax"}, "order"),
        ({"mask_linear_k": (4, 24, 8)}, {"gate_type": "linear"}, "gate_type='linear'"),
        ({"mask_linear_k": (4, 24, 8)}, {"gate_type": "Kmaxminavg"}, "mask_linear_k"),
        ({"mask_linear_k": (6, 24, 8)}, {}, r"\(6, 24, 8\), expected \(4, 24, 8\)"),
        ({"mask_linear_k": (2, 24, 16)}, {}, "q_weight"),
        ({}, {}, "attn_gate"),
    ],
)
def test_gates_of_another_kind_are_an_error(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        gates_from_published(tiny("Llama"), gate_weights([0], **shapes), **options)


DIM, HEADS, WIDTH, LENGTH, WINDOW = 16, 4, 4, 16, 8


def routing_weights(share: bool, local: int) -> dict[str, Tensor]:
    """Of one layer of the PyTorch package `routing-transformer`: 2 clusters of 8 tokens."""
    routed = HEADS - local
    shapes = {
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "fn.to_q.weight": (routed * WIDTH, DIM),
        "fn.to_v.weight": (routed * WIDTH, DIM),
        "fn.to_out.weight": (DIM, DIM),
        "fn.local_to_qkv.weight": (3 * local * WIDTH, DIM),
        "fn.local_to_qkv.bias": (3 * local * WIDTH,),
        "fn.global_attn.mem_key": (routed, 2, 0 if share else 1, WIDTH),
        "fn.global_attn.mem_value": (routed, 2, 0 if share else 1, WIDTH),
        "fn.global_attn.kmeans.means": (routed, 2, WIDTH),
    }
    if not share:
        shapes["fn.to_k.weight"] = (routed * WIDTH, DIM)
    mlp = {
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "fn.fn.w1.weight": (4 * DIM, DIM),
        "fn.fn.w1.bias": (4 * DIM,),
        "fn.fn.w2.weight": (DIM, 4 * DIM),
        "fn.fn.w2.bias": (DIM,),
    }
    outer = {
        "token_emb.weight": (9, DIM),
        "sinu_pos_emb.emb": (LENGTH, WIDTH),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "out.weight": (9, DIM),
        "out.bias": (9,),
    }
    first = "routing_transformer.layers.layers.0"
    names = outer | {f"{first}.0.{n}": s for n, s in shapes.items()}
    names |= {f"{first}.1.{n}": s for n, s in mlp.items()}
    state = {name: torch.randn(shape) * 0.5 for name, shape in names.items()}
    means = f"{first}.0.fn.global_attn.kmeans.means"
    state[means] = normalize(state[means], dim=-1)
    state[f"{first}.0.fn.global_attn.kmeans.initted"] = torch.tensor(True)
    state[f"{first}.0.fn.local_attn.rel_pos.inv_freq"] = torch.zeros(2)
    return state


def beside(x: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 to i and i + d / 2; `apart` undoes it."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def apart(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def routing_logits(state: dict[str, Tensor], ids: Tensor, share: bool, local: int) -> Tensor:
    """The package's formulas, head by head and token by token."""
    first = "routing_transformer.layers.layers.0"
    w = {n.removeprefix(first + ".0.fn."): v for n, v in state.items() if first + ".0.fn." in n}
    f = {n.removeprefix(first + ".1.fn.fn."): v for n, v in state.items() if first + ".1" in n}
    place = torch.arange(LENGTH)
    x = state["token_emb.weight"][ids]
    y = layer_norm(x, (DIM,), state[first + ".0.norm.weight"], state[first + ".0.norm.bias"])
    outs = []
    lq, lk, lv = (y @ w["local_to_qkv.weight"].T + w["local_to_qkv.bias"]).chunk(3, -1)
    for head in range(local):
        one = slice(head * WIDTH, head * WIDTH + WIDTH)
        q, k = (turned(t[:, one], place.float()) for t in (lq, lk))
        block = place // WINDOW
        keep = (place <= place[:, None]) & (block[:, None] - block <= 1)
        outs.append((q @ k.T / WIDTH**0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ lv[:, one])
    for head in range(HEADS - local):
        one = slice(head * WIDTH, head * WIDTH + WIDTH)
        q, v = ((y @ w[n].T)[:, one] for n in ("to_q.weight", "to_v.weight"))
        k = q if share else (y @ w["to_k.weight"].T)[:, one]
        q, k, v = (apart(turned(beside(t), place.float())) for t in (q, k, v))
        means, near_q, near_k = w["global_attn.kmeans.means"][head], normalize(q), normalize(k)
        total, count = torch.zeros(LENGTH, WIDTH), torch.zeros(LENGTH)
        for cluster in range(2):
            rows = (near_q @ means[cluster]).topk(WINDOW).indices.sort().values
            keys = (near_k @ means[cluster]).topk(WINDOW).indices.sort().values
            allowed = rows[:, None] >= keys
            logits = q[rows] @ (near_k if share else k)[keys].T / WIDTH**0.5
            if share:
                logits = logits.masked_fill(rows[:, None] == keys, -5e4)
            memory = w["global_attn.mem_key"][head, cluster]
            logits = torch.cat([q[rows] @ memory.T / WIDTH**0.5,
                                logits.masked_fill(~allowed, -1e30)], -1)  # fmt: skip
            values = torch.cat([w["global_attn.mem_value"][head, cluster], v[keys]])
            total[rows] += logits.softmax(-1) @ values
            count[rows] += 1
        outs.append(total / (count[:, None] + 1e-5))
    x = x + torch.cat(outs, -1) @ w["to_out.weight"].T
    y = layer_norm(x, (DIM,), state[first + ".1.norm.weight"], state[first + ".1.norm.bias"])
    x = x + gelu(y @ f["w1.weight"].T + f["w1.bias"]) @ f["w2.weight"].T + f["w2.bias"]
    x = layer_norm(x, (DIM,), state["norm.weight"], state["norm.bias"])
    return x @ state["out.weight"].T + state["out.bias"]


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("share", [True, False])
def test_a_routing_transformer_of_the_pytorch_package_says_the_same(share, local):
    state = routing_weights(share, local)
    if not local:
        state = {name: v for name, v in state.items() if ".local_" not in name}
    model = RoutingTransformerLM.from_published(state, local_window=WINDOW).eval()
    ids = torch.randint(9, (LENGTH,))
    whole = routing_weights(share, local) | state if not local else state
    want = routing_logits(whole, ids, share, local)
    torch.testing.assert_close(model(ids[None])[0], want, rtol=1e-3, atol=1e-4)


def test_options_of_the_package_that_are_not_supported_are_named():
    state = routing_weights(True, 2)
    with pytest.raises(ValueError, match="pkm"):
        RoutingTransformerLM.from_published(state | {"routing_transformer.pkm": torch.zeros(1)})
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"norm\.bias"):
        RoutingTransformerLM.from_published(state)
