"""Transformers run natively whole, however they spell attention, and give what torch gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes import build_with
from torch import Tensor, nn

from aerogel.runtime import graph, ops
from aerogel.runtime.capture import capture
from aerogel.runtime.compiled import CompiledModule
from aerogel.runtime.layer import sequence_tile
from aerogel.runtime.passes import layers_before_movement, name_layers, simplify
from aerogel.runtime.strategies import CALLS, PLANS, TORCH
from networks import sparsify_

WIDTH, HEADS = 24, 3


class Block(nn.Module):
    """One pre-norm block whose attention is spelled by the test; biases are not zero."""

    def __init__(self, attend: Callable[..., Tensor], joined: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.joined = attend, joined
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        sparsify_(self, 0.5)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        given = (self.qkv(y),) if self.joined else (self.q(y), self.k(y), self.v(y))
        x = x + self.out(self.attend(*given, *mask))
        return x + self.mlp(self.norms[1](x))


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def tokens_of(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def by_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return tokens_of(F.scaled_dot_product_attention(*map(heads_of, (q, k, v)), mask))


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    of_q, of_k, of_v = map(heads_of, (q, k, v))
    scores = of_q @ of_k.transpose(-2, -1) / math.sqrt(of_q.shape[-1])
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ of_v).transpose(1, 2).reshape(q.shape)


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in BEiT and Swin: the query is scaled, axes are moved by permute."""
    of_q = q.view(*q.shape[:2], HEADS, -1).permute(0, 2, 1, 3) * 0.3
    of_k = k.view(*k.shape[:2], HEADS, -1).permute(0, 2, 3, 1)
    of_v = v.view(*v.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
    weights = torch.softmax(torch.matmul(of_q, of_k), dim=-1)
    return torch.matmul(weights, of_v).permute(0, 2, 1, 3).contiguous().view(q.shape)


def timm_fused(qkv: Tensor) -> Tensor:
    """As timm's ViT spells it."""
    batch, tokens, _ = qkv.shape
    split = qkv.reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*split.unbind(0))
    return y.transpose(1, 2).reshape(batch, tokens, WIDTH)


def timm_eager(qkv: Tensor) -> Tensor:
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, WIDTH)


def gpt2(qkv: Tensor) -> Tensor:
    q, k, v = map(heads_of, qkv.split(WIDTH, dim=2))
    return tokens_of(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "call": (by_call, False),
    "products": (by_products, False),
    "scaled query": (scaled_query, False),
    "timm": (timm_fused, True),
    "timm eager": (timm_eager, True),
    "gpt2": (gpt2, True),
    "one head": (of_one_head, False),
}


def plans_of(compiled: CompiledModule) -> set[str]:
    return {row.kernel.rpartition("(")[2] for row in compiled.explain().rows}


def assert_one_plan(model: nn.Module, *args: Tensor) -> None:
    compiled = build_with(model.eval(), *args, strategy=PLANS)
    rows = [row for row in compiled.explain().rows if row.share > 0]
    assert {row.kernel.rpartition("(")[2] for row in rows} == {"plan 0)"}
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("shape", [(1, 33), (4, 9)])
def test_every_spelling_of_attention_is_native(name: str, shape: tuple[int, int]) -> None:
    assert_one_plan(Block(*SPELLINGS[name]), torch.randn(*shape, WIDTH))


def masks() -> dict[str, Tensor]:
    torch.manual_seed(1)
    seen = torch.rand(4, 1, 9, 9) > 0.4
    seen[1, 0, 5] = False  # a query that sees nothing
    return {
        "booleans": seen,
        "for all heads and queries": seen[:, :, :1],
        "shared by the batch": seen[0, 0],
        "by head": torch.randn(4, HEADS, 9, 9),
        "position bias": torch.randn(1, HEADS, 9, 9),
        "floats": torch.randn(4, 1, 1, 9),
        "floats with -inf": torch.zeros(4, 1, 9, 9).masked_fill(~seen, -math.inf),
    }


@pytest.mark.parametrize("name", masks())
def test_masks_of_every_shape_are_native(name: str) -> None:
    mask = masks()[name]
    assert_one_plan(Block(by_call), torch.randn(4, 9, WIDTH), mask)


@pytest.mark.parametrize("name", masks())
def test_masks_may_be_constant(name: str) -> None:
    mask = masks()[name]
    assert_one_plan(Block(lambda q, k, v: by_call(q, k, v, mask)), torch.randn(4, 9, WIDTH))


def test_softmax_of_nothing_is_nan_as_in_torch() -> None:
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 5, :] = -math.inf
    model, x = Block(by_products).eval(), torch.randn(1, 9, WIDTH)
    compiled = build_with(model, x, mask, strategy=PLANS)
    with torch.no_grad():
        ours, theirs = compiled(x, mask), model(x, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(ours[0, 5].isnan().all())


def not_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads that are cut from the wrong axis, values that come back turned."""
    turned = q.unflatten(-1, (-1, HEADS)).permute(0, 3, 1, 2)
    return tokens_of(F.scaled_dot_product_attention(turned, heads_of(k), heads_of(v)))


def shared_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention weights that something else reads, too."""
    weights = (heads_of(q) @ heads_of(k).transpose(-2, -1)).softmax(-1)
    return tokens_of(weights @ heads_of(v)) + weights.mean((1, 3)).unsqueeze(-1)


@pytest.mark.parametrize("attend", [not_attention, shared_scores])
@pytest.mark.parametrize("strategy", [PLANS, CALLS, TORCH])
def test_what_only_looks_like_attention_stays_in_torch(
    attend: Callable[..., Tensor], strategy: str
) -> None:
    model, x = Block(attend).eval(), torch.randn(2, 9, WIDTH)
    fused = simplify(capture(model, (x,), {}).graph_module)
    assert not list(graph.calls(fused, ops.attention))
    compiled = build_with(model, x, strategy=strategy)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class VisionTransformer(nn.Module):
    """As timm writes them: patches, class token, positions, layer scale, pooling."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.block, self.norm = Block(timm_fused, joined=True), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.pool = pool
        sparsify_(self, 0.5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.pool(self.norm(self.block(x) * self.scale)))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "class token": lambda x: x[:, 0],
    "last token": lambda x: x[:, -1],
    "mean": lambda x: x.mean(1),
    "mean of patches": lambda x: x[:, 1:].mean(dim=1),
    "all": lambda x: x,
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_vision_transformer_is_one_plan_from_pixels_to_classes(pool: str, batch: int) -> None:
    assert_one_plan(VisionTransformer(POOLS[pool]), torch.randn(batch, 3, 16, 16))


def encoder(implementation: str = "sdpa", **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "max_position_embeddings": 160,
        "attn_implementation": implementation,
    }
    model = transformers.BertModel(transformers.BertConfig(**{**sizes, **config}))
    return sparsify_(model, 0.6).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [(1, 20), (6, 16), (2, 140)])
def test_bert_is_one_plan_with_any_padding(implementation: str, shape: tuple[int, int]) -> None:
    model, ids = encoder(implementation), torch.randint(0, 50, shape)
    mask = (torch.arange(shape[1]) < torch.randint(3, shape[1], (shape[0], 1))).long()
    compiled = build_with(model, strategy=PLANS, input_ids=ids, attention_mask=mask)
    assert plans_of(compiled) == {"plan 0)"}
    for given in (mask, torch.ones_like(mask), mask.flip(1)):
        with torch.no_grad():
            ours = compiled(input_ids=ids, attention_mask=given)
            theirs = model(input_ids=ids, attention_mask=given)
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_layers_share_one_mask_as_small_as_it_can_be() -> None:
    model, ids = encoder(), torch.randint(0, 50, (2, 16))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fused = simplify(capture(model, (), kwargs).graph_module)
    made = [node.args[3] for node in graph.calls(fused, ops.attention)]
    assert len(made) == 2
    assert made[0] is made[1]
    assert graph.shape(made[0]) == (2, 1, 1, 16)


def test_a_mask_that_hides_nothing_vanishes() -> None:
    model, ids = encoder(), torch.randint(0, 50, (2, 16))
    fused = simplify(capture(model, (ids,), {}).graph_module)
    assert [node.args[3] for node in graph.calls(fused, ops.attention)] == [None, None]


def test_every_strategy_gives_the_same_sentence_embeddings() -> None:
    from aerogel.models.sentence_encoder import SentenceEncoder

    model = SentenceEncoder(encoder()).eval()
    ids = torch.randint(0, 50, (4, 30))
    mask = (torch.arange(30) < torch.tensor([[30], [7], [1], [22]])).long()
    with torch.no_grad():
        expected = model(ids, mask)
        for strategy in (TORCH, CALLS, PLANS):
            compiled = build_with(model, ids, mask, strategy=strategy, whole="plan")
            torch.testing.assert_close(compiled(ids, mask), expected, rtol=1e-4, atol=1e-5)


def test_hugging_face_vit_is_one_plan() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=4,
    )  # fmt: skip
    model = sparsify_(transformers.ViTForImageClassification(config), 0.6).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = build_with(model, x, strategy=PLANS)
    assert plans_of(compiled) == {"plan 0)"}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)


def test_keys_of_a_decoder_may_be_shared_by_heads() -> None:
    """Grouped queries: whatever of it is native, the outputs are right."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = sparsify_(transformers.LlamaModel(config), 0.6).eval()
    ids = torch.randint(0, 50, (2, 12))
    kwargs = {"input_ids": ids, "use_cache": False}
    compiled = build_with(model, strategy=PLANS, **kwargs)
    with torch.no_grad():
        ours, theirs = compiled(**kwargs), model(**kwargs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "tokens", "together"), [(32, 64, 2), (1, 64, 1), (9, 30, 3), (8, 197, 1), (6, 16, 6)]
)
def test_short_sequences_go_together_if_their_number_allows(
    batch: int, tokens: int, together: int
) -> None:
    assert sequence_tile(batch, tokens) == together


def exact_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


GELUS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "erf of a quotient": (exact_gelu, "gelu"),
    "erf of a product": (lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678)), "gelu"),
    "erf, x first": (lambda x: 0.5 * (x * (torch.erf(x / 1.41421356) + 1)), "gelu"),
    "constants stored": (
        lambda x: x * torch.tensor(0.5) * (torch.erf(x / torch.tensor(2.0).sqrt()) + 1),
        "gelu",
    ),
    "GPT-2": (
        lambda x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        ),
        "gelu_tanh",
    ),
    "tanh without a power": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        "gelu_tanh",
    ),
    "of a sum": (lambda x: exact_gelu(x + x), "gelu"),
}


def kinds_of(model: nn.Module, *args: Tensor) -> list[str]:
    """The activations of a model as it enters a plan, layers' epilogues included."""
    fused = simplify(capture(model.eval(), args, {}).graph_module)
    given = [*graph.calls(fused, ops.activation), *graph.calls(fused, ops.linear)]
    kinds = [arg for node in given for arg in node.args if isinstance(arg, str)]
    return [kind for kind in kinds if kind != "none"]


class Perceptron(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.first, self.second = act, nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        sparsify_(self, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_spelled_out_is_native(name: str) -> None:
    act, kind = GELUS[name]
    model, x = Perceptron(act), torch.randn(1, 33, WIDTH)
    assert kinds_of(model, x) == [kind]
    assert_one_plan(model, x)


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_a_gelu_that_export_has_decomposed_is_native(kind: str) -> None:
    model, x = Perceptron(nn.GELU(kind)), torch.randn(1, 33, WIDTH)
    table = {
        torch.ops.aten.gelu.default: torch._decomp.decomposition_table[torch.ops.aten.gelu.default]
    }
    program = torch.export.export(model.eval(), (x,)).run_decompositions(table)
    assert not [node for node in program.graph.nodes if "gelu" in str(node.target)]
    decomposed = program.module()
    wanted = "gelu_tanh" if kind == "tanh" else "gelu"
    fused = simplify(capture(decomposed, (x,), {}).graph_module)
    epilogues = [node.args[3] for node in graph.calls(fused, ops.linear) if len(node.args) > 3]
    assert wanted in epilogues
    compiled = build_with(decomposed, x, strategy=PLANS)
    assert plans_of(compiled) == {"plan 0)"}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x * 0.5 * (1 + torch.erf(x)),
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1 + torch.tanh(x)),
        lambda x: 0.5 * x * (1 + torch.erf(x.flip(-1) / math.sqrt(2))),
    ],
)
def test_what_only_looks_like_a_gelu_is_none(act: Callable[[Tensor], Tensor]) -> None:
    model, x = Perceptron(act), torch.randn(2, 9, WIDTH)
    assert kinds_of(model, x) == []
    compiled = build_with(model, x, strategy=PLANS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_gelu_of_a_gelu_gives_two() -> None:
    act = GELUS["erf of a product"][0]
    assert kinds_of(Perceptron(lambda x: act(act(x))), torch.randn(1, 9, WIDTH)) == ["gelu", "gelu"]


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layers_are_one_plan(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 48, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_one_plan(sparsify_(model, 0.5), torch.randn(3, 9, WIDTH))


def test_gpt2_is_one_plan_behind_its_embedding() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, ids = transformers.GPT2Model(config).eval(), torch.randint(0, 50, (2, 16))
    kwargs = {"input_ids": ids, "use_cache": False}
    compiled = build_with(model, strategy=PLANS, **kwargs)
    rows = compiled.explain().rows
    assert len(rows) == 8
    assert {row.kernel.rpartition("(")[2] for row in rows} == {"plan 0)"}
    with torch.no_grad():
        torch.testing.assert_close(compiled(**kwargs)[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)


def flattened(x: Tensor) -> Tensor:
    return x.reshape(-1, WIDTH)


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "rows": (flattened, True),
    "tokens first": (lambda x: x.transpose(0, 1), True),
    "rows of tokens first": (lambda x: flattened(x.transpose(0, 1)), True),
    "part of the tokens": (lambda x: x[:, 1:], False),
    "features cut": (
        lambda x: x.reshape(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH),
        False,
    ),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("kind", ["linear", "norm", "activation"])
def test_layers_go_before_moves_of_whole_tokens_alone(name: str, kind: str) -> None:
    move, goes = MOVES[name]
    torch.manual_seed(0)
    layer = {
        "linear": nn.Linear(WIDTH, WIDTH),
        "norm": nn.LayerNorm(WIDTH),
        "activation": nn.GELU(),
    }
    model = Moved(nn.Linear(WIDTH, WIDTH), move, layer[kind]).eval()
    x = torch.randn(3, 4, WIDTH)
    before = simplify_until_moved(model, x)
    with torch.no_grad():
        torch.testing.assert_close(before(x)[0], model(x), rtol=1e-4, atol=1e-5)
    calls = [node for node in before.graph.nodes if node.op == "call_function"]
    last_layer = next(node for node in reversed(calls) if node.target in _LAYERS)
    assert (last_layer.args[0].target is ops.linear) == goes


_LAYERS = (ops.linear, ops.activation, torch.ops.aten.layer_norm.default)


class Moved(nn.Module):
    def __init__(self, first: nn.Module, move: Callable[[Tensor], Tensor], layer: nn.Module):
        super().__init__()
        self.first, self.move, self.layer = first, move, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.move(self.first(x)))


def simplify_until_moved(model: nn.Module, x: Tensor) -> Any:
    return layers_before_movement(name_layers(capture(model, (x,), {}).graph_module))
