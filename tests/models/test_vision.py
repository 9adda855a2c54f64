"""Every classifier: the papers' counts, timm's interface, and clear errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aerogel import models
from aerogel.models.efficientnet import SqueezeExcite
from aerogel.models.layers import DropPath
from aerogel.models.mobilenet import V2_BLOCKS, cache_aware_channels

VISION = [name for name in models.list_models() if "gmacs" in models.model_config(name)]
MOBILE = [name for name in VISION if name.startswith("mobilenet")]
SMALL = [name for name in VISION if name.endswith("laptop")]
CONVOLUTIONS = [name for name in SMALL if not name.startswith("vit")]  # take images of any size
CACHE = Path(os.environ.get("AEROGEL_CACHE") or "~/.cache/aerogel").expanduser()


def images(name: str, batch: int = 2, **kwargs) -> torch.Tensor:
    channels, height, width = models.model_config(name)["input_size"]
    shape = (batch, kwargs.get("in_chans", channels), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", models.list_models())
def test_parameter_counts_equal_the_papers(name: str):
    pytest.importorskip("transformers") if name in ("minilm", "smollm2") else None
    with torch.device("meta"):
        model = models.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == models.model_config(name)["params"]


@pytest.mark.parametrize("name", VISION)
def test_macs_equal_the_papers(name: str):
    with torch.device("meta"):
        model = models.create_model(name).eval()
        x = torch.empty(1, *models.model_config(name)["input_size"])
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(
        models.model_config(name)["gmacs"], rel=5e-3
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_output_shapes_follow_the_arguments(name: str):
    for classes, channels in ((10, 1), (3, 3), (0, 1)):
        model = models.create_model(name, num_classes=classes, in_chans=channels).eval()
        x = images(name, 3, in_chans=channels)
        assert model(x).shape == (3, classes or model.num_features)
        assert model(x[:1, :, :, :20]).shape[0] == 1
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape == (3, model.head_hidden_size)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_intermediates_are_the_stages_of_the_forward_pass(name: str):
    model = models.create_model(name).eval()
    x = images(name)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1], final)
    for info, stage in zip(model.feature_info, maps, strict=True):
        assert stage.shape[1] == info["num_chs"]
        assert stage.shape[2] == -(-28 // info["reduction"])
    (first,) = model.forward_intermediates(x, [0], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(first, maps[0].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="stages"):
        model.forward_intermediates(x, [99])


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_receives_a_gradient(name: str):
    model = models.create_model(name).train()
    model(images(name, 4)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_samples_of_a_batch_do_not_mix(name: str):
    model = models.create_model(name).eval()
    x = images(name, 4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), model(x)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_can_be_exported_whole(name: str):
    model = models.create_model(name).eval()
    x = images(name, 1)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", MOBILE)
def test_pruning_may_touch_plain_1x1_convolutions_only(name: str):
    with torch.device("meta"):
        model = models.create_model(name)
    targets = dict(model.prune_targets())
    for target in targets:
        conv = model.get_submodule(target)
        assert conv.kernel_size == (1, 1)
        assert conv.groups == 1
    gates = [m for m in model.modules() if isinstance(m, SqueezeExcite)]
    in_gates = sum(p.numel() for gate in gates for p in gate.parameters())
    pointwise = sum(model.get_submodule(t).weight.numel() for t in targets)
    total = sum(p.numel() for p in model.features.parameters()) - in_gates
    assert pointwise / total > 0.8
    found = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in model.modules())
    assert len(targets) == found - 2 * len(gates)


def test_small_images_keep_a_last_map_of_7_pixels():
    model = models.create_model("mobilenet_v1", img_size=28, in_chans=1, width=0.25)
    assert model.forward_features(torch.zeros(1, 1, 28, 28)).shape[2:] == (7, 7)
    full = models.create_model("mobilenet_v2", width=0.35)
    assert full.feature_info[-1]["reduction"] == 32


def test_width_scales_channels_to_multiples_of_8():
    model = models.create_model("mobilenet_v2", width=0.75)
    assert all(info["num_chs"] % 8 == 0 for info in model.feature_info)
    assert model.num_features == 1280


def test_mobilenet_v2_has_the_names_of_torchvision():
    names = models.create_model("mobilenet_v2").state_dict().keys()
    assert {
        "features.0.0.weight",
        "features.0.1.running_mean",
        "features.1.conv.0.0.weight",
        "features.1.conv.1.weight",
        "features.2.conv.1.0.weight",
        "features.2.conv.2.weight",
        "features.2.conv.3.bias",
        "features.18.1.num_batches_tracked",
        "classifier.1.weight",
    } <= names
    assert len(names) == 314


def test_efficientnet_has_the_names_of_torchvision():
    model = models.create_model("efficientnet_b0")
    names = model.state_dict().keys()
    assert {
        "features.0.0.weight",
        "features.1.0.block.0.1.running_var",
        "features.1.0.block.1.fc1.bias",
        "features.1.0.block.2.0.weight",
        "features.2.0.block.0.0.weight",
        "features.2.0.block.1.1.weight",
        "features.2.0.block.2.fc2.weight",
        "features.7.0.block.3.1.num_batches_tracked",
        "features.8.0.weight",
        "classifier.1.bias",
    } <= names
    assert len(names) == 360
    assert len(models.create_model("efficientnet_b1").state_dict()) == 508
    gates = [m for m in model.modules() if isinstance(m, SqueezeExcite)]
    assert [gate.fc1.out_channels for gate in gates][:3] == [8, 4, 6]  # a quarter of the input
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.2 * 15 / 16)


def test_dropped_paths_are_whole_samples_and_keep_the_mean():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = layer(x)
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(per_sample[:, 0].unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert per_sample.mean() == pytest.approx(1.0, abs=0.03)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="rate must be in"):
        DropPath(1.0)


def test_cache_aware_channels_fit_the_cache():
    for l1_bytes, mr in ((32 * 1024, 16), (32 * 1024, 32), (8 * 1024, 16)):
        most, channels = l1_bytes // (4 * mr), 32
        for expansion, chs, repeats, _ in cache_aware_channels(V2_BLOCKS, l1_bytes, mr):
            inputs = [channels] + [chs] * (repeats - 1)
            assert all(each * expansion <= max(most, each) for each in inputs)
            assert chs <= most
            channels = chs
    assert cache_aware_channels(V2_BLOCKS, 1 << 30) == list(V2_BLOCKS)
    strides = [stage[3] for stage in cache_aware_channels(V2_BLOCKS)]
    assert strides == [stage[3] for stage in V2_BLOCKS]
    with pytest.raises(ValueError, match="not one channel"):
        cache_aware_channels(V2_BLOCKS, 32, 16)
    with pytest.raises(ValueError, match="no inverted residual"):
        cache_aware_channels([(0, 16, 1, 1)])


def test_cache_aware_mobilenet_v2_reads_at_most_512_channels_at_a_time():
    with torch.device("meta"):
        model = models.create_model("mobilenet_v2", cache_aware=True)
    inputs = [model.get_submodule(name).in_channels for name, _ in model.prune_targets()]
    assert max(inputs) <= 512
    assert sum(p.numel() for p in model.parameters()) == 3_140_968


def checkpoint(name: str) -> Path:
    path = CACHE / name
    if not path.exists():
        pytest.skip(f"{name} is not in the cache; aerogel.data.fetch_checkpoint({name!r}) gets it")
    return path


def test_pretrained_weights_load_strictly_and_adapt():
    path = checkpoint("mobilenet_v2/mobilenet_v2-b0353104.pth")
    model = models.create_model("mobilenet_v2", checkpoint_path=path).eval()
    grey = models.create_model(
        "mobilenet_v2", checkpoint_path=path, in_chans=1, num_classes=7
    ).eval()
    x = torch.rand(2, 1, 64, 64)
    colour = x.expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        grey.forward_features(x), model.forward_features(colour), rtol=1e-4, atol=1e-4
    )
    assert grey(x).shape == (2, 7)


def test_weights_survive_a_file(tmp_path: Path):
    model = models.create_model("mobilenetv2_laptop").eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    x = images("mobilenetv2_laptop")
    for file in ("w.safetensors", "w.pth"):
        again = models.create_model("mobilenetv2_laptop", checkpoint_path=tmp_path / file).eval()
        assert torch.equal(again(x), model(x))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    save_file({"features.0.0.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="another model than MobileNetV2"):
        models.create_model("mobilenetv2_laptop", checkpoint_path=tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.create_model("mobilenetv2_laptop", checkpoint_path=tmp_path / "nowhere.pth")


def test_nothing_is_unpickled(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"w": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        models.create_model("mobilenetv2_laptop", checkpoint_path=tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_reset_classifier_replaces_the_head():
    model = models.create_model("mobilenetv2_laptop")
    model.reset_classifier(4)
    assert model.get_classifier().out_features == model.num_classes == 4
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)


def test_gradient_checkpointing_changes_nothing():
    model = models.create_model("mobilenet_v1_laptop").train()
    x = images("mobilenet_v1_laptop")
    plain = model(x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: models.create_model("mobilenet_v3"), "mobilenet_v2"),
        (lambda: models.create_model("mobilenet_v2", num_classes=-1), "num_classes"),
        (lambda: models.create_model("mobilenet_v2", width=0.0), "width"),
        (lambda: models.create_model("mobilenet_v2", act_layer="relu7"), "relu6"),
        (lambda: models.create_model("mobilenet_v2", img_size=0), "img_size"),
        (lambda: models.create_model("efficientnet_b0", depth=0.0), "depth must be positive"),
        (lambda: models.create_model("efficientnet_b0", drop_path_rate=1.1), "rate must be in"),
        (lambda: models.create_model("mobilenet_v2", drop_rate=1.0), "drop_rate"),
        (lambda: models.create_model("mobilenet_v2", global_pool="max"), "global_pool"),
        (
            lambda: models.create_model("mobilenetv2_laptop")(torch.zeros(1, 3, 28, 28)),
            r"\(B, 1, H, W\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()


def test_integer_images_get_a_hint():
    with pytest.raises(TypeError, match="divide by 255"):
        models.create_model("mobilenetv2_laptop")(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_the_digits_mlp_is_a_plain_perceptron():
    model = models.create_model("digits_mlp")
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert [name for name, _ in model.prune_targets()] == ["features.0", "features.2"]
    with pytest.raises(ValueError, match="64 values"):
        model(torch.zeros(3, 1, 9, 8))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):

        @models.register_model()
        def mobilenet_v2():
            return nn.Identity()
