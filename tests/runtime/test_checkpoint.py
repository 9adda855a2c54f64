"""What `save` promises about tensors and models: bit for bit, small, under the dense names."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel.runtime.checkpoint import inspect, load, load_masks, save
from aerogel.runtime.module_state import bake_parametrizations

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn)


class Mask(nn.Module):
    """A weight mask as the library makes them: a bool buffer, True = kept."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def sparse(*shape: int, sparsity: float = 0.9, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape)
    return torch.where(torch.rand(shape) < sparsity, torch.zeros(()), values).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["auto", "dense", "sparse-bitmask", "flat-bitmask"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype, format) -> None:
    state = {
        "fc.weight": sparse(64, 130).to(dtype),
        "conv.weight": sparse(32, 16, 3, 3).to(dtype),
        "fc.bias": torch.randn(64).to(dtype),
    }
    save(state, tmp_path / "m.safetensors", format=format)
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.keys() == state.keys()
    assert all(same_bits(loaded[name], state[name]) for name in state)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(FLOATS),
    format=st.sampled_from(["auto", "sparse-bitmask", "flat-bitmask", "sparse-24-bitmask"]),
    name=st.sampled_from(["w", "fc.weight", "a.b.bias", "weight", "x.shape"]),
)
def test_any_shape_comes_back_bit_for_bit(tmp_path_factory, shape, sparsity, dtype, format, name):
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    tensor = sparse(*shape, sparsity=sparsity, dtype=dtype)
    save({name: tensor}, path, format=format)
    assert same_bits(load(path)[name], tensor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_keep_their_bits(tmp_path, dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 0.0])
    tensor = torch.cat([special, torch.zeros(4091)]).to(dtype).reshape(8, -1)
    save({"fc.weight": tensor}, tmp_path / "m")
    assert inspect(tmp_path / "m").tensors[0].layout != "dense"
    assert same_bits(load(tmp_path / "m")["fc.weight"], tensor)


def test_negative_zero_is_a_zero_when_stored_sparse(tmp_path) -> None:
    pruned = torch.randn(64, 64) * (torch.rand(64, 64) > 0.9)  # leaves -0.0 in half the places
    dense = torch.tensor([-0.0, 1.0, 2.0])
    save({"fc.weight": pruned, "b": dense}, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert torch.equal(loaded["fc.weight"], pruned)
    assert inspect(tmp_path / "m").tensors[0].sparsity > 0.85
    assert same_bits(loaded["b"], dense)


@pytest.mark.parametrize(
    "shape", [(256, 256), (1024, 1024), (512, 512, 1, 1), (256, 64, 3, 3), (4096, 16), (65536,),
              (100_000, 1)],
)  # fmt: skip
def test_90_percent_sparse_float32_takes_at_most_015_of_its_dense_bytes(tmp_path, shape) -> None:
    tensor = sparse(*shape)
    save({"fc.weight": tensor}, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= 0.15 * tensor.numel() * 4
    assert same_bits(load(tmp_path / "m")["fc.weight"], tensor)


def test_a_dense_tensor_is_stored_dense(tmp_path) -> None:
    save({"fc.weight": torch.randn(64, 64)}, tmp_path / "m")
    assert inspect(tmp_path / "m").tensors[0].layout == "dense"


def test_two_of_four_is_stored_and_recorded_as_such(tmp_path) -> None:
    keep = torch.tensor([True, False, True, False]).repeat(64, 64)
    tensor = torch.where(keep, torch.randn(64, 256), torch.zeros(()))
    save({"fc.weight": tensor}, tmp_path / "m")
    info = inspect(tmp_path / "m").tensors[0]
    assert (info.layout, info.pattern, info.sparsity) == ("sparse-24-bitmask", "2:4", 0.5)
    assert same_bits(load(tmp_path / "m")["fc.weight"], tensor)


def test_noncontiguous_tensors_are_saved_by_value(tmp_path) -> None:
    base = sparse(64, 96)
    conv = sparse(8, 16, 3, 3).to(memory_format=torch.channels_last)
    state = {"t.weight": base.t(), "s.weight": base[::2, ::3], "c.weight": conv,
             "e": torch.ones(1).expand(5)}  # fmt: skip
    save(state, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert all(tensor.is_contiguous() for tensor in loaded.values())


def test_tied_tensors_are_stored_once(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    save(model, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1.1 * model.embed.weight.numel() * 4
    loaded = load(tmp_path / "m")
    assert loaded["head.weight"] is loaded["embed.weight"]
    fresh = load(tmp_path / "m", Tied())
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.head.weight, model.embed.weight)


def test_views_of_one_memory_that_differ_are_both_kept(tmp_path) -> None:
    base = torch.randn(8, 8)
    state = {"all": base, "top": base[:4], "turned": base.t()}
    save(state, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def masked_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 64))
    for layer in (net[0], net[3]):
        mask = torch.rand(layer.weight.shape) > 0.8
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    return net


def test_masked_model_is_saved_baked_under_dense_names(tmp_path) -> None:
    net = masked_net()
    save(net, tmp_path / "m")
    dense = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 64))
    load(tmp_path / "m", dense)
    assert torch.equal(dense[3].weight, net[3].weight)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(dense.eval()(x), net.eval()(x))
    assert parametrize.is_parametrized(net[0], "weight")  # saving leaves the model as it was


def test_mask_survives_save_and_load(tmp_path) -> None:
    net, other = masked_net(0), masked_net(1)
    with torch.no_grad():  # a kept weight that happens to be zero, as dynamic methods grow them
        kept = net[3].parametrizations.weight[0].mask.nonzero()[0]
        net[3].parametrizations.weight.original[kept[0], kept[1]] = 0.0
    save(net, tmp_path / "m")
    load(tmp_path / "m", other)
    for layer in (0, 3):
        mask = net[layer].parametrizations.weight[0].mask
        assert torch.equal(other[layer].parametrizations.weight[0].mask, mask)
        assert torch.equal(other[layer].weight, net[layer].weight)
    assert torch.equal(
        load_masks(tmp_path / "m")["3.weight"], net[3].parametrizations.weight[0].mask
    )


def test_tied_masked_tensors_are_stored_once(tmp_path) -> None:
    net = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    net[1].weight = net[0].weight
    mask = Mask(torch.rand(64, 64) > 0.9)
    for layer in net:
        parametrize.register_parametrization(layer, "weight", mask)
    assert net[0].parametrizations.weight.original is net[1].parametrizations.weight.original
    save(net, tmp_path / "m")
    assert inspect(tmp_path / "m").shared == {"1.weight": "0.weight"}
    assert torch.equal(load_masks(tmp_path / "m")["1.weight"], mask.mask)


def test_baking_a_copy_leaves_the_original_alone() -> None:
    net = masked_net()
    x = torch.randn(2, 3, 6, 6)
    expected = net.eval()(x)
    copied = bake_parametrizations(copy.deepcopy(net))
    assert torch.equal(copied(x), expected)
    assert torch.equal(net(x), expected)
    assert type(copied[0]) is nn.Conv2d
    assert copied.state_dict().keys() == {*net.state_dict().keys()} - {
        f"{i}.parametrizations.weight.{part}" for i in (0, 3) for part in ("original", "0.mask")
    } | {"0.weight", "3.weight"}


def test_zeros_stay_zero_in_training_after_load(tmp_path) -> None:
    net = masked_net(0)
    save(net, tmp_path / "m")
    load_into = load(tmp_path / "m", masked_net(1))
    zeros = net[3].weight == 0
    optimizer = torch.optim.SGD(load_into.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        load_into(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    assert (load_into[3].weight[zeros] == 0).all()


def test_parametrization_without_mask_is_loaded_through_its_inverse(tmp_path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    save(layer, tmp_path / "m")
    other = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    load(tmp_path / "m", other)
    assert torch.allclose(other.weight, layer.weight, atol=1e-6)


def test_names_that_look_like_parts_do_not_collide(tmp_path) -> None:
    state = {
        "fc.weight": sparse(128, 128),
        "fc": sparse(128, 128),
        "fc.bitmask": torch.ones(2),
        "fc.weight.shape": torch.ones(3),
        "fc.compressed.weight": sparse(128, 128),
    }
    save(state, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.keys() == state.keys()
    assert all(same_bits(loaded[name], state[name]) for name in state)


def test_inspect_tells_pattern_sparsity_metadata_and_sizes(tmp_path) -> None:
    state = {"fc.weight": sparse(256, 256), "fc.bias": torch.ones(256)}
    save(state, tmp_path / "m", metadata={"accuracy": "0.93"}, patterns={"fc.weight": "4x1"})
    info = inspect(tmp_path / "m")
    row = info.tensors[0]
    assert (row.name, row.shape, row.dtype, row.pattern) == (
        "fc.weight",
        (256, 256),
        "float32",
        "4x1",
    )
    assert row.sparsity == pytest.approx((state["fc.weight"] == 0).float().mean().item())
    assert info.metadata == {"accuracy": "0.93"}
    assert info.file_bytes == (tmp_path / "m").stat().st_size
    assert info.dense_bytes == 4 * (256 * 256 + 256)
    assert "fc.weight" in str(info)
    assert "% of dense" in str(info)
    assert info.to_dict()["tensors"][0]["layout"] == row.layout


def test_saving_twice_gives_the_same_bytes(tmp_path) -> None:
    net = masked_net()
    save(net, tmp_path / "a")
    save(net, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path) -> None:
    save({"w": torch.ones(1000)}, tmp_path / "m")
    loaded = load(tmp_path / "m")["w"]
    (tmp_path / "m").write_bytes(b"")
    loaded += 1
    assert (loaded == 2).all()


def test_model_that_does_not_fit_is_named_and_left_alone(tmp_path) -> None:
    save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "m")
    wrong = nn.Sequential(nn.Linear(5, 4))
    before = {name: value.clone() for name, value in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 4\)"):
        load(tmp_path / "m", wrong)
    assert all(torch.equal(before[name], value) for name, value in wrong.state_dict().items())
    longer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="2 missing"):
        load(tmp_path / "m", longer)
    assert torch.equal(
        load(tmp_path / "m", longer, strict=False)[0].weight, load(tmp_path / "m")["0.weight"]
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"obj": [1]}, TypeError, "module or a dict"),
        ({"obj": {"a": 1}}, ValueError, r"obj\['a'\] is a int"),
        ({"obj": {"": torch.ones(1)}}, ValueError, "non-empty"),
        ({"obj": {"a": torch.empty(2, device="meta")}}, ValueError, "meta device"),
        ({"obj": {"a": torch.eye(3).to_sparse()}}, ValueError, "layout"),
        ({"obj": {"a": torch.ones(2, dtype=torch.complex128)}}, ValueError, "complex128"),
        ({"format": "sparse-bitmsk"}, ValueError, "sparse-bitmask"),
        ({"patterns": {"fc.weigth": "2:4"}}, ValueError, "fc.weight"),
        ({"metadata": {"a": 1}}, TypeError, "strings to strings"),
        ({"metadata": {"format": "x"}}, ValueError, "reserved"),
    ],
)
def test_bad_arguments_are_named(tmp_path, kwargs, error, match) -> None:
    arguments = {"obj": {"fc.weight": torch.ones(2, 2)}, **kwargs}
    with pytest.raises(error, match=match):
        save(arguments.pop("obj"), tmp_path / "m", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_100_mb_is_saved_and_loaded_in_seconds(tmp_path) -> None:
    state = {f"l{i}.weight": sparse(2048, 1024) for i in range(12)}
    begin = time.perf_counter()
    save(state, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert time.perf_counter() - begin < 8  # 0.4 s on the machine this was written on
    assert all(same_bits(loaded[name], state[name]) for name in state)
