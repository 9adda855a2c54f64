"""Every pass leaves the function alone, and the graph as it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aerogel.runtime import ops
from aerogel.runtime.capture import _flatten, capture
from aerogel.runtime.layer import epilogue, is_layer
from aerogel.runtime.passes import (
    PASSES,
    fold_batch_norm,
    fold_constants,
    fuse_activation,
    fuse_residual,
    name_layers,
    remove_identity,
    remove_mutation,
    simplify,
)
from aerogel.runtime.passes.remove_mutation import mutates
from networks import InvertedResidual, Residual, mobile_network, perceptron, settle_norms_

aten = torch.ops.aten


def graph_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return capture(model.eval(), inputs, {}).graph_module


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_layer(node)]


def assert_same(gm: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], model(*inputs), rtol=1e-4, atol=1e-5)


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def exported(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    program = torch.export.export(model.eval(), inputs, strict=False)
    return _flatten(program)


def test_in_place_activations_and_sums_become_functional() -> None:
    model, x = settle_norms_(Residual()), torch.randn(2, 8, 6, 6)
    before = exported(model, x)
    after = remove_mutation(before)
    assert mutates(before)
    assert not mutates(after)
    assert_same(after, model, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x.add_(1.0),
        lambda m, x: (y := m.layer(x)) * y[0].mul_(2.0),
        lambda m, x: torch.zeros(2, 4, dtype=torch.float64).add_(x),
    ],
    ids=["input", "view", "cast"],
)
def test_visible_mutation_is_left_to_torch(forward: Any) -> None:
    model = Lambda(forward, layer=nn.Linear(4, 4))
    assert mutates(remove_mutation(exported(model, torch.randn(2, 4))))


def test_dropout_casts_and_asserts_vanish() -> None:
    model = Lambda(lambda m, x: F.dropout(x * 2, 0.5, m.training).to(torch.float32).view(3, 4) + 1)
    x = torch.randn(3, 4)
    gm = remove_identity(graph_of(model, x))
    assert targets(gm) == [aten.mul.Tensor, aten.add.Tensor]
    assert_same(gm, model.eval(), x)


def test_dropout_that_stays_active_is_kept() -> None:
    model = Lambda(lambda m, x: F.dropout(x, 0.5, training=True))
    assert aten.dropout.default in targets(remove_identity(graph_of(model, torch.randn(3))))


def test_a_returned_copy_of_an_input_stays_a_copy() -> None:
    model = Lambda(lambda m, x: x.clone())
    x = torch.randn(3)
    gm = remove_identity(graph_of(model, x))
    assert gm(x)[0].data_ptr() != x.data_ptr()


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    model = Lambda(lambda m, x: x + m.table(torch.arange(5)).t(), table=nn.Embedding(5, 3))
    x = torch.randn(3, 5)
    gm = fold_constants(graph_of(model, x))
    assert targets(gm) == [aten.add.Tensor]
    assert_same(gm, model, x)


def test_large_broadcasts_and_random_numbers_are_not_folded() -> None:
    wide = Lambda(lambda m, x: x * m.lin.bias.expand(70_000, 3), lin=nn.Linear(2, 3))
    assert aten.expand.default in targets(fold_constants(graph_of(wide, torch.ones(70_000, 3))))
    noisy = Lambda(lambda m, x: x + torch.rand(3))
    assert aten.rand.default in targets(fold_constants(graph_of(noisy, torch.ones(3))))


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_goes_into_the_convolution(bias: bool) -> None:
    model = settle_norms_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 9, 9)
    gm = fold_batch_norm(name_layers(graph_of(model, x)))
    assert targets(gm) == [ops.conv2d]
    assert_same(gm, model, x)


def test_batch_norm_goes_into_a_linear_layer_over_features_only() -> None:
    flat = settle_norms_(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)))
    gm = fold_batch_norm(name_layers(graph_of(flat, torch.randn(4, 5))))
    assert targets(gm) == [ops.linear]
    over_tokens = settle_norms_(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(6)))
    gm = fold_batch_norm(name_layers(graph_of(over_tokens, torch.randn(4, 6, 5))))
    assert aten.batch_norm.default in targets(gm)


def test_a_weight_shared_by_two_norms_is_right_for_both() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn2(m.conv(m.bn1(m.conv(x))))

    parts = {"conv": nn.Conv2d(4, 4, 1), "bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)}
    model = settle_norms_(Lambda(forward, **parts))
    x = torch.randn(2, 4, 5, 5)
    gm = fold_batch_norm(name_layers(graph_of(model, x)))
    assert targets(gm) == [ops.conv2d, ops.conv2d]
    assert_same(gm, model, x)


def test_folding_keeps_zeros() -> None:
    model = mobile_network()
    folded = fold_batch_norm(name_layers(graph_of(model, torch.randn(1, 3, 20, 20))))
    zeros = [int((t == 0).sum()) for n, t in folded.named_buffers() if t.dim() == 4]
    assert sum(zeros) == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 4)


def test_a_norm_whose_convolution_is_read_elsewhere_is_kept() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + y.mean()

    model = settle_norms_(Lambda(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    gm = simplify(graph_of(model, torch.randn(1, 3, 5, 5)))
    assert aten.batch_norm.default in targets(gm)


ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "relu6 ": lambda y: y.clamp(0, 6),
    "relu6  ": lambda y: F.hardtanh(y, 0.0, 6.0),
    "relu ": lambda y: y.clamp_min(0),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "silu ": lambda y: y * torch.sigmoid(y),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.Linear(6, 4)], ids=["conv", "linear"])
def test_activation_becomes_the_epilogue(layer: nn.Module, spelling: str) -> None:
    model = Lambda(lambda m, x: ACTIVATIONS[spelling](m.layer(x) * 4), layer=layer)
    direct = Lambda(lambda m, x: ACTIVATIONS[spelling](m.layer(x)), layer=layer)
    x = torch.randn(2, 3, 6, 6) * 3
    gm = simplify(graph_of(direct, x))
    assert len(targets(gm)) == 1
    assert epilogue(layers(gm)[0])[0] == spelling.strip()
    assert_same(gm, direct, x)
    assert_same(simplify(graph_of(model, x)), model, x)


def test_other_clamps_stay_as_they_are() -> None:
    model = Lambda(lambda m, x: m.layer(x).clamp(-1, 6), layer=nn.Linear(4, 4))
    assert aten.clamp.default in targets(simplify(graph_of(model, torch.randn(2, 4))))


def test_residual_is_added_before_the_activation() -> None:
    model = settle_norms_(Residual())
    x = torch.randn(2, 8, 6, 6)
    gm = simplify(graph_of(model, x))
    assert targets(gm) == [ops.conv2d] * 3
    last = layers(gm)[-1]
    kind, residual = epilogue(last)
    assert kind == "relu"
    assert residual is not None
    assert_same(gm, model, x)


def test_what_is_added_after_an_activation_is_no_residual() -> None:
    model = Lambda(lambda m, x: torch.relu(m.layer(x)) + x, layer=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    gm = simplify(graph_of(model, x))
    assert targets(gm) == [ops.linear, aten.add.Tensor]
    assert_same(gm, model, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.layer(x) + 1.0,
        lambda m, x: m.layer(x) + x[:1],
        lambda m, x: torch.add(m.layer(x), x, alpha=2),
        lambda m, x: (y := m.layer(x)) + y,
    ],
    ids=["scalar", "broadcast", "scaled", "itself"],
)
def test_other_additions_stay_as_they_are(forward: Any) -> None:
    model = Lambda(forward, layer=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    gm = simplify(graph_of(model, x))
    assert aten.add.Tensor in targets(gm)
    assert_same(gm, model, x)


def test_products_with_a_constant_matrix_are_linear_layers() -> None:
    weight, bias = nn.Linear(3, 5), torch.randn(3)
    model = Lambda(lambda m, x: torch.addmm(bias, x @ m.w.weight.t(), m.w.weight), w=weight)
    x = torch.randn(2, 3)
    gm = simplify(graph_of(model, x))
    assert targets(gm) == [ops.linear, ops.linear]
    assert_same(gm, model, x)


def test_uneven_same_padding_stays_with_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.Conv2d(4, 4, 3, padding="same"))
    x = torch.randn(1, 3, 7, 7)
    gm = simplify(graph_of(model, x))
    assert len(layers(gm)) == 1
    assert_same(gm, model, x)


@pytest.mark.parametrize("rewrite", PASSES, ids=lambda rewrite: rewrite.__name__)
def test_a_pass_leaves_its_input_alone(rewrite: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    gm = graph_of(settle_norms_(InvertedResidual(4, 4, 1, nn.ReLU6)), torch.randn(1, 4, 5, 5))
    before = gm.code
    rewrite(gm)
    assert gm.code == before


@pytest.mark.parametrize("model", [mobile_network(), perceptron()], ids=["mobile", "perceptron"])
def test_every_prefix_of_the_pipeline_keeps_the_function(model: nn.Module) -> None:
    x = torch.randn(2, 3, 20, 20) if isinstance(model[0], nn.Conv2d) else torch.randn(5, 24)
    gm = graph_of(model, x)
    for rewrite in PASSES:
        gm = rewrite(gm)
        assert_same(gm, model, x)


def test_layers_keep_the_names_of_their_modules() -> None:
    gm = simplify(graph_of(mobile_network(), torch.randn(1, 3, 20, 20)))
    names = [node.meta["layer"] for node in layers(gm)]
    assert names[:3] == ["0", "3.body.0", "3.body.3"]
    assert names[-1] == "8"


def test_activation_read_by_two_is_kept_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.layer(x)
        return torch.relu(y) * y

    model = Lambda(forward, layer=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    gm = fuse_activation(fuse_residual(name_layers(graph_of(model, x))))
    assert ops.activation in targets(gm)
    assert_same(gm, model, x)
