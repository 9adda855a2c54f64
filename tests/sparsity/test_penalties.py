import math

import pytest
import torch
from torch import nn

from aerogel.sparsity.patterns import Block, Channel
from aerogel.sparsity.penalties import (
    AttentionLogPenalty,
    GroupLasso,
    WeightL1,
    WeightLogPenalty,
    attention_log,
)
from aerogel.sparsity.select import select_parameters


def test_attention_penalty_lies_between_uniform_and_one_hot_rows():
    n = 9
    low, high = math.log(1 + 1 / n**2), math.log(2) / n
    uniform = torch.full((2, 3, n, n), 1 / n, dtype=torch.float64)
    assert attention_log(uniform).item() == pytest.approx(low, rel=1e-12)
    assert attention_log(torch.eye(n, dtype=torch.float64)).item() == pytest.approx(high)
    some = torch.randn(2, 3, n, n, dtype=torch.float64).softmax(-1)
    assert low <= attention_log(some).item() <= high


def test_attention_penalty_has_the_gradient_of_its_formula():
    scores = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    p = scores.softmax(-1)
    attention_log(p).backward()
    with torch.no_grad():
        g = 2 * p / (1 + p**2) / p.numel()
        expected = p * (g - (p * g).sum(-1, keepdim=True))
    assert torch.allclose(scores.grad, expected, atol=1e-14)


def test_weight_penalties_equal_their_formulas_and_have_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 8))
    selection = select_parameters(model)
    ws = (model[0].weight, model[1].weight)
    expected = 0.5 * sum(torch.log(1 + w.square()).sum() for w in ws)
    assert torch.allclose(WeightLogPenalty(selection, 0.5).value(), expected)
    assert torch.allclose(WeightL1(selection, 2.0).value(), 2 * sum(w.abs().sum() for w in ws))
    WeightLogPenalty(selection, 0.5).value().backward()
    w = model[1].weight
    assert torch.allclose(w.grad, 0.5 * 2 * w / (1 + w**2), atol=1e-6)
    assert WeightL1(selection, 0.0).value().item() == 0.0


def test_group_lasso_sums_over_any_pattern_and_is_differentiable_at_zero():
    model = nn.Sequential(nn.Linear(6, 10))
    selection = select_parameters(model)
    w = model[0].weight
    rows = math.sqrt(6) * w.norm(dim=1).sum()
    assert torch.allclose(GroupLasso(selection, 1.0).value(), rows)
    columns = math.sqrt(10) * w.norm(dim=0).sum()
    assert torch.allclose(GroupLasso(selection, 1.0, Channel()).value(), columns)
    ragged = sum(math.sqrt(len(part)) * part.norm(dim=0).sum() for part in (w[:4], w[4:8], w[8:]))
    assert torch.allclose(GroupLasso(selection, 1.0, Block(4, 1)).value(), ragged)
    with torch.no_grad():
        w[0] = 0
    GroupLasso(selection, 1.0).value().backward()
    assert bool(torch.isfinite(w.grad).all())


def encoder(layers: int = 3) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_attention_penalty_reads_torch_attention_and_reaches_earlier_blocks():
    model, x = encoder(), torch.randn(2, 7, 16)
    plain = model(x)
    seen = []
    model.layers[2].self_attn.register_forward_hook(lambda m, a, o: seen.append(o[1]))
    with AttentionLogPenalty(model, 0.01) as penalty:
        with pytest.raises(RuntimeError, match=r"layers.2.self_attn"):
            penalty.value()
        assert torch.allclose(model(x), plain, atol=1e-6)
        value = penalty.value()
        assert torch.allclose(value, 0.01 * torch.log(1 + seen[-1] ** 2).mean())
        value.backward()
        assert model.layers[0].linear1.weight.grad.abs().sum() > 0
        assert model.layers[2].linear1.weight.grad is None
    model(x)
    assert seen[-1] is None


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_attention_penalty_over_all_or_some_blocks_is_their_mean():
    model, x = encoder(), torch.randn(2, 7, 16)
    with (
        AttentionLogPenalty(model, 1.0, "all") as every,
        AttentionLogPenalty(model, 1.0, [0]) as first,
        AttentionLogPenalty(model, 1.0, [1]) as second,
        AttentionLogPenalty(model, 1.0, [-1]) as last,
    ):
        model(x)
        mean = (first.value() + second.value() + last.value()) / 3
        assert torch.allclose(every.value(), mean)


def test_attention_penalty_switches_transformers_to_eager_and_back():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    batch = {
        "input_ids": torch.randint(50, (2, 6)),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
    }
    plain = model(**batch).last_hidden_state
    wrapped = nn.ModuleDict({"encoder": model})
    with AttentionLogPenalty(wrapped, 1.0) as penalty:
        assert torch.allclose(model(**batch).last_hidden_state, plain, atol=1e-5)
        eager = model(**batch, output_attentions=True).attentions
        assert torch.allclose(penalty.value(), attention_log(eager[-1]))
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_penalised_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight"):
        WeightL1(select_parameters(model), -1.0)
    with pytest.raises(ValueError, match="Attention"):
        AttentionLogPenalty(model)
    with pytest.raises(ValueError, match="nearest"):
        AttentionLogPenalty(encoder(), modules=["layers.0.self_atn"])
    with pytest.raises(ValueError, match="3 attention modules"):
        AttentionLogPenalty(encoder(), blocks=[3])

    class SilentAttention(nn.Module):
        def forward(self, x):
            return x

    silent = nn.Sequential(SilentAttention())
    with AttentionLogPenalty(silent), pytest.raises(ValueError, match="returns no attention"):
        silent(torch.ones(1))
