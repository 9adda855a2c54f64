"""EfficientNet B0 and B1: inverted residuals with squeeze-excite, scaled as a whole.

As in MobileNet v2 nearly all the work is in 1x1 convolutions over maps, here with SiLU between
them; squeeze-excite scales each channel by what the whole map holds.

Reference:
    Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    arXiv 1905.11946.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.models.layers import DropPath, conv_norm_act, make_divisible
from aerogel.models.mobilenet import Activation, MobileNetBase, fit_strides
from aerogel.models.registry import register_model

# (expansion, kernel size, output channels, repeats, stride of the first) of each stage of B0
B0_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
STEM_CHS = 32
SQUEEZE = 4  # squeeze-excite narrows a block's input by this
HEAD_FACTOR = 4  # the last 1x1 convolution widens the last stage by this


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the means of all channels.

    Reference:
        Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the same shape."""
        gate = self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class MBConv(nn.Module):
    """Expand 1x1, filter depthwise, squeeze-excite, project 1x1; add the input."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        act_layer: Activation,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.use_residual = stride == 1 and in_chs == out_chs
        hidden = make_divisible(in_chs * expansion)
        layers: list[nn.Module] = []
        if hidden != in_chs:
            layers.append(conv_norm_act(in_chs, hidden, act_layer=act_layer))
        layers.append(conv_norm_act(hidden, hidden, kernel_size, stride, hidden, act_layer))
        layers.append(SqueezeExcite(hidden, max(1, in_chs // SQUEEZE)))
        project = nn.Conv2d(hidden, out_chs, 1, bias=False)
        layers.append(nn.Sequential(project, nn.BatchNorm2d(out_chs)))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        return x + self.stochastic_depth(self.block(x)) if self.use_residual else self.block(x)


class EfficientNet(MobileNetBase):
    """EfficientNet, with the state-dict names of torchvision's `efficientnet_b*`.

    Args:
        img_size: height and width of the images; small ones keep a last map of 7 pixels because
            the first strides are left out.
        in_chans: input channels.
        num_classes: outputs; 0 for pooled features.
        width: multiplier of all channel counts.
        depth: multiplier of all repeats, rounded up.
        stages: (expansion, kernel size, output channels, repeats, stride of the first). Default:
            those of B0, fitted to `img_size`.
        stem_chs: channels of the first convolution.
        stem_stride: its stride.
        global_pool: "avg" or "" (only with `num_classes=0`).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of a block that would follow the last; rises from 0.
        act_layer: activation.
    """

    def __init__(
        self,
        img_size: int = 224,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        depth: float = 1.0,
        stages: Sequence[tuple[int, int, int, int, int]] | None = None,
        stem_chs: int = STEM_CHS,
        stem_stride: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        act_layer: Activation = "silu",
    ) -> None:
        super().__init__()
        if not (width > 0 and depth > 0):
            raise ValueError(f"width and depth must be positive, got {width} and {depth}")
        strides = [stem_stride, *(stride for *_, stride in stages or B0_STAGES), 1]
        if stages is None:
            stages, strides = B0_STAGES, fit_strides(img_size, strides)
        channels = [make_divisible(c * width) for c in (stem_chs, *(s[2] for s in stages))]
        repeats = [math.ceil(each[3] * depth) for each in stages]
        rates = (drop_path_rate * n / sum(repeats) for n in range(sum(repeats)))
        self.in_chans = in_chans
        layers = [conv_norm_act(in_chans, channels[0], 3, strides[0], act_layer=act_layer)]
        for number, (expansion, kernel_size, *_) in enumerate(stages):
            blocks = [
                MBConv(
                    channels[number] if repeat == 0 else channels[number + 1],
                    channels[number + 1],
                    kernel_size,
                    strides[number + 1] if repeat == 0 else 1,
                    expansion,
                    act_layer,
                    next(rates),
                )
                for repeat in range(repeats[number])
            ]
            layers.append(nn.Sequential(*blocks))
        last = HEAD_FACTOR * channels[-1]
        layers.append(conv_norm_act(channels[-1], last, act_layer=act_layer))
        self.features = nn.Sequential(*layers)
        self._describe_stages(strides, [*channels, last])
        self._finish(last, num_classes, global_pool, drop_rate)

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "conv") of every 1x1 convolution over a map: what pruning may touch.

        Squeeze-excite convolves a single pixel: its zeros would cost accuracy and buy nothing.
        """
        for name, kind in super().prune_targets():
            parent, _, _ = name.rpartition(".")
            if not isinstance(self.get_submodule(parent), SqueezeExcite):
                yield name, kind


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@register_model(
    input_size=(3, 224, 224),
    num_classes=1000,
    params=5_288_548,
    gmacs=0.3858,
    paper="1905.11946",
    **_IMAGENET,
)
def efficientnet_b0(img_size: int = 224, **kwargs: Any) -> EfficientNet:
    """EfficientNet B0: 5.29 M parameters; takes torchvision's weights."""
    return EfficientNet(img_size, **kwargs)


@register_model(
    input_size=(3, 240, 240),
    num_classes=1000,
    params=7_794_184,
    gmacs=0.6868,
    paper="1905.11946",
    **_IMAGENET,
)
def efficientnet_b1(img_size: int = 240, **kwargs: Any) -> EfficientNet:
    """EfficientNet B1: 7.79 M parameters, a tenth deeper than B0; takes torchvision's weights."""
    return EfficientNet(img_size, **{"depth": 1.1, **kwargs})


@register_model(
    input_size=(1, 28, 28), num_classes=10, params=140_134, gmacs=0.0081, paper="1905.11946"
)
def efficientnet_laptop(img_size: int = 28, **kwargs: Any) -> EfficientNet:
    """A small EfficientNet for Fashion-MNIST: 0.14 M parameters, 8.1 M MACs."""
    stages = ((1, 3, 16, 1, 1), (6, 3, 24, 2, 1), (6, 5, 48, 2, 2), (6, 3, 64, 1, 1))
    defaults = {"in_chans": 1, "num_classes": 10, "stages": stages, "stem_chs": 16}
    return EfficientNet(img_size, **{**defaults, **kwargs})
