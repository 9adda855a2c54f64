"""ResNets: torchvision's names and shapes, timm's interface, what pruning may touch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from aerogel import models
from aerogel.models.resnet import BasicBlock, Bottleneck, ResNet

# Entries of torchvision's state dicts.
STATES = {"resnet18": 122, "resnet34": 218, "resnet50": 320}


def tiny(**kwargs) -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), 32, num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("name", STATES)
def test_state_dicts_have_the_names_of_torchvision(name: str):
    with torch.device("meta"):
        state = models.create_model(name).state_dict()
    assert len(state) == STATES[name]
    widened = 4 if name == "resnet50" else 1
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128 * widened, 64 * widened, 1, 1),
        "layer4.1.bn2.num_batches_tracked": (),
        "fc.bias": (1000,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_halving_happens_in_the_3x3_convolution_of_a_bottleneck():
    with torch.device("meta"):
        block = models.create_model("resnet50").layer2[0]
    assert isinstance(block, Bottleneck)
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == block.downsample[0].stride == (2, 2)


def test_maps_are_those_of_the_paper():
    with torch.device("meta"):
        model = models.create_model("resnet50")
        final, maps = model.forward_intermediates(torch.empty(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
    ]  # fmt: skip
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert final.shape == maps[-1].shape


def test_small_images_keep_a_map_of_several_pixels():
    model = tiny()
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 8, 8)


def test_features_and_classifier_are_views_of_the_named_parts():
    model = tiny(drop_rate=0.5)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.classifier(model.features(x).mean((2, 3))), model(x))
    assert not any(name.startswith(("features", "classifier")) for name in model.state_dict())
    assert model.train().classifier[0].training
    assert model.features.training


def test_a_new_block_is_the_identity_unless_told_otherwise():
    for zero in (True, False):
        norms = [
            m.last_norm for m in tiny(zero_init_last=zero).modules() if hasattr(m, "last_norm")
        ]
        assert len(norms) == 4
        assert all(bool((norm.weight == 0).all()) is zero for norm in norms)


def test_pruning_may_touch_every_convolution_but_the_stem():
    model = tiny()
    targets = [name for name, _ in model.prune_targets()]
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert targets == [name for name in convolutions if name != "conv1"]


def test_weights_survive_a_file_with_another_head(tmp_path: Path):
    with torch.device("meta"):
        empty = models.create_model("resnet18")
    model = empty.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = models.create_model(
        "resnet18", num_classes=3, in_chans=1, checkpoint_path=tmp_path / "w.safetensors"
    )
    assert again.fc.out_features == 3
    assert again.conv1.weight.shape == (64, 1, 7, 7)


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="layers="):
        ResNet(BasicBlock, (1, 1))
    with pytest.raises(ValueError, match="drop_rate"):
        tiny(drop_rate=1.0)
    with pytest.raises(ValueError, match="num_classes"):
        ResNet(BasicBlock, (1, 1, 1, 1), 32, num_classes=-1)
