"""Training on stored weights only gives what masked dense training gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aerogel
from aerogel.sparsity import MaskController, select_parameters
from aerogel.train import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    dense_gradients,
    find_sparse_layers,
    sparse_training,
    to_dense,
    update_masks,
)

OPTIMIZERS: dict[str, Callable] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
}


def prune_(model: nn.Module, sparsity: float = 0.8, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape, generator=g) >= sparsity
    return model


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return prune_(nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 20, bias=False)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return prune_(
        nn.Sequential(
            nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 8, 1, 2)
        )
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The dense weights and biases of a model, sparse or not."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | SparseLayer):
            found[f"{name}.weight"] = module.weight.detach()
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias.detach()
    return found


def assert_same_weights(a: nn.Module, b: nn.Module, tolerance: float = 1e-4) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=tolerance, atol=tolerance)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 5) -> None:
    target = torch.linspace(-1, 1, model(x).numel()).reshape(model(x).shape)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("kind", ["linear", "conv", "channels_last"])
def test_training_equals_masked_dense_training(kind: str, optimizer: str) -> None:
    dense = mlp() if kind == "linear" else convolutions()
    x = torch.randn(3, 7, 20) if kind == "linear" else torch.randn(2, 8, 6, 5)
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    sparse = sparse_training(copy.deepcopy(dense), min_sparsity=0.0)
    assert len(find_sparse_layers(sparse)) == 2
    zeros = {name: w == 0 for name, w in weights(sparse).items()}

    dense_optimizer = OPTIMIZERS[optimizer](dense.parameters())
    kept = [n for n in weights(dense) if n.removesuffix(".weight") in find_sparse_layers(sparse)]
    selection = select_parameters(dense, include=kept)
    masks = aerogel.sparsity.MaskSet({n: r.parameter.detach() != 0 for n, r in selection.items()})
    controller = MaskController(dense, dense_optimizer, selection, "hard", masks=masks)
    controller.follow_optimizer()
    train(dense, dense_optimizer, x)
    train(sparse, OPTIMIZERS[optimizer](sparse.parameters()), x)
    assert_same_weights(sparse, dense)
    for name in masks:
        assert torch.equal(weights(sparse)[name] == 0, zeros[name])


def test_gradients_equal_the_dense_ones_at_the_weights() -> None:
    dense = mlp()
    sparse = sparse_training(copy.deepcopy(dense), min_sparsity=0.0)
    x = torch.randn(50, 20)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((dense, sparse), inputs, strict=True):
        model(leaf).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    for index in (0, 2):
        layer = sparse[index]
        expected = layer.gather(dense[index].weight.grad)
        torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-5)


def test_double_precision_and_gradcheck() -> None:
    layer = sparse_training(prune_(nn.Linear(6, 5)), min_sparsity=0.0).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        parts = {"values": values, "bias": bias}
        return torch.func.functional_call(layer, parts, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.values, layer.bias))


def test_round_trip_is_exact_and_shares_the_bias() -> None:
    model = convolutions()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    sparse_training(model, min_sparsity=0.0)
    assert isinstance(model[0], SparseConv2d)
    assert isinstance(model[2], nn.Conv2d)
    to_dense(model)
    assert type(model[0]) is nn.Conv2d
    assert model[3].stride == (2, 2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(any(p is q for q in model.parameters()) for p in biases)


def test_a_lone_layer_and_its_unbatched_input() -> None:
    dense = prune_(nn.Conv2d(4, 6, 1))
    x = torch.randn(4, 5, 3)
    expected = dense(x)
    layer = sparse_training(dense, min_sparsity=0.0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert type(to_dense(layer)) is nn.Conv2d
    vector = prune_(nn.Linear(4, 3))
    expected = vector(x[:, 0, 0])
    torch.testing.assert_close(sparse_training(vector, min_sparsity=0.0)(x[:, 0, 0]), expected)


def test_empty_rows_and_a_layer_without_weights() -> None:
    dense = nn.Linear(9, 7)
    with torch.no_grad():
        dense.weight[2:5] = 0
    for all_zero in (False, True):
        if all_zero:
            nn.init.zeros_(dense.weight)
        layer = sparse_training(copy.deepcopy(dense), min_sparsity=0.0)
        x = torch.randn(11, 9, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
        assert layer.values.grad.shape == layer.values.shape
        torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(11, 9))


@pytest.mark.parametrize("block", [2, 4])
def test_full_blocks_are_found_and_partial_ones_are_not(block: int) -> None:
    dense = nn.Linear(10, 16)
    mask = (torch.rand(16 // block, 1, 10) < 0.3).expand(-1, block, -1).reshape(16, 10).clone()
    layer = SparseLinear(dense, mask)
    assert int(layer.block) == block
    mask[0, :] = True
    mask[1, 0] = False
    layer.set_mask(mask)
    assert int(layer.block) == 1
    assert torch.equal(layer.mask, mask)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_conversion_in_the_middle_of_training_keeps_optimizer_state(optimizer: str) -> None:
    """Gradual pruning trains dense until its mask is final."""
    model = mlp()
    x = torch.randn(30, 20)
    opt = OPTIMIZERS[optimizer](model.parameters())
    selection = select_parameters(model)
    masks = {n: r.parameter.detach() != 0 for n, r in selection.items()}
    controller = MaskController(
        model, opt, selection, "hard", masks=aerogel.sparsity.MaskSet(masks)
    )
    with pytest.raises(ValueError, match=r"'0\.weight' is under a mask controller"):
        sparse_training(model, min_sparsity=0.0)
    controller.follow_optimizer()
    train(model, opt, x, 3)
    twin = copy.deepcopy((model, opt))
    controller.finalize()
    sparse_training(model, min_sparsity=0.0, optimizer=opt)
    train(model, opt, x, 3)
    # The other way: dense again, and the same state goes on.
    to_dense(model, opt)
    assert {id(p) for p in model.parameters()} == {
        id(p) for g in opt.param_groups for p in g["params"]
    }
    other, other_opt = twin
    again = MaskController(
        other, other_opt, select_parameters(other), "hard", masks=aerogel.sparsity.MaskSet(masks)
    )
    again.follow_optimizer()
    train(other, other_opt, x, 3)
    assert_same_weights(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in opt.state[p].items():
            if isinstance(value, Tensor) and value.dim():
                torch.testing.assert_close(value, other_opt.state[q][key], rtol=1e-3, atol=1e-5)


def test_set_mask_carries_values_and_state() -> None:
    model = sparse_training(mlp(), min_sparsity=0.0)
    layer = model[0]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(30, 20)
    train(model, opt, x)
    old_mask, old_weight = layer.mask, layer.weight.detach()
    state = layer.scatter(opt.state[layer.values]["exp_avg"])
    new = old_mask & (torch.rand(old_mask.shape) < 0.7) | (torch.rand(old_mask.shape) < 0.1)
    layer.set_mask(new, opt)
    assert torch.equal(layer.mask, new)
    assert torch.equal(layer.weight, old_weight * new)
    assert torch.equal(layer.scatter(opt.state[layer.values]["exp_avg"]), state * new)
    train(model, opt, x)
    assert torch.equal(layer.mask, new)
    with pytest.raises(ValueError, match=r"mask: torch\.float32"):
        layer.set_mask(new.float())


def test_set_swaps_the_smallest_weights_for_random_ones() -> None:
    model = sparse_training(mlp(), min_sparsity=0.0)
    layer = model[0]
    old, before = layer.mask, layer.weight.detach()
    count = int(old.sum())
    g = torch.Generator().manual_seed(3)
    changed = update_masks(model, 0.5, generator=g)
    assert int(layer.mask.sum()) == count
    assert changed["0"] == int((layer.mask & ~old).sum()) > 0
    gone, kept = before[old & ~layer.mask].abs(), before[old & layer.mask].abs()
    assert gone.max() <= kept.sort().values[-count // 2]
    assert (layer.weight[layer.mask & ~old] == 0).all()


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    model = sparse_training(mlp(), min_sparsity=0.0)
    twin = mlp()
    x = torch.randn(40, 20)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="dense_gradients"):
        update_masks(model, 0.3, growth="gradient", optimizer=opt)
    with dense_gradients(model):
        for part in x.split(20):
            model(part).square().sum().backward()
    twin(x).square().sum().backward()
    layer, wanted = model[2], twin[2].weight.grad
    torch.testing.assert_close(layer.dense_gradient, wanted, rtol=1e-4, atol=1e-4)
    old = layer.mask
    changed = update_masks(model, 0.3, growth="gradient", optimizer=opt)["2"]
    new = layer.mask & ~old
    assert int(new.sum()) == changed > 0
    free = wanted.abs().masked_fill(old, 0)
    assert free[new].min() >= free[~new & ~old].max() * (1 - 1e-4)
    model(x).sum().backward()
    opt.step()


def test_blocks_are_swapped_whole() -> None:
    dense = nn.Linear(10, 16)
    mask = (torch.rand(4, 1, 10) < 0.3).expand(-1, 4, -1).reshape(16, 10)
    layer = SparseLinear(dense, mask)
    update_masks(layer, 0.5)
    assert int(layer.block) == 4
    assert int(layer.mask.sum()) == int(mask.sum())


def test_state_dict_round_trip_across_masks() -> None:
    source = sparse_training(mlp(), min_sparsity=0.0)
    update_masks(source, 0.4)  # stored zeros belong to the pattern too
    target = sparse_training(prune_(mlp(1), 0.3, seed=5), min_sparsity=0.0)
    target.load_state_dict(source.state_dict())
    x = torch.randn(9, 20)
    assert torch.equal(target(x), source(x))
    assert torch.equal(target[0].mask, source[0].mask)
    assert_same_weights(target, source, 0.0)


def test_a_dense_state_dict_can_be_loaded() -> None:
    dense = mlp()
    sparse = sparse_training(mlp(), min_sparsity=0.0)
    mask = sparse[0].mask
    state = dense.state_dict()
    state["0.weight"] = state["0.weight"] * (torch.rand(33, 20) < 0.5)
    sparse.load_state_dict(state)
    assert torch.equal(sparse[0].mask, mask)  # still fits: the pattern stays
    assert torch.equal(sparse[0].weight, state["0.weight"])
    other = prune_(mlp(1), 0.3, seed=9).state_dict()
    sparse.load_state_dict(other)
    assert torch.equal(sparse[2].weight, other["2.weight"])
    with pytest.raises(ValueError, match=r"0\.weight: shape \(2, 2\)"):
        sparse.load_state_dict({**other, "0.weight": torch.zeros(2, 2)})


def test_deepcopy_and_conversion_of_dtype_go_on() -> None:
    model = sparse_training(mlp(), min_sparsity=0.0)
    x = torch.randn(9, 20)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16


def test_what_stays_dense() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "sparse": prune_(nn.Linear(200, 200), 0.9),
            "dense": prune_(nn.Linear(200, 200), 0.3),
            "small": prune_(nn.Linear(20, 20), 0.9),
            "own": prune_(Own(200, 200), 0.9),
            "hooked": prune_(nn.Linear(200, 200), 0.9),
            "tied": prune_(nn.Linear(200, 200), 0.9),
            "twin": nn.Linear(200, 200),
            "grouped": prune_(nn.Conv2d(200, 200, 1, groups=2), 0.9),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(200, 200)),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["twin"].weight = model["tied"].weight
    assert sparse_training(model) is model
    assert list(find_sparse_layers(model)) == ["sparse"]
    with pytest.warns(UserWarning, match="no layer has 60% zeros"):
        sparse_training(model)


def test_masks_include_and_exclude() -> None:
    model = mlp()
    mask = torch.rand(33, 20) < 0.2
    sparse_training(model, min_sparsity=0.0, masks={"0.weight": mask}, exclude=["2"])
    assert list(find_sparse_layers(model)) == ["0"]
    assert torch.equal(model[0].mask, mask)
    with pytest.raises(ValueError, match=r"1\.weight"):
        sparse_training(mlp(), masks={"1.weight": mask})
    with pytest.raises(ValueError, match=r"masks\['0\.weight'\]: torch\.float32"):
        sparse_training(mlp(), masks={"0.weight": mask.float()})
    with pytest.raises(ValueError, match=r"min_sparsity=1\.5"):
        sparse_training(mlp(), min_sparsity=1.5)
    sparse = sparse_training(mlp(), min_sparsity=0.0)
    with pytest.raises(ValueError, match="fraction=2"):
        update_masks(sparse, 2)
    with pytest.raises(ValueError, match="growth='no'"):
        update_masks(sparse, 0.1, growth="no")  # type: ignore[arg-type]


def test_a_sparse_layer_learns_through_rigl() -> None:
    """Dense gradients, mask updates and the optimizer together fit a sparse teacher."""
    torch.manual_seed(0)
    teacher, student = (
        prune_(nn.Linear(24, 16), 0.9, seed=1),
        prune_(nn.Linear(24, 16), 0.8, seed=2),
    )
    model = sparse_training(student, min_sparsity=0.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    x = torch.randn(256, 24)
    target = teacher(x).detach()
    losses = []
    for step in range(150):
        opt.zero_grad()
        if step % 15 == 14 and step < 100:
            with dense_gradients(model):
                loss = F.mse_loss(model(x), target)
                loss.backward()
            opt.step()
            update_masks(model, 0.3, growth="gradient", optimizer=opt)
        else:
            loss = F.mse_loss(model(x), target)
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[13]


def test_attention_that_reads_weights_still_works() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    prune_(layer)
    x = torch.randn(2, 5, 32)
    expected = layer.eval()(x)
    sparse_training(layer, min_sparsity=0.0)
    assert {"linear1", "linear2"} <= set(find_sparse_layers(layer))
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-4)


def test_the_face_offers_it() -> None:
    assert aerogel.sparse_training is sparse_training


def test_checkpoints_have_the_dense_names_and_the_masks(tmp_path: Path) -> None:
    source = sparse_training(mlp(), min_sparsity=0.0)
    update_masks(source, 0.4)  # stored zeros belong to the pattern too
    aerogel.save(source, tmp_path / "net.safetensors")
    assert set(aerogel.load(tmp_path / "net.safetensors")) == set(mlp().state_dict())
    x = torch.randn(9, 20)
    for target in (mlp(1), sparse_training(prune_(mlp(1), 0.3, seed=5), min_sparsity=0.0)):
        aerogel.load(tmp_path / "net.safetensors", target)
        torch.testing.assert_close(target(x), source(x))
    assert torch.equal(target[0].mask, source[0].mask)
    aerogel.save(mlp(), tmp_path / "dense.safetensors")
    aerogel.load(tmp_path / "dense.safetensors", target)
    assert_same_weights(target, mlp(), 0.0)


def test_compile_sees_plain_layers() -> None:
    model = sparse_training(prune_(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))),
                            min_sparsity=0.0)  # fmt: skip
    x = torch.randn(9, 64)
    compiled = aerogel.compile(model, x, threads=1, cache=False)
    assert [row.sparsity > 0.7 for row in compiled.explain().rows] == [True, True]
    torch.testing.assert_close(compiled(x), model(x))
    assert isinstance(model[0], SparseLinear)
    lone = aerogel.compile(model[0], x, threads=1, cache=False)
    assert [row.shape for row in lone.explain().rows] == [(96, 64)]


def test_it_trains_under_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(sparse_training(mlp(), min_sparsity=0.0))
        model(torch.randn(9, 20)).sum().backward()
        assert model.module[0].values.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_a_damaged_state_dict_names_its_layer() -> None:
    model = sparse_training(mlp(), min_sparsity=0.0)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"^2\.columns: expected indices from 0 to 32"):
        model.load_state_dict({**state, "2.columns": state["2.columns"] + 100})


def test_torchs_default_dtype_does_not_matter() -> None:
    dense = mlp()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = sparse_training(copy.deepcopy(dense), min_sparsity=0.0)
        x = torch.randn(9, 20, dtype=torch.float32)
        result = model(x)
        result.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result, dense(x))
