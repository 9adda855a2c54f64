"""ResNet 18, 34 and 50: stacks of residual blocks of two 3x3, or 1x1, 3x3 and 1x1 convolutions.

The 50-layer net halves maps in the 3x3 convolution of a block (as torchvision and the field do)
instead of the first 1x1.

Reference:
    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from aerogel.models.layers import Activation, make_activation
from aerogel.models.mobilenet import fit_strides
from aerogel.models.registry import register_model
from aerogel.models.vision import VisionModel, _check_pool, make_head

STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the input, which is projected where its shape differs."""

    expansion = 1

    def __init__(self, in_chs: int, chs: int, stride: int, act_layer: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.relu = make_activation(act_layer)
        self.conv2 = nn.Conv2d(chs, chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(chs)
        self.downsample = _projection(in_chs, chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chs, H, W) -> (B, chs, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        return self.bn2


class Bottleneck(nn.Module):
    """Reduce 1x1, filter 3x3, expand 1x1, and the input, projected where its shape differs."""

    expansion = 4

    def __init__(self, in_chs: int, chs: int, stride: int, act_layer: Activation) -> None:
        super().__init__()
        out_chs = chs * self.expansion
        self.conv1 = nn.Conv2d(in_chs, chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.conv2 = nn.Conv2d(chs, chs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(chs)
        self.conv3 = nn.Conv2d(chs, out_chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.relu = make_activation(act_layer)
        self.downsample = _projection(in_chs, out_chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chs, H, W) -> (B, 4 * chs, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        return self.bn3


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(VisionModel):
    """ResNet, with the state-dict names of torchvision's `resnet18`, `resnet34`, `resnet50`.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks of each of the four stages.
        img_size: height and width of the images; small ones keep a last map of 7 pixels because
            the first halvings (stem, pooling, stages) are left out.
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.
        global_pool: "avg" or "" (only with `num_classes=0`).
        drop_rate: dropout before the classifier.
        act_layer: activation after each batch norm and each sum.
        zero_init_last: start the last norm of every block at 0, so that a block begins as the
            identity.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        img_size: int = 224,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Activation = "relu",
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        if len(layers) != len(STAGE_CHANNELS) or min(layers) < 1:
            raise ValueError(f"layers={tuple(layers)}: expected four positive numbers of blocks")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        stem, pool, *strides = fit_strides(img_size, [2, 2, *STAGE_STRIDES])
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.conv1 = nn.Conv2d(in_chans, STAGE_CHANNELS[0], 7, stem, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_CHANNELS[0])
        self.relu = make_activation(act_layer)
        self.maxpool = nn.MaxPool2d(3, pool, 1) if pool > 1 else nn.Identity()
        chs, reduction = STAGE_CHANNELS[0], stem * pool
        for number, (width, stride) in enumerate(zip(STAGE_CHANNELS, strides, strict=True), 1):
            blocks: list[nn.Module] = []
            for index in range(layers[number - 1]):
                blocks.append(block(chs, width, stride if index == 0 else 1, act_layer))
                chs = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            reduction *= stride
            info = {"num_chs": chs, "reduction": reduction, "module": f"features.{number}"}
            self.feature_info.append(info)
        self.num_features = self.head_hidden_size = chs
        self.global_pool = _check_pool(global_pool, num_classes)
        self.fc = make_head(chs, num_classes)
        self.classifier_name = "fc"
        self.init_weights(zero_init_last)

    @property
    def features(self) -> nn.Sequential:  # type: ignore[override]
        """Stem and stages in order; a view, so that parameters keep torchvision's names."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        stages = [self.get_submodule(f"layer{n + 1}") for n in range(len(STAGE_CHANNELS))]
        return nn.Sequential(stem, *stages).train(self.training)

    @property
    def classifier(self) -> nn.Module:  # type: ignore[override]
        """Dropout and the last linear layer."""
        return nn.Sequential(nn.Dropout(self.drop_rate), self.fc).train(self.training)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """He initialisation (fan out) of convolutions; norms at 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_last and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.last_norm.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for layer-wise learning rates: the stem, then stages or (fine) blocks."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(conv1|bn1)\.", "blocks": re.compile(blocks)}

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "conv") of every convolution but the stem, 1x1 and 3x3 alike."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1":
                yield name, "conv"


def _projection(in_chs: int, out_chs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_chs == out_chs:
        return None
    return nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))


_IMAGENET: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "paper": "1512.03385",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


@register_model(params=11_689_512, gmacs=1.814, **_IMAGENET)
def resnet18(img_size: int = 224, **kwargs: Any) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.81 G MACs at 224; takes torchvision's weights."""
    return ResNet(BasicBlock, (2, 2, 2, 2), img_size, **kwargs)


@register_model(params=21_797_672, gmacs=3.664, **_IMAGENET)
def resnet34(img_size: int = 224, **kwargs: Any) -> ResNet:
    """ResNet-34: 21.8 M parameters, 3.66 G MACs at 224; takes torchvision's weights."""
    return ResNet(BasicBlock, (3, 4, 6, 3), img_size, **kwargs)


@register_model(params=25_557_032, gmacs=4.089, **_IMAGENET)
def resnet50(img_size: int = 224, **kwargs: Any) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.09 G MACs at 224; takes torchvision's weights."""
    return ResNet(Bottleneck, (3, 4, 6, 3), img_size, **kwargs)
