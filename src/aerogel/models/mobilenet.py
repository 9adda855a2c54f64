"""MobileNet v1 and v2: depthwise 3x3 and pointwise 1x1 convolutions in turn.

Nearly all their work is in the 1x1 convolutions, which are matrix products over pixels; that is
what makes them the hosts of choice for sparse weights (Elsen et al., "Fast Sparse ConvNets").

References:
    Howard et al., "MobileNets", arXiv 1704.04861.
    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from aerogel.models.layers import conv_norm_act, make_divisible
from aerogel.models.registry import register_model
from aerogel.models.vision import VisionModel, _check_pool, make_head

Activation = str | Callable[[], nn.Module]

# (output channels, stride) of the 13 depthwise-separable blocks
V1_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
# (expansion, output channels, repeats, stride of the first) of the inverted residuals
V2_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
SMALLEST_MAP = 7  # pixels of the last map at 224; smaller images keep it by halving less often


class InvertedResidual(nn.Module):
    """Expand 1x1, filter depthwise 3x3, project 1x1 without activation; add the input."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, expansion: int, act_layer: Activation
    ) -> None:
        super().__init__()
        self.use_residual = stride == 1 and in_chs == out_chs
        hidden = in_chs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_norm_act(in_chs, hidden, act_layer=act_layer))
        layers.append(conv_norm_act(hidden, hidden, 3, stride, groups=hidden, act_layer=act_layer))
        layers += [nn.Conv2d(hidden, out_chs, 1, bias=False), nn.BatchNorm2d(out_chs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNetBase(VisionModel):
    """What the family shares: initialisation, the head, the stages, the checks."""

    def _finish(self, channels: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        self.num_features = self.head_hidden_size = channels
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.global_pool = _check_pool(global_pool, num_classes)
        head = make_head(channels, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), head)
        self.classifier_name = "classifier.1"
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation (fan out) of convolutions; norms at 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _describe_stages(self, strides: Sequence[int], channels: Sequence[int]) -> None:
        """A stage ends where the next block halves the map, and at the last block."""
        reduction = 1
        for number, (stride, chs) in enumerate(zip(strides, channels, strict=True)):
            reduction *= stride
            if number + 1 == len(strides) or strides[number + 1] > 1:
                self.feature_info.append(
                    {"num_chs": chs, "reduction": reduction, "module": f"features.{number}"}
                )


class MobileNetV1(MobileNetBase):
    """MobileNet v1: a stem, then blocks of a depthwise 3x3 and a 1x1 convolution.

    Args:
        img_size: height and width of the images; small ones keep a last map of 7 pixels because
            the first strides are left out.
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.
        width: multiplier of all channel counts.
        blocks: (output channels, stride) of each block, taken as they are. Default: the paper's,
            fitted to `img_size`.
        stem_chs: channels of the first convolution.
        stem_stride: its stride.
        global_pool: "avg" or "" (only with `num_classes=0`).
        drop_rate: dropout before the classifier.
        act_layer: activation after each batch norm.
    """

    def __init__(
        self,
        img_size: int = 224,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        blocks: Sequence[tuple[int, int]] | None = None,
        stem_chs: int = 32,
        stem_stride: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Activation = "relu",
    ) -> None:
        super().__init__()
        strides = [stem_stride, *(stride for _, stride in blocks or V1_BLOCKS)]
        if blocks is None:
            blocks, strides = V1_BLOCKS, fit_strides(img_size, strides)
        channels = [scale_channels(c, width) for c in (stem_chs, *(c for c, _ in blocks))]
        self.in_chans = in_chans
        layers = [conv_norm_act(in_chans, channels[0], 3, strides[0], act_layer=act_layer)]
        for in_chs, out_chs, stride in zip(channels, channels[1:], strides[1:], strict=False):
            depthwise = conv_norm_act(in_chs, in_chs, 3, stride, in_chs, act_layer)
            pointwise = conv_norm_act(in_chs, out_chs, act_layer=act_layer)
            layers.append(nn.Sequential(depthwise, pointwise))
        self.features = nn.Sequential(*layers)
        self._describe_stages(strides, channels)
        self._finish(channels[-1], num_classes, global_pool, drop_rate)


class MobileNetV2(MobileNetBase):
    """MobileNet v2, with the state-dict names of torchvision's `mobilenet_v2`.

    Args:
        img_size: height and width of the images; small ones keep a last map of 7 pixels because
            the first strides are left out.
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.
        width: multiplier of all channel counts (the last one never below its own).
        cache_aware: change expansions so that what a sparse 1x1 kernel reads stays in the first
            cache (`cache_aware_channels`); the weights have other shapes then.
        blocks: (expansion, output channels, repeats, stride of the first) of each stage, taken as
            they are. Default: the paper's, fitted to `img_size`.
        stem_chs: channels of the first convolution.
        stem_stride: its stride.
        last_chs: channels of the last 1x1 convolution.
        global_pool: "avg" or "" (only with `num_classes=0`).
        drop_rate: dropout before the classifier.
        act_layer: activation.
    """

    def __init__(
        self,
        img_size: int = 224,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        cache_aware: bool = False,
        blocks: Sequence[tuple[int, int, int, int]] | None = None,
        stem_chs: int = 32,
        stem_stride: int = 2,
        last_chs: int = 1280,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        act_layer: Activation = "relu6",
    ) -> None:
        super().__init__()
        stages = [
            (expansion, scale_channels(chs, width), repeats, stride)
            for expansion, chs, repeats, stride in blocks or V2_BLOCKS
        ]
        if cache_aware:
            stages = cache_aware_channels(stages, in_chs=scale_channels(stem_chs, width))
        plan = [
            (expansion, chs, stride if repeat == 0 else 1)
            for expansion, chs, repeats, stride in stages
            for repeat in range(repeats)
        ]
        strides = [stem_stride, *(stride for _, _, stride in plan), 1]
        if blocks is None:
            strides = fit_strides(img_size, strides)
        channels = [scale_channels(stem_chs, width), *(chs for _, chs, _ in plan)]
        last = scale_channels(last_chs, max(1.0, width))
        self.in_chans = in_chans
        layers: list[nn.Module] = [
            conv_norm_act(in_chans, channels[0], 3, strides[0], act_layer=act_layer)
        ]
        for number, (expansion, chs, _) in enumerate(plan):
            layers.append(
                InvertedResidual(channels[number], chs, strides[number + 1], expansion, act_layer)
            )
        layers.append(conv_norm_act(channels[-1], last, act_layer=act_layer))
        self.features = nn.Sequential(*layers)
        self._describe_stages(strides, [*channels, last])
        self._finish(last, num_classes, global_pool, drop_rate)


def scale_channels(channels: int, width: float) -> int:
    """Channels at a width multiplier, a multiple of 8 unless the width is 1."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return channels if width == 1.0 else make_divisible(channels * width)


def cache_aware_channels(
    config: Sequence[tuple[int, int, int, int]],
    l1_bytes: int = 32 * 1024,
    mr: int = 16,
    in_chs: int = 32,
) -> list[tuple[int, int, int, int]]:
    """Inverted residuals whose 1x1 convolutions read no more channels than the first cache holds.

    A sparse 1x1 kernel works on `mr` pixels of all its input channels at a time: K * mr floats.
    Where K (the input of a block, or its expanded width) is too large for the cache, the expansion
    falls, and the stage gets more blocks instead, so that its 1x1 weights stay about as many.

    Args:
        config: (expansion, output channels, repeats, stride of the first) of each stage.
        l1_bytes: size of the first data cache.
        mr: pixels that the kernel works on at a time; 16 in the paper.
        in_chs: channels that the first stage reads.

    Returns:
        Stages of the same strides.

    Raises:
        ValueError: not even one channel fits, or a malformed stage.

    Reference:
        Elsen et al., arXiv 1911.09723, "cache aware MobileNet v2". The paper gives the aim; this
        rule is ours.
    """
    most = l1_bytes // (4 * mr) if mr > 0 else 0
    if most < 1:
        raise ValueError(f"l1_bytes={l1_bytes}, mr={mr}: not one channel of {mr} pixels fits")
    stages = []
    for expansion, chs, repeats, stride in config:
        if min(expansion, chs, repeats, stride) < 1:
            raise ValueError(f"config: {(expansion, chs, repeats, stride)} is no inverted residual")
        fitted = min(chs, most // 8 * 8 or most)
        widest = in_chs if repeats == 1 else max(in_chs, fitted)
        lower = max(1, min(expansion, most // widest))
        if lower < expansion and fitted * lower <= most:
            wanted = _pointwise_weights(in_chs, chs, expansion, repeats)
            while _pointwise_weights(in_chs, fitted, lower, repeats + 1) <= wanted:
                repeats += 1
        stages.append((lower, fitted, repeats, stride))
        in_chs = fitted
    return stages


def _pointwise_weights(in_chs: int, chs: int, expansion: int, repeats: int) -> int:
    """1x1 weights of a stage of inverted residuals."""
    inputs = [in_chs] + [chs] * (repeats - 1)
    return sum(expansion * each * ((each if expansion > 1 else 0) + chs) for each in inputs)


def fit_strides(img_size: int, strides: list[int]) -> list[int]:
    """Leave out the first halvings of a network made for 224 pixels when images are smaller.

    The last map keeps about as many pixels as at 224, unless the network halves so rarely that
    nothing needs to be left out.
    """
    if img_size < 1:
        raise ValueError(f"img_size must be at least 1, got {img_size}")
    spare = max(0, math.floor(math.log2(img_size / SMALLEST_MAP))) if img_size > 0 else 0
    drop = max(0, sum(stride > 1 for stride in strides) - spare)
    fitted = []
    for stride in strides:
        if stride > 1 and drop > 0:
            stride, drop = 1, drop - 1
        fitted.append(stride)
    return fitted


@register_model(
    input_size=(3, 224, 224), num_classes=1000, params=4_231_976, gmacs=0.5687, paper="1704.04861"
)
def mobilenet_v1(img_size: int = 224, **kwargs: Any) -> MobileNetV1:
    """MobileNet v1 1.0: 4.23 M parameters, 569 M MACs at 224."""
    return MobileNetV1(img_size, **kwargs)


@register_model(
    input_size=(3, 224, 224),
    num_classes=1000,
    params=3_504_872,
    gmacs=0.3008,
    paper="1801.04381",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
def mobilenet_v2(img_size: int = 224, **kwargs: Any) -> MobileNetV2:
    """MobileNet v2 1.0: 3.50 M parameters, 301 M MACs at 224; takes torchvision's weights."""
    return MobileNetV2(img_size, **kwargs)


@register_model(
    input_size=(1, 28, 28), num_classes=10, params=199_786, gmacs=0.0118, paper="1801.04381"
)
def mobilenetv2_laptop(img_size: int = 28, **kwargs: Any) -> MobileNetV2:
    """A small MobileNet v2 for Fashion-MNIST: 0.2 M parameters, 11.8 M MACs."""
    blocks = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 48, 3, 2), (6, 64, 2, 1))
    defaults = {"in_chans": 1, "num_classes": 10, "blocks": blocks, "stem_chs": 16, "last_chs": 256}
    return MobileNetV2(img_size, **{**defaults, **kwargs})


@register_model(
    input_size=(1, 28, 28), num_classes=10, params=455_562, gmacs=0.0090, paper="1704.04861"
)
def mobilenet_v1_laptop(img_size: int = 28, **kwargs: Any) -> MobileNetV1:
    """MobileNet v1 for Fashion-MNIST: 0.46 M parameters, 9.0 M MACs, 96 % in 1x1 convolutions.

    Widths grow as maps shrink (14, 7, 4 pixels): of the nets that two cores train for five epochs
    in four minutes it has the most weights, nearly all where pruning may touch them.
    """
    blocks = ((64, 1), (128, 2), (256, 1), (512, 2), (512, 1))
    defaults = {"in_chans": 1, "num_classes": 10, "blocks": blocks, "stem_chs": 32}
    return MobileNetV1(img_size, **{**defaults, **kwargs})
