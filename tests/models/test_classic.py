"""The classic small networks have the papers' layers, weights and initial values."""

import pytest
import torch
from torch import nn

from aerogel.models import VGG, CifarResNet, ConvN, LeNet300
from aerogel.sparsity import select_parameters


def weights(model):
    return select_parameters(model).numel


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_lenet_has_the_papers_266_thousand_weights():
    assert weights(LeNet300()) == 784 * 300 + 300 * 100 + 100 * 10 == 266_200
    assert weights(LeNet300(img_size=14)) == 196 * 300 + 300 * 100 + 1000


@pytest.mark.parametrize(
    ("convs", "in_convs", "total"),
    [(2, 38_592, 4_300_992), (4, 259_776, 2_425_024), (6, 1_144_512, 2_261_184)],
)
def test_conv_nets_have_the_papers_weights(convs, in_convs, total):
    """Figure 2 of the paper: 38 K of 4.3 M, 260 K of 2.4 M, 1.1 M (of 1.7 M, which is odd)."""
    model = ConvN(convs)
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == in_convs
    assert weights(model) == total
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_cifar_resnets_have_the_papers_size(depth, millions):
    """Table 6 of He et al., whose shortcuts have no weights; the 1x1 ones have at most 1 %."""
    model = CifarResNet(depth)
    shortcuts = sum(p.numel() for n, p in model.named_parameters() if "downsample" in n)
    assert round((parameters(model) - shortcuts) / 1e6, 2 if millions < 1 else 1) == millions
    layers = [m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) - 2 == depth  # two shortcuts


def test_a_cifar_resnet_is_as_wide_as_it_is_told():
    model = CifarResNet(20, 8, 100)
    assert [info["num_chs"] for info in model.feature_info] == [8, 16, 32]
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 100)
    assert model.forward_features(x).shape == (2, 32, 8, 8)
    final, maps = model.eval().forward_intermediates(x)
    assert [m.shape[2] for m in maps] == [32, 16, 8]
    assert torch.equal(final, maps[-1])


def test_vgg_19_has_the_papers_20_million_weights():
    with torch.device("meta"):
        assert weights(VGG(19)) == 20_018_880 + 5_120
        assert [sum(isinstance(m, nn.Conv2d) for m in VGG(d).modules()) for d in (11, 13, 16)] == [
            8,
            10,
            13,
        ]
    model = VGG(11, num_classes=4).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 512, 2, 2)


def test_initial_values_are_glorot_or_he_normal():
    layer = LeNet300().features[0]
    assert float(layer.weight.detach().std()) == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.02)
    assert not layer.bias.any()
    conv = ConvN(4).features[2]
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (2 * 64 * 9)) ** 0.5, rel=0.03)
    block = CifarResNet(20, 32).features[3][1].conv1
    assert float(block.weight.detach().std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("model", [ConvN(2, 8), CifarResNet(20, 4), LeNet300(6)])
def test_pruning_may_touch_all_but_the_classifier(model):
    targets = dict(model.prune_targets())
    names = [name.removesuffix(".weight") for name in select_parameters(model)]
    assert list(targets) == names[:-1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvN(3), "convs"),
        (lambda: ConvN(6, 4), "img_size"),
        (lambda: ConvN(2, num_classes=0), "num_classes"),
        (lambda: ConvN(2)(torch.zeros(1, 3, 28, 28)), "expected images"),
        (lambda: VGG(18), "depth"),
        (lambda: VGG(11, num_classes=-1), "num_classes"),
        (lambda: CifarResNet(18), "depth"),
        (lambda: CifarResNet(20, 0), "width"),
        (lambda: CifarResNet(20, num_classes=-1), "num_classes"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
