"""Networks and data by name, file, folder or import path; everything else is a clear error."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path

import pytest
import torch
from my_nets import Net
from torch import nn

import aerogel
from aerogel import data
from aerogel.compress.exported import load_exported
from aerogel.compress.loading import load_data, load_model, starts_trained
from aerogel.compress.networks import random_networks, vary_norms
from aerogel.compress.recipe import DataSpec, ModelSpec
from aerogel.pruning.selection import pruned_parameters, unfit_parameters

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    """The data set that fixes classes and sizes."""
    return data.load("digits")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    """A saved exported network, and the network."""
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(16, 1, 8, 8))  # moves the running statistics
    net.eval()
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    batch = torch.export.Dim.AUTO
    program = torch.export.export(net, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path, net


@pytest.fixture
def in_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import paths start in the working directory."""
    monkeypatch.chdir(HERE)


def test_same_seed_same_weights(digits: data.Dataset) -> None:
    one, two, other = (load_model(ModelSpec(name="digits_mlp"), digits, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.features[0].weight, two.features[0].weight)
    assert not torch.equal(one.features[0].weight, other.features[0].weight)


@pytest.mark.usefixtures("in_this_folder")
def test_callable_gets_what_the_data_decides(digits: data.Dataset) -> None:
    spec = ModelSpec(name="my_nets:Net", options={"width": 4})
    model = load_model(spec, digits)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert model.conv.out_channels == 4


@pytest.mark.usefixtures("in_this_folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits_mpl", "nearest names: digits_mlp"),
        ("no_such_module:Net", "cannot be imported: No module named"),
        ("my_nets:Nett", "cannot be imported: .*no attribute 'Nett'"),
        ("my_nets:NOT_CALLABLE", "is a int, not a callable"),
        ("my_nets:text", "gave a str, expected an nn.Module"),
        ("my_nets:broken", r"conv.weight has 1 values that are NaN or infinite, of 72"),
        ("nowhere/net.safetensors", "no such file or folder"),
        ("net.pth", "no such file or folder"),
    ],
)
def test_bad_model_names_are_clear_errors(digits: data.Dataset, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelSpec(name=name), digits)


def test_pickled_files_are_never_opened(digits: data.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(Net(), path)
    with pytest.raises(ValueError, match="Pickled files can run code"):
        load_model(ModelSpec(name=str(path)), digits)


def test_safetensors_file_knows_its_network(digits: data.Dataset, tmp_path: Path) -> None:
    model = load_model(ModelSpec(name="digits_mlp"), digits, seed=5)
    anonymous, named = tmp_path / "anonymous.safetensors", tmp_path / "named.safetensors"
    aerogel.save(model, anonymous)
    aerogel.save(model, named, metadata={"aerogel.model": '{"name": "digits_mlp"}'})
    loaded = load_model(ModelSpec(name=str(named)), digits)
    assert torch.equal(loaded.features[0].weight, model.features[0].weight)
    assert starts_trained(ModelSpec(name=str(named)))
    with pytest.raises(ValueError, match="does not say of which network"):
        load_model(ModelSpec(name=str(anonymous)), digits)
    weights = ModelSpec(name="digits_mlp", weights=str(anonymous))
    loaded = load_model(weights, digits)
    assert torch.equal(loaded.features[0].weight, model.features[0].weight)


def test_unknown_data_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest: digits"):
        load_data(DataSpec(name="digitz"))


def test_exported_network_comes_back_in_layers(exported: tuple[Path, Net]) -> None:
    path, net = exported
    loaded = load_exported(path)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), net(x))
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    assert pruned_parameters(loaded, "unstructured") == (
        "conv.weight",
        "point.weight",
        "head.weight",
    )


def test_exported_network_trains(exported: tuple[Path, Net]) -> None:
    loaded = load_exported(exported[0]).train()
    x = torch.randn(5, 1, 8, 8)
    before = loaded.norm.running_mean.clone()
    first, second = loaded(x), loaded(x)
    assert not torch.equal(first, second)  # dropout is on
    assert not torch.equal(loaded.norm.running_mean, before)
    first.sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_fixed_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 1, 8, 8),)), path)
    with pytest.raises(ValueError, match="exported with a fixed batch of 2"):
        load_exported(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data/weights/model.pt", b"x", "could run code"),
        ("data/constants/custom_obj_0", b"x", "could run code"),
        ("data/constants/opaque_obj_0", b"x", "could run code"),
        ("data/aotinductor/model/a.so", b"x", "could run code"),
        ("data/weights/../evil", b"x", "could run code"),
        (
            "data/weights/model_weights_config.json",
            b'{"config": {"a": {"use_pickle": true}}}',
            "pickled weights",
        ),
        ("models/model.json", b'{"x": [{"expr_str": "exit(1)"}]}', "unexpected shape expression"),
        ("models/model.json", b'{"x": [{"as_expr": "eval(chr(49))"}]}', "unexpected shape"),
    ],
)
def test_hostile_archives_are_refused(
    exported: tuple[Path, Net], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(exported[0]) as source, zipfile.ZipFile(path, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for entry in source.namelist():
            if entry != f"{root}/{name}":
                target.writestr(entry, source.read(entry))
        target.writestr(f"{root}/{name}", content)
    with pytest.raises(ValueError, match=message):
        load_exported(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip" * 100])
def test_other_files_are_not_exported_networks(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a usable torch"):
        load_exported(path)


def test_empty_archive_is_not_an_exported_network(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    path = tmp_path / "net.pt2"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a usable torch"):
        load_exported(path)


def test_weights_that_a_pattern_does_not_fit_stay_dense() -> None:
    net = Net()
    assert pruned_parameters(net, "4x1") == ("point.weight", "head.weight")
    assert unfit_parameters(net, "4x1") == ("conv.weight",)
    with pytest.raises(ValueError, match=r"conv\.weight"):
        pruned_parameters(net, "4x1", include=["conv.weight"])
    with pytest.raises(ValueError, match="nothing to prune"):
        pruned_parameters(Net(), "4x1", exclude=["point.weight", "head.weight"])


@pytest.mark.parametrize(("pattern", "zeros"), [("unstructured", 0.9), ("4x1", 0.9), ("2:4", 0.5)])
def test_random_zeros_have_the_sparsity_asked_for(pattern: str, zeros: float) -> None:
    pair, example = random_networks("digits_mlp", zeros, pattern)
    weight = pair.sparse.features[0].weight
    assert float((weight == 0).float().mean()) == pytest.approx(zeros, abs=0.01)
    assert bool((pair.dense.features[0].weight != 0).all())
    assert pair.dense(*example(3)).shape == (3, 10)


def test_no_norm_of_a_random_network_is_an_identity_or_empties_a_layer() -> None:
    pair, _ = random_networks("resnet18", 0.9)
    for network in (pair.dense, pair.sparse):
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(0.5 <= norm.weight.min() < norm.weight.max() for norm in norms)
    trained = copy.deepcopy(pair.dense)
    vary_norms(trained, seed=1)
    for key, value in pair.dense.state_dict().items():
        assert torch.equal(trained.state_dict()[key], value), key


@pytest.mark.usefixtures("in_this_folder")
def test_random_networks_refuse_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sparsity = 1"):
        random_networks("digits_mlp", 1.0)
    with pytest.raises(ValueError, match="give --shape"):
        random_networks("my_nets:Net", 0.5)
