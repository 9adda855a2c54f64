"""The small networks on which pruning is studied: LeNet-300-100, Conv-2/4/6, VGG and CIFAR ResNets.

LeNet, Conv and VGG start from Glorot-normal weights and zero biases as in the lottery ticket paper,
the ResNet from He-normal ones.

Reference:
    Frankle and Carbin, arXiv 1803.03635 (figure 2); He et al., arXiv 1512.03385 (section 4.2);
    Simonyan and Zisserman, arXiv 1409.1556; Liu et al., arXiv 2202.02643 (widths and shortcuts).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from aerogel.models.layers import make_activation
from aerogel.models.mlp import MLP
from aerogel.models.registry import register_model
from aerogel.models.resnet import BasicBlock
from aerogel.models.vision import VisionModel, make_head

CONV_CHANNELS = (64, 128, 256)  # of each pair of convolutions
CONV_HIDDEN = 256

# Channels of the convolutions in each of VGG's five stages, by depth.
VGG_STAGES = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class LeNet300(MLP):
    """LeNet-300-100: a perceptron of hidden widths 300 and 100.

    Args:
        img_size: height and width of the images, which are flattened.
        in_chans: input channels.
        num_classes: outputs; 0 for the last hidden features.
        act_layer: activation after each hidden layer.
    """

    def __init__(
        self,
        img_size: int = 28,
        *,
        in_chans: int = 1,
        num_classes: int = 10,
        act_layer: str = "relu",
    ) -> None:
        super().__init__(
            img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            hidden=(300, 100),
            act_layer=act_layer,
        )
        glorot_normal_(self)


class ConvN(nn.Module):
    """Conv-2, Conv-4 or Conv-6: pairs of 3x3 convolutions with pooling, and three linear layers.

    Args:
        convs: number of convolutions: 2, 4 or 6.
        img_size: height and width of the images, at least two to the power of ``convs / 2``.
        in_chans: input channels.
        num_classes: outputs.
        act_layer: activation after every layer but the last.

    Raises:
        ValueError: another number of convolutions, or images too small to be pooled.
    """

    def __init__(
        self,
        convs: int,
        img_size: int = 32,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        act_layer: str = "relu",
    ) -> None:
        super().__init__()
        if convs not in (2, 4, 6):
            raise ValueError(f"convs must be 2, 4 or 6, got {convs}")
        pairs = convs // 2
        side = img_size >> pairs
        if side < 1:
            raise ValueError(f"img_size must be at least {1 << pairs}, got {img_size}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.in_chans, self.num_classes, self.img_size = in_chans, num_classes, img_size
        layers: list[nn.Module] = []
        chs = in_chans
        for width in CONV_CHANNELS[:pairs]:
            for _ in range(2):
                layers += [nn.Conv2d(chs, width, 3, padding=1), make_activation(act_layer)]
                chs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(chs * side * side, CONV_HIDDEN),
            make_activation(act_layer),
            nn.Linear(CONV_HIDDEN, CONV_HIDDEN),
            make_activation(act_layer),
            nn.Linear(CONV_HIDDEN, num_classes),
        )
        glorot_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, img_size, img_size) -> logits (B, num_classes)."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if x.shape[1:] != expected:
            raise ValueError(f"expected images (B, {expected}), got shape {tuple(x.shape)}")
        return self.classifier(self.features(x))

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, kind) of every layer but the last."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                yield name, "conv"
            elif isinstance(module, nn.Linear) and module is not self.classifier[-1]:
                yield name, "linear"


class VGG(VisionModel):
    """VGG for small images: batch norm after every convolution, and one linear layer at the end.

    The map is halved after each of the first four stages and averaged after the fifth.

    Args:
        depth: 11, 13, 16 or 19 (layers of the original, which ends in three linear ones).
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.

    Raises:
        ValueError: another depth, or a negative number of classes.
    """

    def __init__(self, depth: int = 19, *, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if depth not in VGG_STAGES:
            raise ValueError(f"depth must be one of {tuple(VGG_STAGES)}, got {depth}")
        _check_classes(num_classes)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, 0.0
        stages, chs = [], in_chans
        for number, widths in enumerate(VGG_STAGES[depth]):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for width in widths:
                layers += [
                    nn.Conv2d(chs, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                chs = width
            stages.append(nn.Sequential(*layers))
            self.feature_info.append(
                {"num_chs": chs, "reduction": 2**number, "module": f"features.{number}"}
            )
        self.features = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = chs
        self.global_pool, self.classifier_name = "avg", "classifier"
        self.classifier = make_head(chs, num_classes)
        glorot_normal_(self)

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "conv") of every convolution."""
        return _convolutions(self)


class CifarResNet(VisionModel):
    """The ResNet for 32x32 images: three stages of `BasicBlock`, of widths w, 2w and 4w.

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm.

    Args:
        depth: layers, 6n + 2: 20, 32, 44, 56, 110, ...
        width: channels of the first stage; 16 in He et al.
        num_classes: outputs; 0 for pooled features.
        in_chans: input channels.

    Raises:
        ValueError: a depth that is not 6n + 2, a width below 1, or a negative number of classes.
    """

    def __init__(
        self, depth: int = 20, width: int = 16, num_classes: int = 10, *, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks, odd = divmod(depth - 2, 6)
        if odd or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110), got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        _check_classes(num_classes)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, 0.0
        stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        stages, chs = [], width
        for number in range(3):
            out_chs = width << number
            stage = []
            for index in range(blocks):
                stride = 2 if number and index == 0 else 1
                stage.append(BasicBlock(chs, out_chs, stride, "relu"))
                chs = out_chs
            stages.append(nn.Sequential(*stage))
            self.feature_info.append(
                {"num_chs": chs, "reduction": 2**number, "module": f"features.{number + 1}"}
            )
        self.features = nn.Sequential(stem, *stages)
        self.num_features = self.head_hidden_size = chs
        self.global_pool, self.classifier_name = "avg", "classifier"
        self.classifier = make_head(chs, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """He-normal weights (fan in) of convolutions and classifier, zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "conv") of every convolution."""
        return _convolutions(self)


def glorot_normal_(model: nn.Module) -> None:
    """Give every linear and convolution layer Glorot-normal weights and zero biases, in place.

    Reference:
        Glorot and Bengio, AISTATS 2010; the initialisation of arXiv 1803.03635.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, "conv"


def _check_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")


_CIFAR: dict[str, Any] = {"input_size": (3, 32, 32), "num_classes": 10}


@register_model(input_size=(1, 28, 28), num_classes=10, params=266_610, paper="1803.03635")
def lenet_300_100(img_size: int = 28, **kwargs: Any) -> LeNet300:
    """LeNet-300-100 for MNIST: 266,200 weights."""
    return LeNet300(img_size, **kwargs)


@register_model(params=4_301_642, paper="1803.03635", **_CIFAR)
def conv_2(img_size: int = 32, **kwargs: Any) -> ConvN:
    """Conv-2 for CIFAR-10: 4.3 M weights."""
    return ConvN(2, img_size, **kwargs)


@register_model(params=2_425_930, paper="1803.03635", **_CIFAR)
def conv_4(img_size: int = 32, **kwargs: Any) -> ConvN:
    """Conv-4 for CIFAR-10: 2.4 M weights."""
    return ConvN(4, img_size, **kwargs)


@register_model(params=2_262_602, paper="1803.03635", **_CIFAR)
def conv_6(img_size: int = 32, **kwargs: Any) -> ConvN:
    """Conv-6 for CIFAR-10: 2.26 M weights, 1.1 M of them in convolutions.

    The paper's table says 1.7 M, which its own description of the layers does not give.
    """
    return ConvN(6, img_size, **kwargs)


@register_model(params=20_035_018, gmacs=0.398, paper="1803.03635", **_CIFAR)
def cifar_vgg_19(img_size: int = 32, **kwargs: Any) -> VGG:
    """VGG-19 for CIFAR-10: 20.0 M weights."""
    return VGG(19, **kwargs)


@register_model(params=272_474, gmacs=0.0408, paper="1512.03385", **_CIFAR)
def cifar_resnet_20(img_size: int = 32, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR-10: 0.27 M parameters."""
    return CifarResNet(20, **kwargs)
